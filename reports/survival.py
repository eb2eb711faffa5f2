"""What a search for minimal epsilons found: how many samples hold at each budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reports.measure import CONFIDENCE, Row
from reports.records import Cell
from reports.statistics import Estimate, wilson

SEARCH = "minimal"
"""Type of the attack whose distance is a minimal epsilon."""

_GOALS: dict[str, tuple[Callable[[Row], bool], Callable[[Row], bool]]] = {
    # goal: (could be broken, was broken)
    "compression_only": (lambda r: r.full_clean and r.compressed_clean, lambda r: r.failure),
    "compressed": (lambda r: r.compressed_clean, lambda r: not r.compressed_attacked),
    "full": (lambda r: r.full_clean, lambda r: not r.full_attacked),
}


def minimal_epsilon(cell: Cell, rows: Sequence[Row]) -> dict[str, Any]:
    """Median and survival curve of a cell of `minimal`, as summary.json has them; {} of others.

    A sample that holds at the whole budget is censored there. All are censored at the same place,
    so the share that holds (Kaplan–Meier) is a plain proportion, with a Wilson interval. The
    median is the smallest budget at which no more than half hold; its interval is where the
    interval of the curve crosses one half. Either may lie beyond the budget: null.

    Args:
        cell: of any attack.
        rows: its trials.
    """
    options = cell.spec.get("attack")
    if not isinstance(options, Mapping) or options.get("type") != SEARCH:
        return {}
    able, broke = _GOALS[options.get("goal", "compression_only")]
    eligible = [row for row in rows if not row.error and able(row)]
    found = sorted(row.linf for row in eligible if broke(row) and row.linf is not None)
    curve = [
        (level, wilson(len(eligible) - sum(one <= level for one in found), len(eligible)))
        for level in dict.fromkeys(found)
    ]
    return {
        "minimal_epsilon": {
            "confidence": CONFIDENCE,
            "n": len(eligible),
            "broken": len(found),
            "held": len(eligible) - len(found),
            "median": _crossing(curve, lambda one: one.value),
            "low": _crossing(curve, lambda one: one.low),
            "high": _crossing(curve, lambda one: one.high),
            "curve": [
                {"epsilon": round(level, 6), "holding": holding.as_json()}
                for level, holding in curve
            ],
        }
    }


def _crossing(
    curve: Sequence[tuple[float, Estimate]], end: Callable[[Estimate], float | None]
) -> float | None:
    """The smallest budget at which no more than half hold; None if none is."""
    for level, holding in curve:
        share = end(holding)
        if share is not None and share <= 0.5:
            return round(level, 6)
    return None
