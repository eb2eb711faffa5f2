"""The verdict, made once: every reader (exit code, page, Markdown, terminal) shows this object.

A gate decides from an interval, never from a point: FAIL when the whole interval is beyond the
limit, PASS when the whole interval is within it, else INCONCLUSIVE. What could not be measured
never passes, nor does a cell whose attack carries a self-check (`reports.checks`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict, Field

from reports.marks import marked
from reports.records import Cell, GateSpec
from reports.registry import METRICS
from reports.statistics import EMPTY, Estimate
from reports.text import count, epsilon_text, number, plain
from reports.verdict import ExitCode, Verdict

__all__ = [
    "CellDecision",
    "Conclusion",
    "ExitCode",
    "GateDecision",
    "Progress",
    "Verdict",
    "cell_label",
    "conclude",
    "covers",
    "decide",
]

MAX_ERROR_SHARE = 0.05
"""A cell in which more than this share of the trials are errors cannot pass a gate."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class CellDecision(_Record):
    """One gate on one cell."""

    cell: str
    label: str
    """The cell in words: target, compression, attack, budget."""
    verdict: Verdict
    reason: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    doubt: str = ""
    """The self-check, or the unverified defence, that took a pass away, in words; "" if none."""


class GateDecision(_Record):
    """One gate, decided. Carries everything a reader needs, so that none computes anything."""

    name: str
    metric: str
    max: float | None = None
    min: float | None = None
    where: dict[str, str | float] = Field(default_factory=dict)
    confidence: float = 0.95
    allow_unverified: bool = False
    line: int | None = None
    verdict: Verdict
    reason: str
    """One sentence, the deciding cell and its interval included."""
    cells: list[CellDecision] = Field(default_factory=list)

    @property
    def limit(self) -> str:
        """The limit in words: ``csfr ≤ 0.10``."""
        parts = [f"≤ {self.max:g}" if self.max is not None else ""]
        parts.append(f"≥ {self.min:g}" if self.min is not None else "")
        return f"{self.metric} " + " and ".join(part for part in parts if part)


class Conclusion(_Record):
    """The verdict on a run."""

    verdict: Verdict
    exit_code: ExitCode
    headline: str
    """A few words."""
    why: str
    """One or two sentences."""


class Progress(_Record):
    """How much of a cell (or of a run) was measured."""

    expected: int
    measured: int
    errors: int

    @property
    def missing(self) -> int:
        """Trials that never ran."""
        return self.expected - self.measured - self.errors

    def objection(self) -> str | None:
        """Why this cannot pass a gate whatever its numbers say; None if it can."""
        if self.missing > 0:
            return f"{count(self.missing, 'trial')} of {self.expected:,} did not run"
        if self.expected and self.errors / self.expected > MAX_ERROR_SHARE:
            return (
                f"{self.errors:,} of {self.expected:,} trials are errors, more than the "
                f"{MAX_ERROR_SHARE:.0%} a pass tolerates"
            )
        return None


def cell_label(cell: Cell, badge: str = "") -> str:
    """Name a cell for people.

    Args:
        cell: of a run.
        badge: of its defence, which its label then carries a mark of.
    """
    shown = marked(cell.defense, badge)
    defense = f" · {shown}" if shown else ""
    return (
        f"{plain(cell.target)} · {plain(cell.compression)} · {plain(cell.attack)}"
        f"{defense} · ε {epsilon_text(cell.epsilon)}"
    )


def covers(gate: GateSpec, cell: Cell) -> bool:
    """Whether a gate's `where` selects a cell; an unknown key selects nothing."""
    for key, wanted in gate.where.items():
        actual = getattr(cell, key, None)
        if isinstance(actual, float) and isinstance(wanted, (int, float)):
            if abs(actual - wanted) > 1e-9:
                return False
        elif actual != wanted:
            return False
    return True


Doubts = Callable[[GateSpec, Cell], str | None]
"""Why a cell is no evidence for a gate that passes on it, if so; see `reports.checks`."""


def _no_doubt(gate: GateSpec, cell: Cell) -> str | None:
    del gate, cell
    return None


def decide_cell(
    gate: GateSpec,
    cell: Cell,
    estimate: Estimate | None,
    progress: Progress,
    doubts: Doubts = _no_doubt,
    name: Callable[[Cell], str] = cell_label,
) -> CellDecision:
    """Decide one gate on one cell from the interval of the metric."""
    estimate = estimate and estimate.rounded()
    verdict, reason = _compare(gate, estimate)
    objection = progress.objection()
    if objection and verdict is not Verdict.FAIL:  # an error may hide a pass, never excuse a fail
        verdict, reason = Verdict.INCONCLUSIVE, objection
    doubt = (doubts(gate, cell) or "") if verdict is Verdict.PASS else ""
    if doubt:  # an attack that failed for the wrong reason shows no robustness
        verdict, reason = Verdict.INCONCLUSIVE, f"{reason}, but {doubt}"
    found = estimate or EMPTY
    return CellDecision(
        cell=cell.id,
        label=name(cell),
        verdict=verdict,
        reason=reason,
        value=found.value,
        low=found.low,
        high=found.high,
        n=found.n,
        doubt=doubt,
    )


def _compare(gate: GateSpec, estimate: Estimate | None) -> tuple[Verdict, str]:
    if estimate is None:
        return Verdict.INCONCLUSIVE, f"there is no metric {plain(gate.metric)!r}"
    if estimate.value is None:
        return (
            Verdict.INCONCLUSIVE,
            f"{_title(gate.metric)} is not applicable: its denominator is empty",
        )
    low, high = estimate.low, estimate.high
    if low is None or high is None:
        return (
            Verdict.INCONCLUSIVE,
            f"{_title(gate.metric)} has no interval here, and a point cannot gate",
        )
    shown = (
        f"{_title(gate.metric)} is {number(estimate.value)}, {gate.confidence:.0%} interval "
        f"{number(low)} to {number(high)} (n = {estimate.n:,})"
    )
    if gate.max is not None and low > gate.max:
        return Verdict.FAIL, f"{shown}: all of it above the limit {gate.max:g}"
    if gate.min is not None and high < gate.min:
        return Verdict.FAIL, f"{shown}: all of it below the limit {gate.min:g}"
    if gate.max is None and gate.min is None:
        return Verdict.INCONCLUSIVE, "the gate states neither max nor min"
    within = (gate.max is None or high <= gate.max) and (gate.min is None or low >= gate.min)
    if within:
        return Verdict.PASS, f"{shown}: all of it within the limit"
    limit = gate.max if gate.max is not None and high > gate.max else gate.min
    return Verdict.INCONCLUSIVE, f"{shown}: the limit {limit:g} lies inside, so more samples decide"


def _excess(gate: GateSpec, decided: CellDecision) -> float:
    """How far the interval reaches beyond the limit; the less room is left, the larger."""
    if decided.low is None or decided.high is None:
        return math.inf
    above = decided.high - gate.max if gate.max is not None else -math.inf
    below = gate.min - decided.low if gate.min is not None else -math.inf
    return max(above, below)


def _title(metric: str) -> str:
    return METRICS[metric].title if metric in METRICS else plain(metric)


def decide(
    gate: GateSpec,
    cells: Sequence[Cell],
    measure: Callable[[Cell, str, float], Estimate | None],
    progress: Callable[[Cell], Progress],
    doubts: Doubts = _no_doubt,
    name: Callable[[Cell], str] = cell_label,
) -> GateDecision:
    """Decide one gate: its worst cell decides.

    Args:
        gate: as the scenario states it.
        cells: all cells of the run, in order.
        measure: estimate of (cell, metric, confidence), None for an unknown metric.
        progress: how much of a cell was measured.
        doubts: why a pass on a cell would be no evidence; it turns a PASS into INCONCLUSIVE.
        name: names a cell for people.
    """
    decided = [
        decide_cell(
            gate,
            cell,
            measure(cell, gate.metric, gate.confidence),
            progress(cell),
            doubts,
            name,
        )
        for cell in cells
        if covers(gate, cell)
    ]
    if decided:
        worst = max(decided, key=lambda one: (one.verdict.severity, _excess(gate, one)))
        verdict, reason = worst.verdict, f"{worst.label}: {worst.reason}."
    else:
        where = ", ".join(f"{plain(k)} = {plain(str(v))}" for k, v in gate.where.items())
        verdict, reason = Verdict.INCONCLUSIVE, f"No cell matches where: {where or '(all)'}."
    return GateDecision(**gate.model_dump(), verdict=verdict, reason=reason, cells=decided)


def conclude(decisions: Sequence[GateDecision], progress: Progress) -> Conclusion:
    """Turn the gates into the verdict on a run and its exit code.

    A gate that failed is a FAIL even in an incomplete run, but the exit code of an incomplete run
    is INCOMPLETE: its numbers are not final.
    """
    verdicts = [Verdict.NOT_GATED, *(decision.verdict for decision in decisions)]
    verdict = max(verdicts, key=lambda one: one.severity)
    headline, why, code = _words(decisions, verdict)
    if progress.expected == 0:
        code, headline = ExitCode.NOTHING_SELECTED, "Nothing was selected"
        why = "The plan holds no cell or no sample, so nothing was tested."
    elif progress.missing > 0:
        code, headline = ExitCode.INCOMPLETE, f"Incomplete — {headline[0].lower()}{headline[1:]}"
        why = (
            f"{count(progress.missing, 'trial')} of {progress.expected:,} did not run; "
            f"run the same command again to resume. {why}"
        )
    elif progress.measured == 0:
        code, headline = ExitCode.INCOMPLETE, "Nothing could be measured"
        why = f"All {progress.expected:,} trials ended in an error; see the list of errors."
    return Conclusion(verdict=verdict, exit_code=code, headline=headline, why=why)


def _words(decisions: Sequence[GateDecision], verdict: Verdict) -> tuple[str, str, ExitCode]:
    total, reasons = len(decisions), [d for d in decisions if d.verdict is verdict]
    if verdict is Verdict.NOT_GATED:
        why = "The scenario states no gates, so this run measures and does not decide."
        return "Not gated", why, ExitCode.PASS
    if verdict is Verdict.PASS:
        if total == 1:
            return "Pass", f"The one gate holds. {reasons[0].reason}", ExitCode.PASS
        why = f"All {total} gates hold, each with the whole of its interval."
        return "Pass", why, ExitCode.PASS
    share = f"{len(reasons)} of {count(total, 'gate')}"
    first = f"“{plain(reasons[0].name)}”: {reasons[0].reason}"
    if verdict is Verdict.FAIL:
        return "Fail", f"{share} failed. {first}", ExitCode.FAIL
    return "Inconclusive", f"{share} could not be decided. {first}", ExitCode.INCONCLUSIVE
