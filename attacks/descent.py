"""The loop all gradient attacks share: projected descent with a sign or l2 step, best iterate kept.

The loss of a batch is summed, so every sample descends on its own and none depends on its
neighbours. Everything is per sample: start, best iterate, freezing, trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from attacks.base import Proposal
from attacks.budget import Budget, project, quantise
from attacks.errors import AttackError
from attacks.seeds import SeedBank
from targets.base import Batch

Schedule = Literal["constant", "cosine", "halving"]
Stop = Callable[[Tensor, Tensor], Tensor]
"""``(images [B, 3, H, W], loss [B]) -> bool [B]``: samples that are done and stay as they are."""


class Objective(Protocol):
    """A loss to minimise, per sample."""

    def __call__(self, images: Tensor, step: int) -> Tensor:
        """Loss ``[B]`` of images ``[B, 3, H, W]``; `step` runs from 0 to `steps` inclusive."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """How to descend; what to descend on is the objective's business.

    Attributes:
        momentum: decay of accumulated gradients, each divided by its mean magnitude first
            (MI-FGSM, Dong et al., arXiv 1710.06081); 0 is plain PGD.
        velocity: what momentum adds up: gradients over their ``mean`` magnitude, or ``direction``,
            unit steps whose sum is made a unit step again (VEAttack, arXiv 2505.17440).
        schedule: step size over the run: constant, cosine to zero, or halved at 50 % and 75 %.
        random_start: begin at a random point of the ball; restarts after the first always do.
        rounded: judge every iterate as the 8-bit image that would be saved, passing the gradient
            straight through the rounding. Off, the float iterate is judged.
        judge_every: only every n-th step, and the last, has a loss that can be compared.
        stop: freezes samples for which it returns True.
    """

    momentum: float = 0.0
    velocity: Literal["mean", "direction"] = "mean"
    schedule: Schedule = "constant"
    random_start: bool = True
    rounded: bool = True
    judge_every: int = 1
    stop: Stop | None = None


def step_scale(schedule: Schedule, step: int, steps: int) -> float:
    """Factor in (0, 1] on the step size at a step of `steps`."""
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / steps))
    if schedule == "halving":
        return 0.25 if 4 * step >= 3 * steps else 0.5 if 2 * step >= steps else 1.0
    return 1.0


def descend(
    objective: Objective,
    batch: Batch,
    budget: Budget,
    rng: SeedBank,
    *,
    how: Descent | None = None,
    mask: Tensor | None = None,
    start: Tensor | None = None,
) -> Proposal:
    """Minimise an objective over the ball around the clean images.

    Args:
        objective: loss ``[B]`` of images.
        batch: clean images, float32 ``[B, 3, H, W]``, and the ids for error messages.
        budget: radius, norm, step size, steps T and restarts. A restart costs T + 1 forward and T
            backward passes.
        rng: randomness of the starts.
        how: options of the loop.
        mask: ``[B, 1, H, W]`` of 0 and 1; only pixels with 1 move.
        start: images in the ball at which the first restart begins; None follows `how`.

    Returns:
        Per sample the best judged iterate over all restarts, with the trace of its restart.

    Raises:
        AttackError: the loss does not depend on the image, or a loss or gradient is not finite.
    """
    how = how or Descent()
    first = start if start is not None or how.random_start else batch.images

    def run(begin: Tensor) -> Run:
        return _run(objective, batch, budget, begin, how, mask)

    best = best_restart(run, batch.images, budget, rng, mask, first)
    return Proposal(best.images, best.loss, best.gradient, mask, kept=best.best)


def best_restart(
    run: Callable[[Tensor], Run],
    clean: Tensor,
    budget: Budget,
    rng: SeedBank,
    mask: Tensor | None,
    first: Tensor | None,
) -> Run:
    """The best of several runs per sample, the first from `first`, others from random points."""
    found = None
    for index in range(budget.restarts):
        begin = first if index == 0 else None
        if begin is None:
            begin = random_point(clean, budget, rng.child(f"restart {index}"), mask)
        found = run(begin) if found is None else better(found, run(begin))
    if found is None:
        raise AttackError(f"restarts is {budget.restarts}; allowed: at least 1")
    return found


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one start, per sample: best judged iterate, its loss, the traces."""

    images: Tensor  # [B, 3, H, W]
    best: Tensor  # [B]
    loss: Tensor  # [T + 1, B]
    gradient: Tensor  # [T, B]


def better(one: Run, two: Run) -> Run:
    """Of each sample the run with the lower loss."""
    take = two.best < one.best
    return Run(
        torch.where(take.view(-1, 1, 1, 1), two.images, one.images),
        torch.where(take, two.best, one.best),
        torch.where(take, two.loss, one.loss),
        torch.where(take, two.gradient, one.gradient),
    )


def _run(
    objective: Objective,
    batch: Batch,
    budget: Budget,
    start: Tensor,
    how: Descent,
    mask: Tensor | None,
) -> Run:
    clean, count = batch.images, len(batch.images)
    images = start.clone()
    kept = clean.clone()
    best = torch.full((count,), math.inf, device=clean.device)
    frozen = torch.zeros(count, dtype=torch.bool, device=clean.device)
    velocity = torch.zeros_like(clean)
    losses: list[Tensor] = []
    slopes: list[Tensor] = []
    for step in range(budget.steps + 1):
        last = step == budget.steps
        judged_images, loss, gradient = evaluate(
            objective, batch, images, budget, step, rounded=how.rounded
        )
        judged = last or step % how.judge_every == 0
        losses.append(loss.masked_fill(frozen, math.nan) if judged else loss * math.nan)
        if judged:
            # A sample that stops keeps the iterate that stopped it, whatever its loss.
            done = how.stop(judged_images, loss) if how.stop is not None else frozen
            take = ((loss < best) | done) & ~frozen
            best = torch.where(take, loss, best)
            kept = torch.where(take.view(-1, 1, 1, 1), judged_images, kept)
            frozen = frozen | done
        if last or bool(frozen.all()):
            break
        if mask is not None:
            gradient = gradient * mask
        slopes.append(gradient.abs().flatten(1).amax(1).masked_fill(frozen, math.nan))
        velocity = _accumulate(velocity, gradient, how, budget)
        size = budget.step_size * step_scale(how.schedule, step, budget.steps)
        moved = project(clean, images - size * direction(velocity, budget), budget)
        images = torch.where(frozen.view(-1, 1, 1, 1), images, moved)
    return Run(kept, best, pad(losses, budget.steps + 1, best), pad(slopes, budget.steps, best))


def random_point(clean: Tensor, budget: Budget, rng: SeedBank, mask: Tensor | None) -> Tensor:
    """A random point of the ball: uniform in linf; random direction and radius in l2."""
    shape = clean.shape[1:]
    if budget.norm == "linf":
        noise = rng.uniform(shape, -budget.epsilon, budget.epsilon)
    else:
        noise = rng.normal(shape)
        noise = noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        noise = noise * rng.uniform((1, 1, 1)) * budget.epsilon
    return project(clean, clean + (noise if mask is None else noise * mask), budget)


def evaluate(
    objective: Objective,
    batch: Batch,
    images: Tensor,
    budget: Budget,
    step: int,
    *,
    rounded: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The image judged, its loss ``[B]`` and, except at the last step, the gradient."""
    last = step == budget.steps
    if rounded:
        images = quantise(batch.images, images, budget)
    images = images.detach().requires_grad_(not last)
    with torch.set_grad_enabled(not last):
        loss = objective(images, step)
        if batch.penalty is not None:
            loss = loss + batch.penalty(images).to(loss)
        gradient = torch.zeros_like(images) if last else _gradient(loss, images, step)
    loss, images = loss.detach().float(), images.detach()
    _refuse_not_finite(batch, loss, gradient, step)
    return images, loss, gradient


def _gradient(loss: Tensor, images: Tensor, step: int) -> Tensor:
    found = None
    if loss.requires_grad:
        (found,) = torch.autograd.grad(loss.sum(), images, allow_unused=True)
    if found is None:
        raise AttackError(
            f"at step {step} the loss does not depend on the image: the graph is cut (a detach, a "
            "hard selection, or a score that ignores the image). Use a straight-through gradient "
            "or another objective.",
            step=step,
        )
    return found.detach()


def _refuse_not_finite(batch: Batch, loss: Tensor, gradient: Tensor, step: int) -> None:
    fine = loss.isfinite() & gradient.flatten(1).isfinite().all(1)
    if bool(fine.all()):
        return
    values = zip(batch.ids, fine.tolist(), loss.tolist(), strict=True)
    bad = {name: value for name, good, value in values if not good}
    raise AttackError(
        f"loss or gradient is not finite at step {step} for samples "
        f"{', '.join(f'{name} (loss {value})' for name, value in bad.items())}; try float32, a "
        "smaller alpha, or leave these samples out",
        sample_ids=tuple(bad),
        step=step,
    )


def _accumulate(velocity: Tensor, gradient: Tensor, how: Descent, budget: Budget) -> Tensor:
    if how.momentum == 0:
        return gradient
    if how.velocity == "direction":
        return direction(how.momentum * velocity + direction(gradient, budget), budget)
    size = gradient.abs().flatten(1).mean(1).clamp_min(1e-30).view(-1, 1, 1, 1)
    return how.momentum * velocity + gradient / size


def direction(velocity: Tensor, budget: Budget) -> Tensor:
    """Steepest direction of unit size in the norm of the budget."""
    if budget.norm == "linf":
        return velocity.sign()
    length = velocity.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
    return torch.div(velocity, length)


def pad(rows: list[Tensor], length: int, like: Tensor) -> Tensor:
    """Stack rows ``[B]`` to ``[length, B]``; steps skipped because all samples froze are NaN."""
    missing = [torch.full_like(like, math.nan)] * (length - len(rows))
    return torch.stack([*rows, *missing]) if length else like.new_zeros((0, len(like)))
