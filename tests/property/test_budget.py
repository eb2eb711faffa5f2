"""The budget holds whatever is proposed: ball, range, 8 bits, mask, no-op at zero."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attacks.base import Attack, Proposal
from attacks.budget import LEVELS, Budget, from_levels, norms, project, quantise, to_levels
from attacks.seeds import SeedBank
from targets.base import Batch, Knowledge
from tests.fakes import FakeView, make_batch

epsilons = st.one_of(
    st.floats(0, 1, allow_nan=False),
    st.integers(0, 255).map(lambda k: k / 255),
    st.integers(1, 255).map(lambda k: k / 255 - 1e-9),
)
lengths = st.floats(0, 40, allow_nan=False)
seeds = st.integers(0, 2**32)


def images(seed: int, *, wild: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(2, 3, 8, 8, generator=generator) - 0.5) * wild + 0.5


def levels_moved(clean: Tensor, moved: Tensor) -> Tensor:
    return (to_levels(moved) - to_levels(clean)).abs()


@settings(deadline=None)
@given(epsilons, seeds)
def test_linf_holds_after_rounding_in_float64(epsilon: float, seed: int) -> None:
    clean = from_levels(to_levels(images(seed)))
    moved = quantise(clean, images(seed + 1, wild=4.0), Budget(epsilon))
    assert float(levels_moved(clean, moved).max()) / LEVELS <= epsilon
    assert torch.equal(from_levels(to_levels(moved)), moved)
    assert moved.min() >= 0
    assert moved.max() <= 1


@settings(deadline=None)
@given(epsilons)
def test_levels_are_the_most_that_fit(epsilon: float) -> None:
    levels = Budget(epsilon).levels
    assert levels / LEVELS <= epsilon < (levels + 1) / LEVELS


@pytest.mark.parametrize("count", range(256))
def test_a_whole_number_of_levels_is_used_whole(count: int) -> None:
    assert Budget(count / 255).levels == count


@settings(deadline=None)
@given(lengths, seeds)
def test_l2_holds_after_rounding(epsilon: float, seed: int) -> None:
    budget = Budget(epsilon, "l2")
    clean = from_levels(to_levels(images(seed)))
    moved = quantise(clean, images(seed + 1, wild=4.0), budget)
    _, length = norms((to_levels(moved) - to_levels(clean)) / LEVELS)
    assert float(length.max()) <= epsilon * (1 + 1e-12)
    assert torch.equal(quantise(clean, moved, budget), moved)


def test_l2_rounding_uses_most_of_the_budget() -> None:
    clean = torch.full((1, 3, 32, 32), 100 / 255)
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    moved = quantise(clean, clean + noise, Budget(0.4, "l2"))
    assert float(norms(moved - clean)[1]) > 0.36


@settings(deadline=None)
@given(epsilons, seeds, st.sampled_from(["linf", "l2"]))
def test_rounding_twice_changes_nothing(
    epsilon: float, seed: int, norm: Literal["linf", "l2"]
) -> None:
    budget = Budget(epsilon, norm)
    clean = from_levels(to_levels(images(seed)))
    once = quantise(clean, images(seed + 1), budget)
    assert torch.equal(quantise(clean, once, budget), once)


@settings(deadline=None)
@given(epsilons, seeds)
def test_projection_is_idempotent_and_leaves_inner_points_alone(epsilon: float, seed: int) -> None:
    clean = images(seed)
    once = project(clean, images(seed + 1, wild=4.0), Budget(epsilon))
    torch.testing.assert_close(project(clean, once, Budget(epsilon)), once)


class Wild(Attack):
    """Proposes whatever it likes, far outside every budget, with a mask it does not keep."""

    name: ClassVar[str] = "wild"
    knowledge: ClassVar[Knowledge] = Knowledge.NONE

    def __init__(self, seed: int, norm: Literal["linf", "l2"]) -> None:
        self.seed, self.norm = seed, norm

    def budget(self, epsilon: float) -> Budget:
        return Budget(epsilon, self.norm)

    def propose(self, view: Any, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        del view, budget
        generator = torch.Generator().manual_seed(self.seed)
        batch.images.mul_(0.5)  # even spoiling the clean images must not move the ball
        mask = (torch.rand(len(rng), 1, 16, 16, generator=generator) < 0.5).float()
        return Proposal(torch.randn(batch.images.shape, generator=generator) * 3, mask=mask)


@settings(deadline=None)
@given(epsilons, seeds, st.sampled_from(["linf", "l2"]))
def test_no_author_can_leave_the_budget(
    epsilon: float, seed: int, norm: Literal["linf", "l2"]
) -> None:
    batch = make_batch(2, seed=seed % 97)
    clean = batch.images.clone()
    attack = Wild(seed, norm)
    result = attack(FakeView(Knowledge.NONE), batch, epsilon, [1, 2])
    measured = result.linf if norm == "linf" else result.l2
    assert float(measured.max()) <= epsilon
    assert torch.equal(batch.images, clean)
    assert torch.equal(from_levels(to_levels(result.images)), result.images)
    moved = levels_moved(clean, result.images)
    assert float(moved.max()) / LEVELS == pytest.approx(float(result.linf.max()))
    generator = torch.Generator().manual_seed(seed)
    outside = torch.rand(2, 1, 16, 16, generator=generator) >= 0.5
    assert not moved[outside.expand_as(moved)].any()
    if epsilon == 0:
        assert torch.equal(result.images, clean)
