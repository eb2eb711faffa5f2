"""How a run is shown while it goes on: a bar on a terminal, a few lines elsewhere.

Several workers have a line each below the bar, or a part of a line elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from redteam.cost import unit_cost
from redteam.engines.base import AtWork
from redteam.plan import WorkUnit
from reports.records import Trial
from reports.text import count, epsilon_text, plain

_QUIET_SECONDS: Final = 30.0
"""Longest silence where there is no terminal."""


_LINES: Final = 8
"""Workers that have a line of their own; the others are counted."""
_IDLE: Final = {
    "waiting": "waiting: no unit is left for it",
    "starting": "starting in place of one that died",
    "gone": "gone: it died too often",
}


def duration(seconds: float) -> str:
    """A rough time for people: ``40 s``, ``3 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


@dataclass(slots=True)
class _Worker:
    """What is known of a worker.

    Attributes:
        started: when it was first heard of.
        heard: when it last was.
        now: what it does.
    """

    started: float
    heard: float
    now: AtWork

    @property
    def rate(self) -> float:
        """Trials a second, up to the last unit it handed in."""
        return self.now.trials / max(self.heard - self.started, 1e-9)

    @property
    def place(self) -> str:
        """Number, and the machine where there are several."""
        host = f" {plain(self.now.host, 24)}" if self.now.host else ""
        return f"worker {self.now.worker}{host}"

    @property
    def doing(self) -> str:
        """The unit it holds, or why it holds none."""
        unit = self.now.unit
        if unit is None:
            return _IDLE[self.now.doing]
        names = {one.compression.label for one in unit.group.cells}
        through = plain(names.pop(), 30) if len(names) == 1 else f"{len(names):,} compressions"
        return f"{_attack(unit)} · {through} · block {unit.block + 1}"


class _Bar(Progress):
    """A bar with a line for each worker below it."""

    def __init__(self, *columns: ProgressColumn, console: Console) -> None:
        self.workers: dict[int, _Worker] = {}
        super().__init__(*columns, console=console, transient=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar and what is below it."""
        yield self.make_tasks_table(self.tasks)
        if self.workers:
            yield _lines(self.workers)


def _lines(workers: dict[int, _Worker]) -> Table:
    """One line for each worker, cut at the width of the terminal."""
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for _ in range(3):
        table.add_column(no_wrap=True, justify="right")
    shown = [workers[number] for number in sorted(workers)]
    for one in shown[:_LINES]:
        now = one.now
        style = "" if now.unit is not None else "dim" if now.doing == "waiting" else "yellow"
        cells = [one.place, one.doing, count(now.units, "unit"), count(now.trials, "trial")]
        table.add_row(*(Text(cell, style) for cell in [*cells, f"{one.rate:.1f}/s"]))
    rest = shown[_LINES:]
    if rest:
        busy = sum(one.now.unit is not None for one in rest)
        trials = count(sum(one.now.trials for one in rest), "trial")
        units = count(sum(one.now.units for one in rest), "unit")
        rate = f"{sum(one.rate for one in rest):.1f}/s"
        others = f"{busy:,} of {count(len(rest), 'other')} at work"
        table.add_row("…", Text(others), Text(units), Text(trials), Text(rate))
    return table


def _sentence(workers: dict[int, _Worker]) -> str:
    """The same in one line, for logs."""
    shown = [workers[number] for number in sorted(workers)]
    parts = [
        f"{one.place}: {one.doing}, {count(one.now.trials, 'trial')}, {one.rate:.1f}/s"
        for one in shown[:_LINES]
    ]
    rest = len(shown) - len(parts)
    return "; ".join([*parts, *([f"and {count(rest, 'other')}"] if rest else [])])


def _attack(unit: WorkUnit) -> str:
    return f"{plain(unit.group.attack.label, 30)} {epsilon_text(unit.group.epsilon)}"


class RunProgress:
    """Watches a run, see `redteam.runner.Watcher`.

    Args:
        console: where to show it; standard error, so that standard output stays for results.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: _Bar | None = None
        self._workers: dict[int, _Worker] = {}
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
            self._bar = _Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self._console,
            )
            self._bar.workers = self._workers
            self._bar.start()
            self._task = self._bar.add_task("starting", total=self._total, rate="", left="")

    def finished(self, unit: WorkUnit, trials: list[Trial]) -> None:
        """Advance by a unit."""
        self._done += unit_cost(unit)
        self._trials += len(trials)
        self._errors += sum(trial.error is not None for trial in trials)
        elapsed = time.monotonic() - self._started
        left = elapsed * (self._total / self._done - 1)
        what = _attack(unit)
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
            if self._workers and self._trials < self._all:
                self.say(_sentence(self._workers))

    def working(self, event: AtWork) -> None:
        """Show what a worker does now."""
        now = time.monotonic()
        known = self._workers.setdefault(event.worker, _Worker(now, now, event))
        known.heard, known.now = now, event

    def say(self, message: str) -> None:
        """Show a line above the bar."""
        self._console.print(Text(message), soft_wrap=True)
