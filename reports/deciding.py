"""How gates are decided: from one-sided bounds, never from a point, all gates of a run together.

A cell PASSES where the bound that could be beyond the limit is within it, FAILS where the opposite
bound is beyond it and stays so after Holm's correction over the family, and is INCONCLUSIVE
otherwise. What could not be measured never passes, nor does a cell whose attack carries a
self-check or whose defence is unverified.

Only FAIL needs a correction. A run passes where *every* decision does, so a run with one cell
beyond its limit can only pass if that very cell passes wrongly, which happens with a probability of
at most 1 − confidence however many others there are (intersection–union test; R. L. Berger,
Technometrics 24, 1982). A run fails where *any* decision does, so there the chances add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from reports.bounds import Bounds
from reports.checks import of_clean
from reports.gate import (
    MORE_SAMPLES,
    Cause,
    CellDecision,
    GateDecision,
    Progress,
    Verdict,
    cell_label,
    covers,
)
from reports.gate_words import Found, compared, no_bounds, shown
from reports.multiplicity import holm
from reports.records import Cell, GateSpec
from reports.statistics import EMPTY, Estimate
from reports.text import number, plain

Doubts = Callable[[GateSpec, Cell], str | None]
"""Why a cell is no evidence for a gate that passes on it, if so; see `reports.checks`."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a gate has of a cell.

    Attributes:
        bounds: of the metric, or of its change; None if there are none.
        interval: two-sided, at the gate's confidence, for showing.
        objection: why there are no bounds; "" to say what is usual.
        cause: of that.
        change: of a rate compared with a baseline, samples: before, now, newly, no_longer.
        baseline: the run compared with: folder, name, scenario_hash, created.
    """

    bounds: Bounds | None = None
    interval: Estimate = EMPTY
    objection: str = ""
    cause: Cause = "unmeasured"
    change: dict[str, int] = field(default_factory=dict)
    baseline: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """What gates are decided on.

    Attributes:
        cells: all of the run, in order.
        measured: what a gate has of a cell.
        progress: how much of a cell was measured.
        doubts: why a pass on a cell would be no evidence; it turns a PASS into INCONCLUSIVE.
        name: names a cell for people.
        clean_drop: what compression alone costs in a cell, shown beside every decision.
    """

    cells: Sequence[Cell]
    measured: Callable[[GateSpec, Cell], Measured]
    progress: Callable[[Cell], Progress]
    doubts: Doubts = lambda gate, cell: None
    name: Callable[[Cell], str] = cell_label
    clean_drop: Callable[[Cell], Estimate] = lambda cell: EMPTY


@dataclass(frozen=True, slots=True)
class _Test:
    """One gate on one cell, before the others are known."""

    gate: GateSpec
    cell: Cell
    measured: Measured
    low: float | None
    high: float | None
    p: float

    @classmethod
    def of(cls, gate: GateSpec, cell: Cell, measured: Measured) -> _Test:
        bounds = measured.bounds
        if bounds is None or bounds.value is None:
            return cls(gate, cell, measured, None, None, 1.0)
        low, high = (_rounded(one(gate.confidence)) for one in (bounds.lower, bounds.upper))
        return cls(gate, cell, measured, low, high, _p_value(gate, bounds))


def _rounded(value: float | None) -> float | None:
    """To six decimals: what is written, decided on and shown is then one number."""
    return None if value is None or not math.isfinite(value) else round(value, 6) + 0.0


def _p_value(gate: GateSpec, bounds: Bounds) -> float:
    """Against "within the limits"; of two limits each has half of the risk."""
    least, most = gate.limits
    tails = [] if most is None else [bounds.p_above(most)]
    tails += [] if least is None else [bounds.p_below(least)]
    return min([1.0, *(len(tails) * tail for tail in tails)])


def decide(gates: Sequence[GateSpec], run: Run) -> list[GateDecision]:
    """Decide all gates of a run; of each its worst cell decides.

    Args:
        gates: as the scenario states them.
        run: what they are decided on.
    """
    tests = [
        [_Test.of(gate, cell, run.measured(gate, cell)) for cell in run.cells if covers(gate, cell)]
        for gate in gates
    ]
    sizes, corrected = _corrected([test for mine in tests for test in mine])
    decisions: list[GateDecision] = []
    for gate, mine in zip(gates, tests, strict=True):
        size = sizes.get(gate.family, 0)
        cells = [_decide_cell(test, corrected[id(test)], size, run) for test in mine]
        decisions.append(_decide_gate(gate, mine, cells, size))
    return decisions


def _corrected(tests: Sequence[_Test]) -> tuple[dict[str, int], dict[int, float]]:
    """Sizes of the families, and Holm's p-value of each test by its identity."""
    families: dict[str, list[_Test]] = {}
    for test in tests:
        families.setdefault(test.gate.family, []).append(test)
    corrected: dict[int, float] = {}
    for members in families.values():
        levels = [1 - test.gate.confidence for test in members]
        values = holm([test.p for test in members], levels)
        corrected |= {id(test): value for test, value in zip(members, values, strict=True)}
    return {name: len(members) for name, members in families.items()}, corrected


def _decide_cell(test: _Test, p_holm: float, size: int, run: Run) -> CellDecision:
    found = Found(test.gate, test.measured.bounds, test.low, test.high, test.p, p_holm, size)
    verdict, cause, reason = _compare(test, found)
    objection = run.progress(test.cell).objection()
    if objection and verdict is not Verdict.FAIL:  # an error may hide a pass, never excuse a fail
        verdict, cause, reason = Verdict.INCONCLUSIVE, "incomplete", objection
    doubt = (run.doubts(test.gate, test.cell) or "") if verdict is Verdict.PASS else ""
    if doubt:  # an attack that failed for the wrong reason shows no robustness
        verdict, cause, reason = Verdict.INCONCLUSIVE, "doubt", f"{reason}, but {doubt}"
    bounds, interval = test.measured.bounds, test.measured.interval.rounded()
    value = interval.value if bounds is None else _rounded(bounds.value)
    measured = bounds is not None and bounds.value is not None
    return CellDecision(
        cell=test.cell.id,
        label=run.name(test.cell),
        verdict=verdict,
        reason=reason,
        value=value,
        low=interval.low,
        high=interval.high,
        n=interval.n if bounds is None else bounds.n,
        doubt=doubt,
        cause=cause,
        bound_low=test.low,
        bound_high=test.high,
        events=None if bounds is None else bounds.events,
        effective_n=None if bounds is None else _rounded(bounds.effective_n),
        p=float(f"{test.p:.6g}") if measured else None,
        p_holm=float(f"{p_holm:.6g}") if measured else None,
        clean_drop=run.clean_drop(test.cell).as_json(),
        change=test.measured.change,
    )


def _compare(test: _Test, found: Found) -> tuple[Verdict, Cause, str]:
    gate, low, high = test.gate, test.low, test.high
    if found.bounds is None or low is None or high is None:
        why = test.measured.objection or no_bounds(gate, found.bounds)
        return Verdict.INCONCLUSIVE, test.measured.cause, why
    least, most = gate.limits
    if least is None and most is None:
        stated = "max_increase nor max_decrease" if gate.compares else "max nor min"
        return Verdict.INCONCLUSIVE, "unmeasured", f"the gate states neither {stated}"
    beyond = (most is not None and low > most) or (least is not None and high < least)
    within = (most is None or high <= most) and (least is None or low >= least)
    said = compared(found, test.measured.change) if gate.compares else shown(found)
    if beyond and found.p_holm <= 1 - gate.confidence:
        return Verdict.FAIL, "", f"{said}: {found.beyond()}"
    if beyond:
        return Verdict.INCONCLUSIVE, "multiplicity", f"{said}: {found.only_alone()}"
    if within:
        return Verdict.PASS, "", f"{said}: {found.within()}"
    return Verdict.INCONCLUSIVE, "samples", f"{said}: {found.between()}"


def _decide_gate(
    gate: GateSpec, tests: Sequence[_Test], cells: Sequence[CellDecision], size: int
) -> GateDecision:
    if cells:
        worst = max(cells, key=lambda one: _badness(gate, one))
        verdict = worst.verdict
        reason = f"{worst.label}: {worst.reason}.{_beside(gate, worst)}"
    else:
        where = ", ".join(f"{plain(k)} = {plain(str(v))}" for k, v in gate.where.items())
        verdict, reason = Verdict.INCONCLUSIVE, f"No cell matches where: {where or '(all)'}."
    open_ = [one for one in cells if one.verdict is Verdict.INCONCLUSIVE]
    return GateDecision(
        **gate.model_dump(),
        family_size=size,
        baseline_run=next((test.measured.baseline for test in tests if test.measured.baseline), {}),
        verdict=verdict,
        reason=reason,
        more_samples_decide=verdict is Verdict.INCONCLUSIVE
        and bool(open_)
        and all(one.cause in MORE_SAMPLES for one in open_),
        cells=list(cells),
    )


def _badness(gate: GateSpec, decided: CellDecision) -> tuple[int, bool, float]:
    """The worst verdict, then what more samples do not mend, then the least room left."""
    least, most = gate.limits
    if decided.bound_low is None or decided.bound_high is None:
        excess = math.inf
    else:
        above = decided.bound_high - most if most is not None else -math.inf
        below = least - decided.bound_low if least is not None else -math.inf
        excess = max(above, below)
    return decided.verdict.severity, decided.cause not in MORE_SAMPLES, excess


def _beside(gate: GateSpec, worst: CellDecision) -> str:
    """What compression alone costs, so that it is not read as an attack."""
    drop = worst.clean_drop.get("value")
    if drop is None or of_clean(gate):
        return ""
    return (
        f" Compression alone, without an attack, costs {number(drop)} of the accuracy on clean "
        f"images (n = {worst.clean_drop['n']:,})."
    )
