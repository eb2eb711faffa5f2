"""Why a failure happened: rankings compared, evidence followed, and the swap test judged.

Pure functions of arrays; V is the number of visual tokens. After CAA (arXiv 2601.12042) the top
and bottom of a ranking are 100 of 576 tokens, or that share of another number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from redteam.datasets.base import Box
from reports.records import Diagnosis, Tokens

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

TOP_SHARE = 100 / 576
EVIDENCE_SHARE = 0.1
"""Share of a token's pixels that must lie in an evidence box for the token to be evidence."""
_ROWS = 256


@dataclass(frozen=True, slots=True)
class Kept:
    """What a compressor did with one image.

    Attributes:
        kept: bool ``[V]``.
        score: ``[V]``, larger is more important.
    """

    kept: Bools
    score: Floats


def jaccard(first: Bools, second: Bools) -> float:
    """Intersection ÷ union of two kept sets; 1 if both are empty."""
    union = int((first | second).sum())
    return 1.0 if union == 0 else int((first & second).sum()) / union


def ranks(values: Floats) -> Floats:
    """Ranks from 1, ties share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray(((last - counts + 1 + last) / 2)[inverse], dtype=np.float64)


def spearman(first: Floats, second: Floats) -> float | None:
    """Rank correlation in [−1, 1]; None if one of them is constant."""
    a, b = ranks(first), ranks(second)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return None if scale == 0 else float(np.clip((a * b).sum() / scale, -1, 1))


def kendall(first: Floats, second: Floats) -> float | None:
    """Kendall's τ-b in [−1, 1]; None if one of them is constant."""
    agreement = moved_first = moved_second = 0
    for start in range(0, len(first), _ROWS):
        rows = slice(start, start + _ROWS)
        a = np.sign(first[rows, None] - first[None]).astype(np.int8)
        b = np.sign(second[rows, None] - second[None]).astype(np.int8)
        agreement += int((a * b).sum(dtype=np.int64))
        moved_first += int(np.count_nonzero(a))
        moved_second += int(np.count_nonzero(b))
    scale = float(np.sqrt(float(moved_first) * float(moved_second)))
    return None if scale == 0 else float(np.clip(agreement / scale, -1, 1))


def top(score: Floats, *, bottom: bool = False) -> Bools:
    """The most (or least) important tokens, `TOP_SHARE` of them and at least one."""
    count = max(1, round(TOP_SHARE * len(score)))
    order = np.argsort(score if bottom else -score, kind="stable")
    found = np.zeros(len(score), dtype=bool)
    found[order[:count]] = True
    return found


def share(of: Bools, among: Bools) -> float | None:
    """Share of the tokens `of` that are `among`; None if there are none."""
    count = int(of.sum())
    return None if count == 0 else int((of & among).sum()) / count


def compare(clean: Kept, attacked: Kept, places: Places, evidence: Bools | None) -> Tokens:
    """Put two passes of one sample side by side.

    Args:
        clean: of the clean image.
        attacked: of the attacked one.
        places: of the visual tokens.
        evidence: bool ``[V]``, tokens that show what the question asks about; None if unknown.
    """
    moves = np.ptp(clean.score) > 0 and np.ptp(attacked.score) > 0
    high = top(attacked.score)
    known = evidence is not None and bool(evidence.any())
    return Tokens(
        grid=places.grid,
        boxes=None if places.plain else places.boxes.round(2).tolist(),
        kept_clean=np.flatnonzero(clean.kept).tolist(),
        kept_attacked=np.flatnonzero(attacked.kept).tolist(),
        jaccard=jaccard(clean.kept, attacked.kept),
        spearman=spearman(clean.score, attacked.score),
        kendall=kendall(clean.score, attacked.score),
        top_preserved=share(top(clean.score), high) if moves else None,
        bottom_infiltrated=share(top(clean.score, bottom=True), high) if moves else None,
        evidence=np.flatnonzero(evidence).tolist() if known and evidence is not None else None,
        evidence_kept_clean=share(evidence, clean.kept) if evidence is not None else None,
        evidence_kept_attacked=share(evidence, attacked.kept) if evidence is not None else None,
    )


def judge(*, recovered: bool, reproduced: bool) -> Diagnosis:
    """The cause of a compression-specific failure, by the swap test.

    Args:
        recovered: the attacked image answers right with the clean kept set.
        reproduced: the clean image fails with the attacked kept set.
    """
    if recovered:
        return Diagnosis.RANKING if reproduced else Diagnosis.RANKING_PARTIAL
    return Diagnosis.MIXED if reproduced else Diagnosis.CONTENT


@dataclass(frozen=True, slots=True)
class Places:
    """Where the visual tokens of a picture lie.

    Attributes:
        boxes: float ``[V, 4]``, top, left, bottom, right in pixels; may reach beyond the picture.
        grid: rows and columns of the tile that shows the whole picture.
        size: height and width of the picture.
    """

    boxes: npt.NDArray[np.float64]
    grid: tuple[int, int]
    size: tuple[int, int]

    @property
    def plain(self) -> bool:
        """Whether the tokens are the cells of one grid over the whole picture, row by row."""
        rows, columns = self.grid
        if len(self.boxes) != rows * columns:
            return False
        row, column = np.divmod(np.arange(rows * columns), columns)
        steps = np.array([self.size[0] / rows, self.size[1] / columns] * 2)
        wanted = np.stack([row, column, row + 1, column + 1], 1) * steps
        return bool(np.allclose(self.boxes, wanted, atol=1e-6))


def evidence_tokens(places: Places, boxes: tuple[Box, ...]) -> Bools:
    """Tokens of whose pixels at least `EVIDENCE_SHARE` lie in a box: bool ``[V]``.

    Pixels are those of the picture whose centres a token's box holds.

    Args:
        places: of the tokens.
        boxes: of the evidence, in pixels of the same picture.
    """
    inside = np.zeros(places.size, dtype=np.int64)
    for x0, y0, x1, y1 in boxes:
        inside[y0:y1, x0:x1] = 1
    # Summed over all pixels above and to the left, any box costs four look-ups.
    table = np.pad(inside.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    edges = np.ceil(places.boxes - 0.5).astype(np.int64)
    top, bottom = (edges[:, i].clip(0, places.size[0]) for i in (0, 2))
    left, right = (edges[:, i].clip(0, places.size[1]) for i in (1, 3))
    hit = table[bottom, right] - table[top, right] - table[bottom, left] + table[top, left]
    area = (bottom - top) * (right - left)
    return np.asarray((hit > 0) & (hit >= EVIDENCE_SHARE * area))
