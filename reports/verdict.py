"""The words of a decision. Standard library only, so that a command line can start fast."""

from __future__ import annotations

from enum import IntEnum, StrEnum


class ExitCode(IntEnum):
    """What `redteam` returns to the shell."""

    PASS = 0
    """Every gate passed, or the scenario has none."""
    FAIL = 1
    """At least one gate failed."""
    USAGE = 2
    """The command line or the scenario is invalid; nothing ran."""
    INCOMPLETE = 3
    """Trials are missing or none could be measured, or redteam itself failed."""
    INCONCLUSIVE = 4
    """No gate failed, but at least one could not be decided: too few samples, or unmeasured."""
    NOTHING_SELECTED = 5
    """The plan was empty: no cell or no sample."""
    INTERRUPTED = 130
    """Stopped by the user; run again to resume."""


class Inconclusive(StrEnum):
    """What the shell gets for an inconclusive verdict; the record says inconclusive whatever."""

    FAIL = "fail"
    """Exit code 1."""
    WARN = "warn"
    """Exit code 0 and a warning, where only samples are missing."""
    PASS = "pass"
    """Exit code 0, where only samples are missing."""


def shell_code(
    code: ExitCode, policy: Inconclusive | None, *, more_samples_decide: bool
) -> ExitCode:
    """The exit code under a policy.

    Args:
        code: of the run.
        policy: None leaves INCONCLUSIVE as it is.
        more_samples_decide: whether nothing but more samples is missing. Else neither `warn` nor
            `pass` helps: what was not measured, or is in doubt, never passes.
    """
    if code is not ExitCode.INCONCLUSIVE or policy is None:
        return code
    if policy is Inconclusive.FAIL:
        return ExitCode.FAIL
    return ExitCode.PASS if more_samples_decide else code


class Verdict(StrEnum):
    """Outcome of one cell under one gate, of one gate, or of a run."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    NOT_GATED = "not_gated"
    """The scenario states no gate, so nothing was decided (runs only)."""

    @property
    def severity(self) -> int:
        """Larger is worse; the worst of several decides."""
        return {"not_gated": 0, "pass": 1, "inconclusive": 2, "fail": 3}[self.value]
