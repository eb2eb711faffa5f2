"""The verdict, made once: every reader (exit code, page, Markdown, terminal) shows these objects.

How a gate is decided is in `reports.deciding`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from reports.marks import marked
from reports.records import Cell, GateSpec
from reports.text import count, epsilon_text, plain
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
]

MAX_ERROR_SHARE = 0.05
"""A cell in which more than this share of the trials are errors cannot pass a gate."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


Cause = Literal["", "samples", "multiplicity", "unmeasured", "incomplete", "doubt", "baseline"]
"""Why a decision is inconclusive: too few samples; too few for so many decisions at once; nothing
to decide from; trials missing or in error; a self-check or an unverified defence; no baseline that
can be compared. "" of other verdicts."""

MORE_SAMPLES: frozenset[Cause] = frozenset({"samples", "multiplicity"})
"""Causes that say nothing bad about the run but that it is small."""


class Limits(Protocol):
    """What a gate allows; None where it says nothing."""

    @property
    def max(self) -> float | None: ...
    @property
    def min(self) -> float | None: ...
    @property
    def max_increase(self) -> float | None: ...
    @property
    def max_decrease(self) -> float | None: ...


def limit_words(gate: Limits) -> str:
    """What a gate allows in words: ``≤ 0.10``, ``rises by ≤ 0.02``."""
    words = (
        ("≤", gate.max),
        ("≥", gate.min),
        ("rises by ≤", gate.max_increase),
        ("falls by ≤", gate.max_decrease),
    )
    return " and ".join(f"{sign} {value:g}" for sign, value in words if value is not None)


class CellDecision(_Record):
    """One gate on one cell.

    `value` is the metric, or its change since the baseline. Fields with a default are absent in
    summaries from before they were recorded.
    """

    cell: str
    label: str
    """The cell in words: target, compression, attack, budget."""
    verdict: Verdict
    reason: str
    value: float | None
    low: float | None
    """Lower end of the two-sided interval at the gate's confidence, for showing."""
    high: float | None
    n: int
    doubt: str = ""
    """The self-check, or the unverified defence, that took a pass away, in words; "" if none."""
    cause: Cause = ""
    bound_low: float | None = None
    """One-sided lower bound at the gate's confidence: what FAIL of a `max` is decided from."""
    bound_high: float | None = None
    """One-sided upper bound: what PASS of a `max` is decided from."""
    events: int | None = None
    """Of a rate, how many of the n."""
    effective_n: float | None = None
    """Independent samples that would say as much, where several share an image."""
    p: float | None = None
    """One-sided p-value against "within the limit"."""
    p_holm: float | None = None
    """The same, corrected for all decisions of the family."""
    clean_drop: dict[str, float | int | None] = Field(default_factory=dict)
    """What compression alone costs on the clean images of the cell; no attack is in it."""
    change: dict[str, int] = Field(default_factory=dict)
    """Of a rate compared with a baseline, samples: before, now, newly, no_longer."""


class GateDecision(_Record):
    """One gate, decided. Carries everything a reader needs, so that none computes anything."""

    name: str
    metric: str
    max: float | None = None
    min: float | None = None
    where: dict[str, str | float] = Field(default_factory=dict)
    confidence: float = 0.95
    allow_unverified: bool = False
    family: str = ""
    family_size: int = 0
    """Decisions (gate and cell) the correction is for."""
    baseline: str = ""
    baseline_run: dict[str, str] = Field(default_factory=dict)
    """Of the run compared with: folder, name, scenario_hash, created."""
    max_increase: float | None = None
    max_decrease: float | None = None
    line: int | None = None
    verdict: Verdict
    reason: str
    """One sentence, the deciding cell and its interval included."""
    more_samples_decide: bool = False
    """Inconclusive, and only because there are too few samples."""
    cells: list[CellDecision] = Field(default_factory=list)

    @property
    def limit(self) -> str:
        """The limit in words: ``csfr ≤ 0.10``, ``csfr rises by ≤ 0.02``."""
        return f"{self.metric} {limit_words(self)}"


class Conclusion(_Record):
    """The verdict on a run."""

    verdict: Verdict
    exit_code: ExitCode
    headline: str
    """A few words."""
    why: str
    """One or two sentences."""
    more_samples_decide: bool = False
    """Every inconclusive gate is so only because there are too few samples."""


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
    open_ = [one for one in decisions if one.verdict is Verdict.INCONCLUSIVE]
    return Conclusion(
        verdict=verdict,
        exit_code=code,
        headline=headline,
        why=why,
        more_samples_decide=code is ExitCode.INCONCLUSIVE
        and all(one.more_samples_decide for one in open_),
    )


def _words(decisions: Sequence[GateDecision], verdict: Verdict) -> tuple[str, str, ExitCode]:
    total, reasons = len(decisions), [d for d in decisions if d.verdict is verdict]
    if verdict is Verdict.NOT_GATED:
        why = "The scenario states no gates, so this run measures and does not decide."
        return "Not gated", why, ExitCode.PASS
    if verdict is Verdict.PASS:
        if total == 1:
            return "Pass", f"The one gate holds. {reasons[0].reason}", ExitCode.PASS
        why = f"All {total} gates hold, each by the bound at its confidence."
        return "Pass", why, ExitCode.PASS
    share = f"{len(reasons)} of {count(total, 'gate')}"
    first = f"“{plain(reasons[0].name)}”: {reasons[0].reason}"
    if verdict is Verdict.FAIL:
        return "Fail", f"{share} failed. {first}", ExitCode.FAIL
    return "Inconclusive", f"{share} could not be decided. {first}", ExitCode.INCONCLUSIVE
