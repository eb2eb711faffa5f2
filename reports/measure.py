"""The metrics of one cell: each is computed here, once, and nowhere else.

Definitions are in `reports.registry` and docs/metrics.md. Errors are no outcomes: they enter no
metric and are counted apart. An empty denominator gives null, never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from sys import intern
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reports.records import Demands, Detection, Diagnosis, Draws, Trial
from reports.registry import METRICS
from reports.statistics import (
    EMPTY,
    Estimate,
    cluster_bootstrap,
    cluster_mean,
    unseen,
    wilson,
)

CONFIDENCE = 0.95
"""Of the intervals in summary.json; a gate states its own."""

RESAMPLED: Final = ("clean_drop", "upr", "cae", "csg", "amplification")
"""Differences and ratios of accuracies, in the order of `from_counts`."""
MEANS: Final[dict[str, tuple[float, float] | None]] = {
    "jaccard": (0, 1),
    "spearman": (-1, 1),
    "kendall": (-1, 1),
    "top_preserved": (0, 1),
    "bottom_infiltrated": (0, 1),
    "evidence_kept_clean": (0, 1),
    "evidence_kept_attacked": (0, 1),
    "l2": None,
    "psnr": None,
    "tokens_clean": None,
    "tokens_attacked": None,
    "tokens_growth": None,
    "length_full_clean": None,
    "length_full_attacked": None,
    "length_full_growth": None,
    "length_compressed_clean": None,
    "length_compressed_attacked": None,
    "length_compressed_growth": None,
    "fallback_clean": (0, 1),
    "fallback_attacked": (0, 1),
}
"""Metrics that are means over samples, with the range of one value; None if it has none."""
_MEAN_PLACE: Final = {name: index for index, name in enumerate(MEANS)}


class Row(NamedTuple):
    """What the metrics need of one trial; small, so that 100,000 fit in memory."""

    image: str
    kind: str
    error: bool
    full_clean: bool
    compressed_clean: bool
    full_attacked: bool
    compressed_attacked: bool
    recovered: bool | None
    reproduced: bool | None
    diagnosis: Diagnosis | None
    linf: float | None
    means: tuple[float | None, ...]
    """Values of the `mean` metrics, in the order of `MEANS`."""
    sample: str = ""
    codes: tuple[str, ...] = ()
    """Of the self-checks that fired."""
    pipelines: tuple[str, str] = ("", "")
    """Hashes of what was attacked and of what is deployed; see `records.Pipelines`."""
    seconds: tuple[float, ...] = ()
    """Of the four answers; empty if unknown."""
    traced: bool = False
    """The attack left a trace of its loss."""
    judged: bool = False
    """The loss of the image that was kept is recorded."""
    believed: bool | None = None
    """Whether the attack took it for a break of the compressed answer; None if it cannot tell."""
    unstable: float | None = None
    """How the attack's loss jumps around the clean image, see `records.Objective`."""
    saved: bool = False
    """The attacked image is in the run folder."""
    fallbacks: tuple[bool, bool] = (False, False)
    """Whether the clean and the attacked image were given more tokens than the compressor keeps."""
    watched: bool = False
    """A detector has scored both images."""
    alarms: tuple[bool, bool] | None = None
    """Whether a detector flags the clean and the attacked image, at 5 % false positives."""
    watching: float = 0.0
    """Seconds in which a detector scores one image."""
    draws: Draws | None = None
    """What became of it under several draws; None under one."""
    retention: float | None = None
    """Share of the visual tokens that compression left of the clean image."""

    @property
    def failure(self) -> bool:
        """Compression-specific failure."""
        return (
            self.full_clean
            and self.compressed_clean
            and self.full_attacked
            and not self.compressed_attacked
        )


def mean_value(row: Row, name: str) -> float | None:
    """What a row adds to a metric that is a mean."""
    return row.means[_MEAN_PLACE[name]]


_PATHS: Final = ("clean_full", "clean_compressed", "attacked_full", "attacked_compressed")
_right = attrgetter(*(f"{path}.correct" for path in _PATHS))
_seconds_of = attrgetter(*(f"{path}.seconds" for path in _PATHS))
_WRONG: Final = (False,) * len(_PATHS)


def row_of(trial: Trial) -> Row:
    """Take from a trial what the metrics need."""
    a, swap, distance, demands = trial.answers, trial.swap, trial.distance, trial.demands
    right = _WRONG if a is None else _right(a)
    return Row(
        # Every cell has the same samples: one string for all of them.
        image=intern(trial.image),
        kind=intern(trial.kind),
        error=a is None,
        full_clean=right[0],
        compressed_clean=right[1],
        full_attacked=right[2],
        compressed_attacked=right[3],
        recovered=swap.recovered if swap else None,
        reproduced=swap.reproduced if swap else None,
        diagnosis=swap.diagnosis if swap else None,
        linf=distance.linf if distance else None,
        means=_mean_values(trial),
        sample=intern(trial.sample),
        codes=tuple([check.partition(":")[0] for check in trial.checks]),
        pipelines=_pipelines(trial),
        seconds=() if demands is None else _seconds_of(demands),
        traced=len(trial.loss) > 1,
        judged=trial.objective is not None and trial.objective.kept is not None,
        believed=None if trial.objective is None else trial.objective.believed,
        unstable=None if trial.objective is None else trial.objective.unstable,
        saved=trial.attacked_png is not None,
        watched=trial.detection is not None,
        fallbacks=_fallbacks(demands),
        alarms=_alarms(trial.detection),
        watching=0.0 if trial.detection is None else trial.detection.seconds,
        draws=trial.draws,
        retention=_retention(trial),
    )


def _pipelines(trial: Trial) -> tuple[str, str]:
    found = trial.pipelines
    return ("", "") if found is None else (intern(found.attacked), intern(found.deployed))


def _fallbacks(found: Demands | None) -> tuple[bool, bool]:
    if found is None:
        return (False, False)
    return found.clean_compressed.fallback, found.attacked_compressed.fallback


def _alarms(found: Detection | None) -> tuple[bool, bool] | None:
    if found is None or found.limit is None:
        return None
    return found.clean > found.limit, found.attacked > found.limit


def _retention(trial: Trial) -> float | None:
    """Visual tokens that compression left of the clean image ÷ all of them; None if unknown."""
    if trial.demands is not None and trial.demands.clean_full.tokens:
        return trial.demands.clean_compressed.tokens / trial.demands.clean_full.tokens
    if trial.tokens is None:
        return None
    rows, columns = trial.tokens.grid
    every = rows * columns if trial.tokens.boxes is None else len(trial.tokens.boxes)
    return len(trial.tokens.kept_clean) / every if every else None


_TOKEN_MEANS: Final = (
    "jaccard", "spearman", "kendall", "top_preserved", "bottom_infiltrated",
    "evidence_kept_clean", "evidence_kept_attacked",
)  # fmt: skip
_DISTANCE_MEANS: Final = ("l2", "psnr")
_of_tokens, _of_distance = attrgetter(*_TOKEN_MEANS), attrgetter(*_DISTANCE_MEANS)
_NO_TOKENS: Final = (None,) * len(_TOKEN_MEANS)
_NO_DISTANCE: Final = (None,) * len(_DISTANCE_MEANS)
_NO_DEMANDS: Final = (None,) * (len(MEANS) - len(_TOKEN_MEANS) - len(_DISTANCE_MEANS))


def _mean_values(trial: Trial) -> tuple[float | None, ...]:
    """The values of a trial that metrics are means of, in the order of `MEANS`."""
    return (
        *(_NO_TOKENS if trial.tokens is None else _of_tokens(trial.tokens)),
        *(_NO_DISTANCE if trial.distance is None else _of_distance(trial.distance)),
        *(_NO_DEMANDS if trial.demands is None else _of_demands(trial.demands)),
    )


def _of_demands(found: Demands) -> tuple[float | None, ...]:
    clean, hit = found.clean_compressed, found.attacked_compressed
    return (
        *_grown(clean.tokens, hit.tokens),
        *_grown(found.clean_full.generated, found.attacked_full.generated),
        *_grown(clean.generated, hit.generated),
        float(clean.fallback),
        float(hit.fallback),
    )


def _grown(clean: int, attacked: int) -> tuple[float | None, ...]:
    return clean, attacked, attacked / clean if clean else None


_Test = Callable[[Row], bool | None]

PROPORTIONS: Final[dict[str, tuple[_Test, _Test]]] = {
    # name: (event, denominator); the event is only asked of rows in the denominator
    "acc_full_clean": (lambda r: r.full_clean, lambda r: True),
    "acc_compressed_clean": (lambda r: r.compressed_clean, lambda r: True),
    "acc_full_attacked": (lambda r: r.full_attacked, lambda r: True),
    "acc_compressed_attacked": (lambda r: r.compressed_attacked, lambda r: True),
    "csfr": (lambda r: r.failure, lambda r: r.full_clean and r.compressed_clean),
    "cbr": (
        lambda r: r.failure,
        lambda r: r.full_clean and r.compressed_clean and r.full_attacked,
    ),
    "full_asr": (lambda r: not r.full_attacked, lambda r: r.full_clean),
    "compressed_asr": (lambda r: not r.compressed_attacked, lambda r: r.compressed_clean),
    "recovered": (lambda r: r.recovered, lambda r: r.failure and r.recovered is not None),
    "reproduced": (lambda r: r.reproduced, lambda r: r.failure and r.reproduced is not None),
}
"""Metrics that are rates: what is counted, and of which rows."""
OUTCOMES = (*list(PROPORTIONS)[:8], *RESAMPLED)
"""Metrics also given by kind of question."""


def measure(
    rows: Sequence[Row],
    *,
    seed: int,
    confidence: float = CONFIDENCE,
    names: Iterable[str] = METRICS,
) -> dict[str, Estimate]:
    """Compute metrics over the rows of one cell.

    Args:
        rows: trials of one cell, errors included (they are left out here).
        seed: of the bootstrap.
        confidence: two-sided, of every interval.
        names: which metrics; default all.

    Returns:
        Estimates by name, in the order of the registry.
    """
    wanted, measured = set(names), [row for row in rows if not row.error]
    found: dict[str, Estimate] = {}
    for name in wanted & PROPORTIONS.keys():
        event, eligible = PROPORTIONS[name]
        hits = [bool(event(row)) for row in measured if eligible(row)]
        found[name] = wilson(sum(hits), len(hits), confidence)
    if wanted.intersection(RESAMPLED):
        found |= _bootstrapped(measured, seed, confidence)
    found |= _averaged(measured, wanted, confidence)
    if "linf" in wanted:
        sizes = [row.linf for row in measured if row.linf is not None]
        found["linf"] = Estimate(max(sizes), None, None, len(sizes)) if sizes else EMPTY
    return {name: found[name] for name in METRICS if name in wanted}


def _averaged(rows: Sequence[Row], wanted: set[str], confidence: float) -> dict[str, Estimate]:
    """Metrics that are means, each over the rows that have a value of it."""
    found: dict[str, Estimate] = {}
    place = _places(rows)
    images = np.array([place[row.image] for row in rows], dtype=np.int64)
    columns = list(zip(*(row.means for row in rows), strict=True)) or [()] * len(MEANS)
    for name in wanted & MEANS.keys():
        values, of = columns[_MEAN_PLACE[name]], images
        if None in values:
            of = images[[value is not None for value in values]]
        having = [value for value in values if value is not None]
        found[name] = cluster_mean(having, of, confidence=confidence, bounds=MEANS[name])
    return found


def _places(rows: Sequence[Row]) -> dict[str, int]:
    """The images, sorted and numbered."""
    return {image: index for index, image in enumerate(sorted({row.image for row in rows}))}


def _bootstrapped(rows: Sequence[Row], seed: int, confidence: float) -> dict[str, Estimate]:
    if not rows:
        return dict.fromkeys(RESAMPLED, EMPTY)
    table = by_image(rows)
    value, low, high = cluster_bootstrap(table, from_counts, seed=seed, confidence=confidence)
    bases = denominators(table)
    estimates: dict[str, Estimate] = {}
    for index, name in enumerate(RESAMPLED):
        if np.isnan(value[index]):
            estimates[name] = EMPTY
            continue
        n, images = bases[name]
        floor = unseen(images, confidence)
        point = float(value[index])
        ends = min(float(low[index]), point - floor), max(float(high[index]), point + floor)
        least, most = RANGES[name]
        estimates[name] = Estimate(point, max(least, ends[0]), min(most, ends[1]), n)
    return estimates


def denominators(table: NDArray[np.int64]) -> dict[str, tuple[int, int]]:
    """Samples and images that each of `RESAMPLED` is over.

    All for a drop, those with c or c_K for a ratio, the smaller of both for CSG.

    Args:
        table: see `by_image`.
    """
    every, full, compressed = (
        (int(table[:, column].sum()), int((table[:, column] > 0).sum())) for column in (0, 1, 2)
    )
    smaller = compressed if full[0] > compressed[0] else full
    return dict(zip(RESAMPLED, (every, full, compressed, smaller, every), strict=True))


RANGES: Final[dict[str, tuple[float, float]]] = {
    "clean_drop": (-1, 1),
    "upr": (0, float("inf")),  # above 1 when the attack mends more answers than it breaks
    "cae": (float("-inf"), 1),
    "csg": (float("-inf"), float("inf")),
    "amplification": (-2, 2),
}
"""Least and most of each of `RESAMPLED`."""


def by_image(rows: Sequence[Row]) -> NDArray[np.int64]:
    """Sum (n, c, c_K, c', c'_K) over the questions of each image: ``[C, 5]``, images sorted."""
    place = _places(rows)
    table = np.zeros((len(place), 5), dtype=np.int64)
    counts = np.array([(1, *row[3:7]) for row in rows], dtype=np.int64)
    np.add.at(table, [place[row.image] for row in rows], counts)
    return table


def from_counts(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """`RESAMPLED` from sums of (n, c, c_K, c', c'_K), ``[R, 5]`` to ``[R, 5]``."""
    n, c, c_k, c_adv, c_k_adv = sums.T
    with np.errstate(divide="ignore", invalid="ignore"):
        upr = np.where(c > 0, c_adv / c, np.nan)
        cae = np.where(c_k > 0, 1 - c_k_adv / c_k, np.nan)
    drop, amplified = (c - c_k) / n, ((c_k - c_k_adv) - (c - c_adv)) / n
    return np.stack([drop, upr, cae, upr + cae - 1, amplified], axis=1)
