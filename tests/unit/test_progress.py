"""What people see of several workers: a line each on a terminal, a part of a line elsewhere."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from redteam import progress
from redteam.engines.base import AtWork
from redteam.plan import WorkUnit, make_plan
from redteam.progress import RunProgress
from redteam.scenario import load_limited

UNITS = list(make_plan(load_limited("quickstart", ["engine.batch_size=8"], None)).units(16))
HOSTILE = "\x1b[31mevil\u202e [bold]\n{task}"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress.time, "monotonic", found)
    return found


def console(width: int = 80, *, terminal: bool = True) -> Console:
    return Console(
        file=io.StringIO(), width=width, height=24, force_terminal=terminal, markup=False,
        highlight=False, color_system=None, legacy_windows=False, _environ={},
    )  # fmt: skip


def below(shown: RunProgress, width: int = 80) -> list[str]:
    """The lines below the bar."""
    plain = Console(file=io.StringIO(), width=width, color_system=None, _environ={})
    with plain.capture() as caught:
        plain.print(progress._lines(shown._workers))
    return caught.get().splitlines()


def test_each_worker_has_one_line_that_fits(clock: Clock) -> None:
    unit = UNITS[0]
    with RunProgress(console()) as shown:
        shown.prepared(Path("run"), UNITS, 0)
        shown.working(AtWork(1, "unit", unit))
        shown.working(AtWork(2, "waiting"))
        shown.working(AtWork(3, "starting"))
        clock.now += 4
        shown.working(AtWork(1, "unit", unit, units=3, trials=1234))
        lines = below(shown)
    assert len(lines) == 3
    assert all(len(line) <= 80 for line in lines)
    attack, epsilon = unit.group.attack.label, "8/255"
    assert lines[0].startswith(f"worker 1 {attack} {epsilon} · ")
    assert "block 1" in lines[0]
    assert lines[0].endswith("3 units 1,234 trials 308.5/s")
    assert "waiting: no unit is left for it" in lines[1]
    assert "starting in place of one that died" in lines[2]


def test_the_rate_of_a_worker_that_waits_does_not_fall(clock: Clock) -> None:
    with RunProgress(console()) as shown:
        shown.prepared(Path("run"), UNITS, 0)
        shown.working(AtWork(1, "unit", UNITS[0]))
        clock.now += 2
        shown.working(AtWork(1, "waiting", units=1, trials=8))
        clock.now += 100
        assert "4.0/s" in below(shown)[0]


def test_more_workers_than_fit_are_counted(clock: Clock) -> None:
    with RunProgress(console()) as shown:
        shown.prepared(Path("run"), UNITS, 0)
        for number in range(1, 65):
            doing = "unit" if number % 2 else "waiting"
            shown.working(AtWork(number, doing, UNITS[0] if number % 2 else None, 1, 2))
        lines = below(shown)
    assert len(lines) == 9
    assert "28 of 56 others at work" in lines[-1]
    assert "56 units" in lines[-1]
    assert "112 trials" in lines[-1]


@pytest.mark.parametrize("terminal", [True, False])
def test_hostile_names_are_escaped(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    scenario = load_limited("quickstart", ["engine.batch_size=8"], None)
    monkeypatch.setattr(type(scenario.attacks[0]), "label", property(lambda self: HOSTILE))
    unit: WorkUnit = UNITS[0]
    wide = console(200, terminal=terminal)
    with RunProgress(wide) as shown:
        shown.prepared(Path("run"), UNITS, 0)
        shown.working(AtWork(1, "unit", unit, host=HOSTILE))
        clock.now += 60
        shown.finished(unit, [])
        text = "\n".join(below(shown, 200)) if terminal else wide.file.getvalue()  # type: ignore[attr-defined]
    assert "evil⟨U+202E⟩ [bold] {task}" in text
    assert "\x1b[31m" not in text
    assert "\u202e" not in text


def test_without_a_terminal_workers_are_named_now_and_then(clock: Clock) -> None:
    quiet = console(180, terminal=False)
    with RunProgress(quiet) as shown:
        shown.prepared(Path("run"), UNITS, 0)
        for number in (1, 2):
            shown.working(AtWork(number, "unit", UNITS[number], host=f"node-{number}"))
        shown.finished(UNITS[0], [])
        clock.now += 31
        shown.working(AtWork(1, "unit", UNITS[3], 1, 62, "node-1"))
        shown.finished(UNITS[1], [])
    lines = quiet.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 3, "what to do, one bar, one line of workers"
    assert lines[2].startswith("worker 1 node-1: ")
    assert "62 trials, 2.0/s; worker 2 node-2: " in lines[2]


def test_a_run_of_one_worker_says_nothing_of_workers(clock: Clock) -> None:
    quiet = console(terminal=False)
    with RunProgress(quiet) as shown:
        shown.prepared(Path("run"), UNITS, 0)
        clock.now += 31
        shown.finished(UNITS[0], [])
    assert "worker" not in quiet.file.getvalue()  # type: ignore[attr-defined]
