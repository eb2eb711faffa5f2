"""What a gate says of a cell: the value with its denominator, both bounds, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reports.bounds import Bounds
from reports.records import GateSpec
from reports.registry import METRICS
from reports.text import count, number, plain


@dataclass(frozen=True, slots=True)
class Found:
    """A metric in a cell, as a gate sees it.

    Attributes:
        gate: which looks at it.
        bounds: of the metric or its change; None if there are none.
        low: lower bound at the gate's confidence, as written.
        high: upper bound.
        p: one-sided p-value against "within the limits".
        p_holm: the same, corrected for the family.
        size: decisions of the family.
    """

    gate: GateSpec
    bounds: Bounds | None
    low: float | None
    high: float | None
    p: float
    p_holm: float
    size: int

    def within(self) -> str:
        """Why it passes."""
        least, most = self.gate.limits
        if least is not None and most is not None:
            return f"both are within the limits {least:g} and {most:g}"
        if most is not None:
            return f"the upper one is within the limit {most:g}"
        return f"the lower one is within the limit {least:g}"

    def beyond(self) -> str:
        """Why it fails."""
        corrected = f", {p_text(self.p_holm)} as one of {self.size} decisions"
        return f"{self._side()} ({p_text(self.p)}{corrected if self.size > 1 else ''})"

    def only_alone(self) -> str:
        """Why it does not fail though its bound is beyond the limit."""
        if self.size == 1:  # the other limit of the same gate has the other half of the risk
            return f"{self._side()}, but not if either limit may be broken ({p_text(self.p_holm)})"
        return (
            f"{self._side()} taken alone ({p_text(self.p)}), but not as one of {self.size} "
            f"decisions ({p_text(self.p_holm)} by Holm), so more samples decide"
        )

    def between(self) -> str:
        """Why it cannot be decided."""
        least, most = self.gate.limits
        over = most is not None and (self.high or 0.0) > most
        return f"the limit {most if over else least:g} lies between them, so more samples decide"

    def _side(self) -> str:
        least, most = self.gate.limits
        if most is not None and self.low is not None and self.low > most:
            return f"the lower one is above the limit {most:g}"
        return f"the upper one is below the limit {least:g}"


def p_text(p: float) -> str:
    """``p = 0.012``, ``p < 0.0001``."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def title(metric: str) -> str:
    """A metric's name for people."""
    return METRICS[metric].title if metric in METRICS else plain(metric)


def no_bounds(gate: GateSpec, bounds: Bounds | None) -> str:
    """Why there is nothing to decide from."""
    if gate.metric not in METRICS:
        return f"there is no metric {plain(gate.metric)!r}"
    if bounds is not None and bounds.value is None:
        return f"{title(gate.metric)} is not applicable: its denominator is empty"
    return f"{title(gate.metric)} has no bounds here, and a point cannot gate"


def shown(found: Found) -> str:
    """``CSFR is 0.120 (12 of 100), one-sided 95% bounds 0.071 and 0.187``."""
    bounds = found.bounds
    if bounds is None:
        return title(found.gate.metric)
    of = f"n = {bounds.n:,}" if bounds.events is None else f"{bounds.events:,} of {bounds.n:,}"
    value = number(bounds.value)
    return f"{title(found.gate.metric)} is {value} ({of}{_worth(bounds)}), {_bounds(found)}"


def compared(found: Found, change: Mapping[str, int]) -> str:
    """``CSFR rose by 0.050 (17 of 100 samples now, 12 before: 7 newly, 2 no longer), …``."""
    bounds = found.bounds
    if bounds is None or bounds.value is None:
        return title(found.gate.metric)
    of = f"n = {bounds.n:,} in both runs"
    if change:
        of = (
            f"{change['now']:,} of {count(bounds.n, 'sample')} now, {change['before']:,} of the "
            f"same before: {change['newly']:,} newly, {change['no_longer']:,} no longer"
        )
    verb = "fell" if bounds.value < 0 else "rose"
    by = number(abs(bounds.value))
    return f"{title(found.gate.metric)} {verb} by {by} ({of}{_worth(bounds)}), {_bounds(found)}"


def _worth(bounds: Bounds) -> str:
    if bounds.effective_n is None or round(bounds.effective_n) >= bounds.n:
        return ""
    return f", worth {bounds.effective_n:,.0f} independent ones because samples share images"


def _bounds(found: Found) -> str:
    of = " of the rise" if found.gate.compares else ""
    return (
        f"one-sided {found.gate.confidence * 100:g}% bounds{of} {number(found.low)} and "
        f"{number(found.high)}"
    )
