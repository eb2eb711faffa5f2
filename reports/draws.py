"""Random defences and compressors over several draws of the evaluation: the mean and the worst.

A trial is of one draw. Whoever is attacked again and again meets others, so beside the rate of one
draw stand what is to be expected of a draw and what happens in at least one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from reports.measure import Row
from reports.statistics import cluster_mean
from reports.terminal import Column, Table, as_table, of_cells
from reports.text import interval

CAPTION: Final = (
    "Random defences and compressors, asked under k independent draws of their own: what is to be "
    "expected of one draw (per sample the share of its draws, then the mean over samples; 95 % "
    "intervals by image, which more draws narrow only down to the spread between samples), and "
    "the worst over draws: samples on which it happens in at least one of the k. Draws in which "
    "the clean image was wrong already count for nothing."
)


def over_draws(rows: Iterable[Row]) -> dict[str, Any] | None:
    """Expectation and worst case over the draws of one cell; None where it has one draw.

    Returns:
        ``draws``, the least number of a sample, and for ``csfr`` and ``compressed_asr`` the
        estimates ``expected`` and ``worst``.
    """
    measured = [row for row in rows if not row.error and row.draws is not None]
    if not measured:
        return None
    events = {
        "csfr": [(one.failures, one.eligible) for row in measured if (one := row.draws)],
        "compressed_asr": [(one.broken, one.clean) for row in measured if (one := row.draws)],
    }
    images = [row.image for row in measured]
    found = {
        name: {
            "expected": _mean(pairs, images, lambda hit, of: hit / of),
            "worst": _mean(pairs, images, lambda hit, of: float(hit > 0)),
        }
        for name, pairs in events.items()
    }
    return {"draws": min(row.draws.count for row in measured if row.draws), **found}


def _mean(
    pairs: Sequence[tuple[int, int]],
    images: Sequence[str],
    value: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """Over the samples that have a draw in which it could happen."""
    able = [(value(hit, of), image) for (hit, of), image in zip(pairs, images, strict=True) if of]
    values, clusters = [one for one, _ in able], [image for _, image in able]
    return cluster_mean(values, clusters, bounds=(0, 1)).as_json()


def worst_attack(cells: Iterable[Mapping[str, Row]]) -> list[Row]:
    """Of each sample the row of the attack that is worst in the mean over its draws.

    Args:
        cells: rows by sample, of each attack.
    """
    found: dict[str, Row] = {}
    for cell in cells:
        for name, row in cell.items():
            if row.draws is not None and (name not in found or _rate(row) > _rate(found[name])):
                found[name] = row
    return list(found.values())


def _rate(row: Row) -> float:
    return row.draws.failures / row.draws.eligible if row.draws and row.draws.eligible else 0.0


def drawn_text(found: Mapping[str, Any], name: str = "csfr") -> str:
    """``0.31 [0.22, 0.40], worst of 10: 0.52 [0.43, 0.61]``."""
    one = found[name]
    worst = interval(one["worst"], 2)
    return f"{interval(one['expected'], 2)}, worst of {found['draws']}: {worst}"


def table(summary: Mapping[str, Any]) -> Table | None:
    """One row per cell that was asked under several draws; None without any."""
    cells = [cell for cell in summary["cells"] if cell.get("draws")]
    if not cells:
        return None
    columns: list[Column] = [
        *of_cells(cells),
        ("k", True, [str(cell["draws"]["draws"]) for cell in cells]),
    ]
    for title, name in (("CSFR", "csfr"), ("ASR, compressed", "compressed_asr")):
        one = [interval(cell["metrics"][name], 2) for cell in cells]
        columns.append((f"{title}, one draw", True, one))
        for what, key in (("expected", "expected"), ("worst of k", "worst")):
            values = [interval(cell["draws"][name][key], 2) for cell in cells]
            columns.append((f"{title}, {what}", True, values))
    return as_table(one for one in columns if one[0] != "target" or len(set(one[2])) > 1)
