"""What the loss around a clean image says, and how an attack is asked for it."""

from __future__ import annotations

import pytest
import torch

from attacks import APGD, CAA, PGD, MarginSplit, Noise
from attacks.evade import Evade
from redteam.scenario import _checks
from redteam.steadiness import Around
from redteam.validation import ChecksOptions
from tests.fakes import FakeView, make_batch


def test_a_change_is_counted_in_units_of_the_loss() -> None:
    assert Around(10.0, (9.0, 11.0, 10.0, 10.0)).instability([10.0, 8.0]) == pytest.approx(0.05)
    assert Around(-2.0, (-2.0, 3.0)).instability([]) == 1.0, "2.5 of 2, at most 1"


def test_a_loss_of_next_to_nothing_is_measured_by_what_the_attack_moved_it_by() -> None:
    assert Around(-1e-4, (-2e-3, -3e-3)).instability([-1e-4, -5.0]) < 0.001
    assert Around(-1e-4, (-2e-3, -3e-3)).instability([-1e-4]) == 1.0, "a masked one moved nothing"
    assert Around(0.0, (0.5, 0.5)).instability([]) == 0.5


@pytest.mark.parametrize(
    "attack",
    [
        PGD(path="compressed", restarts=3),
        APGD(path="compressed", loss="margin", targets=2, norm="l2"),
        CAA(),
        MarginSplit(),
        Evade(inner=PGD(path="compressed")),
    ],
    ids=lambda one: one.name,
)
def test_an_attack_that_stands_tells_its_loss_at_its_start(attack: PGD) -> None:
    batch, seeds = make_batch(4), [1, 2, 3, 4]
    here, there = attack.standing(random=False), attack.standing(random=True)
    assert here is not None
    assert there is not None
    clean = here(FakeView(), batch, 8 / 255, seeds)
    assert torch.equal(clean.images, batch.images)
    first, second = (there(FakeView(), batch, 8 / 255, one) for one in (seeds, seeds[::-1]))
    assert not torch.equal(first.images, second.images)
    assert all(one.kept is not None for made in (clean, first) for one in made.own)
    assert clean.backwards == first.backwards == 0


def test_what_has_no_start_cannot_stand() -> None:
    assert Noise().standing(random=True) is None


def test_options_that_came_later_leave_the_hash_of_older_scenarios() -> None:
    assert _checks(ChecksOptions(repeat=0)) == {"repeat": 0}
    assert _checks(ChecksOptions(points=10)) == {"repeat": 2, "points": 10}
