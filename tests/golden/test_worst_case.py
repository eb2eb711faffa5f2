"""The worst case of a suite against the slow definition: every member alone, on every sample."""

from __future__ import annotations

from dataclasses import replace

import pytest
from answered import answered
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks import SeedBank, Suite
from attacks.goal import GOALS, Goal
from attacks.members import make_member
from targets.base import Batch
from tests.fakes import FakeView

NAMES = ("noise", "fgsm", "caa", "pgd", "pgd_sparing")


def right(view: FakeView, batch: Batch, goal: Goal) -> list[int]:
    """1 for a sample that holds, written out from the goal's definition."""
    full = batch.right(view.ask(batch.images, batch.questions, path="full"))
    compressed = batch.right(view.ask(batch.images, batch.questions, path="compressed"))
    broken = {
        "compression_only": [f and not c for f, c in zip(full, compressed, strict=True)],
        "compressed": [not c for c in compressed],
        "full": [not f for f in full],
    }[goal]
    return [int(not one) for one in broken]


def worst_of(
    view: FakeView,
    batch: Batch,
    names: tuple[str, ...],
    epsilon: float,
    seeds: list[int],
    goal: Goal,
) -> list[list[int]]:
    """Whether each sample holds (columns) under each member by itself (rows)."""
    table = []
    for name in names:
        own = SeedBank(seeds).child(name).seeds
        made = make_member("suite", name, 3)(view, batch, epsilon, own)
        table.append(right(view, replace(batch, images=made.images), goal))
    return table


@pytest.mark.parametrize("goal", GOALS)
@settings(max_examples=8, deadline=None)
@given(
    draw=st.integers(0, 1000),
    levels=st.integers(1, 40),
    names=st.permutations(NAMES).map(tuple),
    count=st.integers(1, len(NAMES)),
)
def test_a_suite_is_the_mean_over_samples_of_the_minimum_over_members(
    goal: Goal, draw: int, levels: int, names: tuple[str, ...], count: int
) -> None:
    view, batch, names = FakeView(), answered(5, seed=draw), names[:count]
    seeds = [draw + row for row in range(5)]
    table = worst_of(view, batch, names, levels / 255, seeds, goal)
    result = Suite(members=names, steps=3, goal=goal)(view, batch, levels / 255, seeds)
    held = right(view, replace(batch, images=result.images), goal)
    worst = [min(column) for column in zip(*table, strict=True)]
    assert held == worst
    assert sum(held) / len(held) == sum(worst) / len(worst)
    assert sum(held) <= min(map(sum, table)), "never better than the best single member"
    for row, maker in enumerate(result.made_by):
        first = next((n for n, line in zip(names, table, strict=True) if not line[row]), None)
        assert maker == first or (first is None and maker in names)


def test_the_minimum_of_means_is_another_number() -> None:
    """Two members that break different samples: the suite breaks both, neither does alone."""
    view, batch, seeds = FakeView(), answered(24), list(range(24))
    names = ("noise", "caa")
    table = worst_of(view, batch, names, 20 / 255, seeds, "compression_only")
    worst = [min(column) for column in zip(*table, strict=True)]
    assert sum(worst) < min(map(sum, table))
    result = Suite(members=names, steps=3)(view, batch, 20 / 255, seeds)
    held = right(view, replace(batch, images=result.images), "compression_only")
    assert sum(held) == sum(worst)
