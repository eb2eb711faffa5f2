"""How a run is shown while it goes on: a bar on a terminal, a few lines elsewhere."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from redteam.cost import unit_cost
from redteam.plan import WorkUnit
from reports.records import Trial
from reports.text import count, epsilon_text, plain

_QUIET_SECONDS: Final = 30.0
"""Longest silence where there is no terminal."""


def duration(seconds: float) -> str:
    """A rough time for people: ``40 s``, ``3 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class RunProgress:
    """Watches a run, see `redteam.runner.Watcher`.

    Args:
        console: where to show it; standard error, so that standard output stays for results.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._total = self._done = 0.0
        self._trials = self._errors = self._all = 0
        self._started = self._spoke = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def prepared(self, folder: Path, units: list[WorkUnit], resumed: int) -> None:
        """Show where results go and how much there is to do."""
        self._total = sum(map(unit_cost, units)) or 1.0
        self._all = sum(len(unit.samples) * len(unit.group.cells) for unit in units)
        self._started = self._spoke = time.monotonic()
        if resumed:
            self.say(f"resuming {folder}: {count(resumed, 'trial')} there, {self._all:,} to do")
        else:
            self.say(f"running {count(self._all, 'trial')} into {folder}")
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("starting", total=self._total, rate="", left="")

    def finished(self, unit: WorkUnit, trials: list[Trial]) -> None:
        """Advance by a unit."""
        self._done += unit_cost(unit)
        self._trials += len(trials)
        self._errors += sum(trial.error is not None for trial in trials)
        elapsed = time.monotonic() - self._started
        left = elapsed * (self._total / self._done - 1)
        what = f"{plain(unit.group.attack.label, 30)} {epsilon_text(unit.group.epsilon)}"
        rate = f"{self._trials / max(elapsed, 1e-9):.1f} trials/s"
        wrong = f", {count(self._errors, 'error')}" if self._errors else ""
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                completed=self._done,
                description=what,
                rate=f"{self._trials:,}/{self._all:,}{wrong} · {rate}",
                left=f"about {duration(left)} left",
            )
        elif time.monotonic() - self._spoke > _QUIET_SECONDS or self._trials == self._all:
            self._spoke = time.monotonic()
            self.say(
                f"{self._trials:,} of {self._all:,} trials{wrong}, {rate}, "
                f"about {duration(left)} left"
            )

    def say(self, message: str) -> None:
        """Show a line above the bar."""
        self._console.print(Text(message), soft_wrap=True)
