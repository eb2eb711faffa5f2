"""Errors of the tool itself: what, where, the value, what is allowed, what to do.

A `RedteamError` is the user's to mend, so the command line prints its message without a traceback.
Standard library only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reports.verdict import ExitCode


class RedteamError(Exception):
    """Something the user can mend; `exit_code` is what the shell gets."""

    exit_code: ExitCode = ExitCode.USAGE


class UsageError(RedteamError):
    """An option of the command line is wrong."""


class CatalogError(RedteamError):
    """A name is not in the catalogue, or what it names cannot be used."""


class DatasetError(RedteamError):
    """A data set cannot be read."""


class PlanError(RedteamError):
    """A scenario is well-formed, but what it asks for does not fit together."""


class EngineError(RedteamError):
    """What carries a run out went away; what was measured is safe."""

    exit_code = ExitCode.INCOMPLETE


class InstallationError(RedteamError):
    """The installation is broken, or another package shadows one of ours."""

    exit_code = ExitCode.INCOMPLETE


class NothingSelected(RedteamError):
    """There is no sample to run on."""

    exit_code = ExitCode.NOTHING_SELECTED


class InterruptedRun(RedteamError):
    """The user stopped the run."""

    exit_code = ExitCode.INTERRUPTED


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a scenario.

    Attributes:
        place: ``file:line:column``, or the command-line option.
        key: path of the key, such as ``attacks[1].steps``; "" for the whole file.
        message: what is wrong, the value included.
        allowed: what may stand there; "" where the message says so.
        hint: what to do, such as the nearest known name; "" for none.
    """

    place: str
    key: str
    message: str
    allowed: str = ""
    hint: str = ""

    def __str__(self) -> str:
        parts = [f"{self.place}: {self.key + ': ' if self.key else ''}{self.message}"]
        parts += [f"allowed: {self.allowed}"] if self.allowed else []
        parts += [self.hint] if self.hint else []
        return "; ".join(parts)


class ScenarioError(RedteamError):
    """A scenario is invalid.

    Attributes:
        problems: everything that was found, in the order of the file.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        heading = f"the scenario has {count} errors:\n" if count > 1 else ""
        super().__init__(heading + "\n".join(str(problem) for problem in self.problems))


def nearest(name: object, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` for the known name most like `name`, or ""."""
    pool = list(known)
    lowered = {one.lower(): one for one in pool}
    found = difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=0.6)
    return f"did you mean {lowered[found[0]]!r}?" if found else ""
