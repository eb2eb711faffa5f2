"""Evade and succeed on a target small enough to know what is possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from attacks.base import Attack, Proposal
from attacks.budget import Budget
from attacks.descent import Descent, descend
from attacks.errors import AttackError
from attacks.evade import Evade
from attacks.noise import Noise
from attacks.seeds import SeedBank
from targets.base import Batch, Knowledge

EPSILON = 32 / 255


class View:
    """Right while the first column of the picture is dark."""

    knowledge = Knowledge.WHITE_BOX

    def ask(
        self, images: Tensor, questions: tuple[str, ...], *, path: str = "compressed"
    ) -> tuple[str, ...]:
        assert path == "compressed"
        light = images[..., 0].mean((1, 2)) > 0.55
        return tuple("no" if one else "yes" for one in light)


@dataclass(frozen=True, kw_only=True)
class Brighten(Attack):
    """Lights the first column, and the others a little for free."""

    name: ClassVar[str] = "brighten"
    knowledge: ClassVar[Knowledge] = Knowledge.WHITE_BOX
    takes_penalty: ClassVar[bool] = True

    heedless: bool = False

    def budget(self, epsilon: float) -> Budget:
        return Budget(epsilon, alpha=8 / 255, steps=6)

    def propose(self, view: Any, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        if self.heedless:
            return Proposal(batch.images)

        def loss(images: Tensor, step: int) -> Tensor:
            del step
            return -images[..., 0].mean((1, 2)) - 0.5 * images[..., 1].mean((1, 2))

        return descend(loss, batch, budget, rng, how=Descent(random_start=False))


def batch(count: int = 2) -> Batch:
    images = torch.full((count, 3, 4, 4), 128 / 255)
    return Batch(tuple(map(str, range(count))), images, ("q",) * count, ("yes",) * count)


def second_column(images: Tensor, questions: tuple[str, ...], draw: int) -> Tensor:
    """A detector that looks where the attack need not go."""
    del questions, draw
    return images[..., 1].mean((1, 2))


def first_column(images: Tensor, questions: tuple[str, ...], draw: int) -> Tensor:
    """A detector that cannot be evaded by who succeeds."""
    del questions, draw
    return images[..., 0].mean((1, 2))


def run(suspicion: Any, **options: Any) -> Any:
    made = Evade(inner=Brighten(), suspicion=suspicion, scale=0.02, margin=0.002, **options)
    return made(View(), batch(), EPSILON, (1, 2))  # type: ignore[arg-type]


def test_the_plain_attack_is_caught() -> None:
    plain = Brighten()(View(), batch(), EPSILON, (1, 2))  # type: ignore[arg-type]
    assert View().ask(plain.images, ("q", "q")) == ("no", "no")
    assert bool((second_column(plain.images, (), 0) > 0.55).all())


def test_it_succeeds_and_passes() -> None:
    found = run(second_column, limit=0.52)
    assert View().ask(found.images, ("q", "q")) == ("no", "no")
    assert bool((second_column(found.images, (), 0) <= 0.52).all())


def test_success_comes_before_passing() -> None:
    found = run(first_column, limit=0.52)
    assert View().ask(found.images, ("q", "q")) == ("no", "no")
    assert bool((first_column(found.images, (), 0) > 0.52).all())


def test_one_round_is_the_attack_itself() -> None:
    plain = Brighten()(View(), batch(), EPSILON, (1, 2))  # type: ignore[arg-type]
    found = run(second_column, limit=0.52, rounds=1)
    torch.testing.assert_close(found.images, plain.images)


def test_passes_of_the_detector_are_counted() -> None:
    found = run(second_column, limit=0.52, rounds=3, passes=4, draws=2)
    # Two weighted runs of 6 steps, each with 7 looks and 6 gradients of 8 passes; a look to judge.
    assert found.forwards == 2 * 7 * 8 + 3 * 8
    assert found.backwards == 2 * 6 * 8
    assert found.queries == 3
    made = Evade(inner=Brighten(), rounds=3, passes=4, draws=2)
    assert made.gradients(made.budget(EPSILON)) == 3 * 6 + 2 * 6 * 8


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    one = Evade(inner=Brighten(), suspicion=second_column, limit=0.52, scale=0.02, margin=0.002)
    whole = batch(2)
    images = whole.images.clone()
    images[1] = 100 / 255  # out of reach: this one needs other weights
    whole = Batch(whole.ids, images, whole.questions, whole.answers)
    both = one(View(), whole, EPSILON, (1, 2)).images  # type: ignore[arg-type]
    for row in range(2):
        alone = one(View(), whole.rows([row]), EPSILON, (1 + row,)).images  # type: ignore[arg-type]
        torch.testing.assert_close(both[row : row + 1], alone, rtol=0, atol=0)


def test_what_cannot_evade_says_so() -> None:
    with pytest.raises(AttackError, match="noise does not descend on a loss"):
        Evade(inner=Noise())
    with pytest.raises(AttackError, match="not calibrated yet"):
        Evade(inner=Brighten())(View(), batch(), EPSILON, (1, 2))  # type: ignore[arg-type]
    heedless = Evade(inner=Brighten(heedless=True), suspicion=second_column)
    with pytest.raises(AttackError, match="never looked at its penalty"):
        heedless(View(), batch(), EPSILON, (1, 2))  # type: ignore[arg-type]
