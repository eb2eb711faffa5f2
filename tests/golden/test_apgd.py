"""The loop of Auto-PGD against algorithm 1 of its paper, one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import pytest
import torch
from torch import Tensor

from attacks.autostep import autostep, checkpoints
from attacks.budget import Budget, quantise
from attacks.seeds import SeedBank
from targets.base import Batch
from tests.fakes import make_batch

SEEDS = [1, 2, 3, 4]
Loss = Callable[[Tensor], Tensor]  # [1, 3, H, W] -> [1]


def test_checkpoints_are_those_of_the_paper() -> None:
    """p: 0, .22, .41, .57, .70, .80, .87, .93, .99, the next one past the end."""
    assert checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)
    assert checkpoints(1000) == (220, 410, 570, 700, 800, 870, 930, 990)
    assert checkpoints(20) == (5, 9, 12, 14, 16, 18, 19, 20)  # rounded up
    assert checkpoints(3) == (1, 2, 3)
    assert checkpoints(0) == ()


def paper_checkpoints(steps: int) -> set[int]:
    """w_j = ⌈p_j N⌉ with p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j − p_{j−1} − 0.03, 0.06)."""
    p = [Fraction(0), Fraction(22, 100)]
    while p[-1] <= 1:
        p.append(p[-1] + max(p[-1] - p[-2] - Fraction(3, 100), Fraction(6, 100)))
    return {math.ceil(share * steps) for share in p[1:] if share <= 1}


@pytest.mark.parametrize("steps", [*range(1, 40), 50, 100, 250])
def test_checkpoints_follow_the_recursion(steps: int) -> None:
    assert set(checkpoints(steps)) == paper_checkpoints(steps)


@dataclass
class Reference:
    trace: list[float]
    image: Tensor
    halvings: list[int]


def reference(loss: Loss, clean: Tensor, budget: Budget, steps: int) -> Reference:
    """Algorithm 1 for one image, minimising, judged after rounding to 8 bits."""
    epsilon = budget.epsilon

    def ball(x: Tensor) -> Tensor:
        delta = x - clean
        if budget.norm == "linf":
            delta = delta.clamp(-epsilon, epsilon)
        else:
            delta = delta * min(1.0, epsilon / max(float(delta.norm()), 1e-12))
        return (clean + delta).clamp(0, 1)

    def at(x: Tensor) -> tuple[float, Tensor, Tensor]:
        seen = quantise(clean, x, budget).detach().requires_grad_()
        value = loss(seen)
        (gradient,) = torch.autograd.grad(value.sum(), seen)
        return float(value.detach()), gradient, seen.detach()

    def go(x: Tensor, gradient: Tensor, eta: float) -> Tensor:
        step = gradient.sign() if budget.norm == "linf" else gradient / gradient.norm()
        return ball(x - eta * step)

    eta, marks = 2 * epsilon, paper_checkpoints(steps)
    x, last = clean.clone(), clean.clone()
    f, gradient, seen = at(x)
    values, halvings = [f], []
    best, best_x, best_gradient, best_seen = f, x, gradient, seen
    mark, best_at_mark, eta_changed = 0, f, True
    for k in range(steps):
        if k in marks:
            better = sum(values[i + 1] < values[i] for i in range(mark, k))
            first = better < 0.75 * (k - mark)
            second = not eta_changed and best == best_at_mark
            eta_changed = first or second
            if eta_changed:
                eta, x, gradient = eta / 2, best_x, best_gradient
                halvings.append(k)
            mark, best_at_mark = k, best
        z = go(x, gradient, eta)
        new = z if k == 0 else ball(x + (0.75 * (z - x) + 0.25 * (x - last)))
        last, x = x, new
        f, gradient, seen = at(x)
        values.append(f)
        if f < best:
            best, best_x, best_gradient, best_seen = f, x, gradient, seen
    return Reference(values, best_seen, halvings)


def bowls(count: int) -> list[Loss]:
    """Ill-conditioned quadratics with the lowest point inside, and outside, the ball."""
    found: list[Loss] = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        goal = torch.rand(1, 3, 16, 16, generator=generator)
        curve = 10 ** (torch.rand(1, 3, 16, 16, generator=generator) * 3 - 1)
        near = 0.02 if index % 2 else 1.0

        def loss(
            x: Tensor, goal: Tensor = goal, curve: Tensor = curve, near: float = near
        ) -> Tensor:
            wanted = near * goal + (1 - near) * 0.5
            return (curve * (x - wanted).square()).flatten(1).sum(1)

        found.append(loss)
    return found


def grey(batch: Batch) -> Batch:
    return Batch(
        batch.ids, torch.full_like(batch.images, 128 / 255), batch.questions, batch.answers
    )


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [1, 7, 40])
def test_equals_algorithm_1(norm: Literal["linf", "l2"], steps: int) -> None:
    batch = grey(make_batch(4))
    budget = Budget(12 / 255 if norm == "linf" else 1.0, norm, steps=steps)
    losses = bowls(4)

    def objective(images: Tensor, step: int) -> Tensor:
        del step
        return torch.cat([loss(images[i : i + 1]) for i, loss in enumerate(losses)])

    found = autostep(objective, batch, budget, SeedBank(SEEDS), random_start=False)
    assert found.loss is not None
    halved = []
    for i, loss in enumerate(losses):
        wanted = reference(loss, batch.images[i : i + 1], budget, steps)
        assert found.loss[:, i].tolist() == pytest.approx(wanted.trace, rel=1e-4)
        torch.testing.assert_close(found.images[i : i + 1], wanted.image)
        halved.append(tuple(wanted.halvings))
    if steps == 40:
        assert len(set(halved)) > 1  # so each sample had a step size of its own
        assert any(halved)


def test_first_step_goes_to_the_border_in_every_pixel() -> None:
    """Two epsilon is more than the ball is wide from its centre."""
    batch = grey(make_batch(4))
    up = autostep(
        lambda images, step: -images.flatten(1).sum(1),
        batch,
        Budget(8 / 255, steps=1),
        SeedBank(SEEDS),
        random_start=False,
    )
    torch.testing.assert_close(up.images, torch.full_like(up.images, 136 / 255))


def test_only_pixels_of_the_mask_move_and_restarts_keep_the_best() -> None:
    batch = make_batch(4)
    mask = torch.zeros(4, 1, 16, 16)
    mask[:, :, 4:8] = 1
    goal = 1 - batch.images

    def objective(images: Tensor, step: int) -> Tensor:
        del step
        return (images - goal).square().flatten(1).sum(1).sin()

    def lowest(restarts: int) -> Tensor:
        budget = Budget(16 / 255, steps=6, restarts=restarts)
        found = autostep(objective, batch, budget, SeedBank(SEEDS), mask=mask)
        moved = (found.images != batch.images).any(1, keepdim=True)
        assert not moved[mask == 0].any()
        assert moved[mask == 1].any()
        return objective(found.images, 0)

    one, five = lowest(1), lowest(5)
    assert (five <= one).all()
    assert (five < one).any()


def test_judges_the_image_that_is_saved() -> None:
    """The loss of the result, computed on the result, is the lowest of its trace."""
    batch, budget = make_batch(4), Budget(3.7 / 255, steps=12)
    goal = batch.images.flip(3)

    def objective(images: Tensor, step: int) -> Tensor:
        del step
        return (images - goal).square().flatten(1).sum(1)

    found = autostep(objective, batch, budget, SeedBank(SEEDS))
    assert found.loss is not None
    saved = quantise(batch.images, found.images, budget)
    assert torch.equal(saved, found.images)
    torch.testing.assert_close(objective(saved, 0), found.loss.min(0).values)
    assert not math.isinf(float(found.loss.max()))
