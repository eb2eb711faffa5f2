"""The shared loop, against a plain reference and on losses whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from torch import Tensor

from attacks.budget import Budget, quantise
from attacks.descent import Descent, descend, step_scale
from attacks.errors import AttackError
from attacks.seeds import SeedBank
from targets.base import Batch
from tests.fakes import FakeView, make_batch

SEEDS = [1, 2, 3, 4]
STILL = Descent(random_start=False)


@pytest.fixture
def batch() -> Batch:
    return make_batch(4)


def towards(goal: Tensor) -> object:
    def loss(images: Tensor, step: int) -> Tensor:
        del step
        return (images - goal).square().flatten(1).sum(1)

    return loss


@pytest.mark.parametrize("rounded", [False, True])
def test_equals_a_plain_loop(batch: Batch, rounded: bool) -> None:
    """Momentum PGD in its shortest form, one sample at a time."""
    view, epsilon, alpha, decay = FakeView(), 16 / 255, 3 / 255, 0.7
    budget = Budget(epsilon, alpha=alpha, steps=8)

    def objective(images: Tensor, step: int) -> Tensor:
        del step
        return -view.answer_nll(images, batch.questions, batch.answers)

    how = Descent(momentum=decay, random_start=False, rounded=rounded)
    found = descend(objective, batch, budget, SeedBank(SEEDS), how=how)

    for i in range(4):
        clean = batch.images[i : i + 1]
        x, velocity = clean.clone(), torch.zeros_like(clean)
        best, best_loss, trace = clean, math.inf, []
        for _ in range(9):
            seen = quantise(clean, x, budget) if rounded else x
            seen = seen.detach().requires_grad_()
            loss = -view.answer_nll(seen, batch.questions[i : i + 1], batch.answers[i : i + 1])
            trace.append(loss.item())
            if loss.item() < best_loss:
                best, best_loss = seen.detach(), loss.item()
            (gradient,) = torch.autograd.grad(loss.sum(), seen)
            velocity = decay * velocity + gradient / gradient.abs().mean()
            x = clean + (x - alpha * velocity.sign() - clean).clamp(-epsilon, epsilon)
            x = x.clamp(0, 1)
        torch.testing.assert_close(found.images[i : i + 1], best)
        assert found.loss is not None
        assert found.loss[:, i].tolist() == pytest.approx(trace, rel=1e-5)


def test_reaches_a_corner_of_the_ball(batch: Batch) -> None:
    goal = 1 - batch.images.round()
    budget = Budget(8 / 255, steps=12)
    found = descend(towards(goal), batch, budget, SeedBank(SEEDS), how=STILL)  # type: ignore[arg-type]
    wanted = quantise(batch.images, goal, budget)
    torch.testing.assert_close(found.images, wanted)


def test_l2_walks_straight_to_a_goal_outside(batch: Batch) -> None:
    goal = batch.images + 0.05 * torch.randn(batch.images.shape)
    budget = Budget(0.5, "l2", steps=40)
    how = Descent(random_start=False, rounded=False)
    found = descend(towards(goal), batch, budget, SeedBank(SEEDS), how=how)  # type: ignore[arg-type]
    moved, way = (found.images - batch.images).flatten(1), (goal - batch.images).flatten(1)
    assert torch.cosine_similarity(moved, way).min() > 0.9
    assert moved.norm(dim=1).max() < 0.5 + 1e-5


def test_keeps_the_best_iterate_not_the_last(batch: Batch) -> None:
    """The objective is turned upside down at step 3; what came before was better."""

    def objective(images: Tensor, step: int) -> Tensor:
        mean = images.flatten(1).mean(1)
        return -mean if step < 3 else mean * 5

    budget = Budget(16 / 255, steps=6)
    found = descend(objective, batch, budget, SeedBank(SEEDS), how=STILL)
    assert found.loss is not None
    best = found.loss.min(0).values
    torch.testing.assert_close(-found.images.flatten(1).mean(1), best)
    assert (found.loss[-1] > best).all()


def test_restarts_keep_the_best_of_each_sample_with_its_trace(batch: Batch) -> None:
    view = FakeView()

    def objective(images: Tensor, step: int) -> Tensor:
        del step
        return -view.answer_nll(images, batch.questions, batch.answers, path="compressed")

    budgets = [Budget(16 / 255, steps=3, restarts=n) for n in (1, 4)]
    one, four = (descend(objective, batch, b, SeedBank(SEEDS)) for b in budgets)
    assert one.loss is not None
    assert four.loss is not None
    gain = one.loss.min(0).values - four.loss.min(0).values
    assert (gain >= 0).all()
    assert (gain > 0).any()
    now = objective(four.images, 0)
    torch.testing.assert_close(now, four.loss.min(0).values)


def test_mask_holds_still_what_it_excludes(batch: Batch) -> None:
    mask = torch.zeros(4, 1, 16, 16)
    mask[:, :, 4:8] = 1
    found = descend(
        towards(1 - batch.images),  # type: ignore[arg-type]
        batch,
        Budget(16 / 255, steps=5),
        SeedBank(SEEDS),
        how=Descent(momentum=0.5),
        mask=mask,
    )
    moved = (found.images != batch.images).any(1, keepdim=True)
    assert not moved[mask == 0].any()
    assert moved[mask == 1].float().mean() > 0.9


class Leaving:
    """Ends each sample at a step of its own; upside down, so that its last iterate is its worst."""

    def __init__(self, ends: list[int], seen: list[tuple[int, Tensor]]) -> None:
        self.ends, self.seen, self.step = ends, seen, 0

    def __call__(self, images: Tensor, step: int) -> Tensor:
        self.step = step
        self.seen.append((step, images.detach().clone()))
        return images.flatten(1).mean(1) * (1 if step > 0 else -1)

    def done(self, images: Tensor, loss: Tensor, may: Tensor) -> Tensor:
        assert len(images) == len(loss) == len(self.ends)
        return may & torch.tensor([self.step >= end for end in self.ends])

    def of(self, rows: Sequence[int]) -> Leaving:
        return Leaving([self.ends[row] for row in rows], self.seen)


def test_a_sample_that_is_done_leaves_with_the_iterate_that_made_it_so(batch: Batch) -> None:
    seen: list[tuple[int, Tensor]] = []
    budget = Budget(16 / 255, steps=6)
    found = descend(Leaving([2, 9, 9, 0], seen), batch, budget, SeedBank(SEEDS), how=STILL)
    assert [(step, len(images)) for step, images in seen] == [
        (0, 4),
        (1, 3),
        (2, 3),
        (3, 2),
        (4, 2),
        (5, 2),
        (6, 2),
    ]
    assert found.loss is not None
    assert found.done is not None
    assert found.done.tolist() == [True, False, False, True]
    assert torch.equal(found.images[3], seen[0][1][3])
    assert torch.equal(found.images[0], seen[2][1][0])
    assert found.loss.isfinite().sum(0).tolist() == [3, 7, 7, 1]


def test_all_done_ends_the_run_and_all_restarts(batch: Batch) -> None:
    seen: list[tuple[int, Tensor]] = []
    budget = Budget(16 / 255, steps=9, restarts=3)
    descend(Leaving([0, 0, 0, 0], seen), batch, budget, SeedBank(SEEDS))
    assert [step for step, _ in seen] == [0]


def test_what_is_done_is_not_run_again(batch: Batch) -> None:
    seen: list[tuple[int, Tensor]] = []
    budget = Budget(16 / 255, steps=1, restarts=2)
    found = descend(Leaving([1, 9, 0, 9], seen), batch, budget, SeedBank(SEEDS))
    assert [(step, len(images)) for step, images in seen] == [(0, 4), (1, 3), (0, 2), (1, 2)]
    alone = descend(Leaving([9], []), batch.rows([3]), budget, SeedBank(SEEDS[3:]))
    assert torch.equal(found.images[3:], alone.images)


def test_steps_between_judgements_are_not_compared(batch: Batch) -> None:
    """Unjudged steps report a loss far below; none of them may become the result."""

    def objective(images: Tensor, step: int) -> Tensor:
        return images.flatten(1).mean(1) - (0 if step % 3 == 0 or step == 7 else 1000)

    how = Descent(random_start=False, judge_every=3)
    found = descend(objective, batch, Budget(8 / 255, steps=7), SeedBank(SEEDS), how=how)
    assert found.loss is not None
    assert found.loss[:, 0].isfinite().nonzero().flatten().tolist() == [0, 3, 6, 7]
    torch.testing.assert_close(found.images.flatten(1).mean(1), found.loss[-1])


def test_no_steps_is_the_random_start(batch: Batch) -> None:
    budget = Budget(16 / 255)
    found = descend(towards(batch.images), batch, budget, SeedBank(SEEDS))  # type: ignore[arg-type]
    moved = (found.images - batch.images).abs()
    assert 0.02 < float(moved.mean()) < 0.04


@pytest.mark.parametrize(
    "objective",
    [
        lambda images, step: images.detach().flatten(1).mean(1),
        lambda images, step: torch.zeros(4, requires_grad=True) * 1,
    ],
)
def test_a_cut_graph_is_an_error(batch: Batch, objective: object) -> None:
    with pytest.raises(AttackError, match="at step 0 the loss does not depend on the image"):
        descend(objective, batch, Budget(8 / 255, steps=2), SeedBank(SEEDS))  # type: ignore[arg-type]


def test_a_gradient_that_is_not_finite_is_an_error_though_the_loss_is(batch: Batch) -> None:
    def objective(images: Tensor, step: int) -> Tensor:
        flat = images.flatten(1).mean(1)
        if step < 2:
            return flat
        root = (flat[:1] - flat[:1].detach()).sqrt()  # 0, with an infinite slope
        return flat + torch.cat([root, torch.zeros(3)])

    with pytest.raises(AttackError, match="not finite at step 2 for samples s0") as caught:
        descend(objective, batch, Budget(8 / 255, steps=4), SeedBank(SEEDS))
    assert (caught.value.sample_ids, caught.value.step) == (("s0",), 2)


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [1, 1, 1, 1]),
        ("halving", [1, 1, 0.5, 0.25]),
        ("cosine", [1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_schedules(schedule: Literal["constant", "cosine", "halving"], wanted: list[float]) -> None:
    assert [step_scale(schedule, step, 4) for step in range(4)] == pytest.approx(wanted, abs=1e-5)
