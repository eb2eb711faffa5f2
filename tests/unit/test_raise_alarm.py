"""An attack on what a detector's alarm costs, on scores small enough to know what is possible."""

from __future__ import annotations

import pytest
from torch import Tensor

from attacks.errors import AttackError
from attacks.force_fallback import ForceFallback
from attacks.raise_alarm import RaiseAlarm
from redteam.adaptive import adapt, obstacle
from redteam.scenario import Method
from tests.fakes import FakeView, make_batch

SEEDS = [1, 2, 3, 4]


def brightness(images: Tensor, questions: tuple[str, ...], draw: int) -> Tensor:
    del questions, draw
    return images.mean((1, 2, 3))


def test_every_picture_is_flagged() -> None:
    batch = make_batch(4)
    limit = float(brightness(batch.images, (), 0).max()) + 0.01
    attack = RaiseAlarm(suspicion=brightness, limit=limit, scale=0.01, steps=10, draws=2, passes=3)
    made = attack(FakeView(), batch, 16 / 255, SEEDS)
    assert bool((brightness(made.images, (), 0) > limit).all())
    assert all(one.kept is not None and one.kept < 0 for one in made.own)
    assert (made.forwards, made.backwards) == (11 * 6, 10 * 6)
    assert attack.gradients(attack.budget(16 / 255)) == 60


def test_nothing_is_raised_before_calibration() -> None:
    with pytest.raises(AttackError, match="not calibrated"):
        RaiseAlarm()(FakeView(), make_batch(4), 8 / 255, SEEDS)


def test_force_fallback_becomes_it_against_a_detector() -> None:
    given = {"signal": "jaccard", "shift": None, "steps": 7, "alpha": 0.01, "restarts": 2}
    attack = Method("attacks", "force_fallback", "f", given, adaptive=True)
    monitor = Method("defenses", "disagreement_monitor", "m", {})
    assert obstacle(attack, monitor) is None
    assert adapt(attack, monitor).attack == RaiseAlarm(
        steps=7, alpha=0.01, restarts=2, momentum=0.7, passes=2
    )
    margin = Method("defenses", "rank_margin", "r", {"signal": "kendall", "views": "public"})
    assert isinstance(adapt(attack, margin).attack, ForceFallback)
