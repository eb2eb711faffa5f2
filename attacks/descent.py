"""The loop all gradient attacks share: projected descent with a sign or l2 step, best iterate kept.

The loss of a batch is summed, so every sample descends on its own and none depends on its
neighbours. Everything is per sample: start, best iterate, trace. Where the objective says when a
sample is done (`Ending`), that sample leaves, and the others go on as a smaller batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from attacks.base import Proposal
from attacks.budget import Budget, project, quantise
from attacks.errors import AttackError
from attacks.seeds import SeedBank
from targets.base import Batch
from targets.precision import exactly, is_reduced

Schedule = Literal["constant", "cosine", "halving"]


class Objective(Protocol):
    """A loss to minimise, per sample."""

    def __call__(self, images: Tensor, step: int) -> Tensor:
        """Loss ``[B]`` of images ``[B, 3, H, W]``; `step` runs from 0 to `steps` inclusive."""
        ...


@runtime_checkable
class Ending(Objective, Protocol):
    """An objective that knows when a sample is done, and can go on without it.

    A sample that is done keeps the iterate that made it so, whatever its loss, and is not run
    again, in later restarts neither.
    """

    def done(self, images: Tensor, loss: Tensor, may: Tensor) -> Tensor:
        """Which samples are done: bool ``[B]``; asked after every step that is judged.

        Args:
            images: ``[B, 3, H, W]``, those just judged.
            loss: ``[B]`` of them, the penalty included.
            may: bool ``[B]``, False for samples that have to go on whatever they have reached,
                because their penalty (`Batch.penalty`) is not 0.
        """
        ...

    def of(self, rows: Sequence[int]) -> Ending:
        """The objective of some of its samples, which carries on where this one is."""
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
    """

    momentum: float = 0.0
    velocity: Literal["mean", "direction"] = "mean"
    schedule: Schedule = "constant"
    random_start: bool = True
    rounded: bool = True
    judge_every: int = 1


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

    def run(work: Work, begin: Tensor) -> Run:
        return _run(work, Run.blank(batch.images, budget), budget, begin, how)

    work = Work.all(objective, batch, mask)
    return finished(work, best_restart(run, work, budget, rng, first), budget)


@dataclass(frozen=True, slots=True)
class Work:
    """The samples that are still at work, packed into a batch of their own.

    Attributes:
        objective: of these b samples.
        batch: they.
        mask: ``[b, 1, H, W]``, or None.
        rows: long ``[b]``, where they stand in the whole batch.
    """

    objective: Objective
    batch: Batch
    mask: Tensor | None
    rows: Tensor

    @classmethod
    def all(cls, objective: Objective, batch: Batch, mask: Tensor | None) -> Work:
        """The whole batch."""
        rows = torch.arange(len(batch.ids), device=batch.images.device)
        return cls(objective, batch, mask, rows)

    def ended(self, seen: Seen) -> Tensor | None:
        """Which of them are done, bool ``[b]``; None if none is."""
        if not isinstance(self.objective, Ending):
            return None
        fine = torch.ones_like(seen.loss, dtype=torch.bool)
        may = fine if seen.penalty is None else seen.penalty <= 0
        done = self.objective.done(seen.images, seen.loss, may) & may
        return done if bool(done.any()) else None

    def only(self, stay: Tensor) -> Work:
        """Those for which `stay`, bool ``[b]``, holds."""
        if not isinstance(self.objective, Ending):
            raise AttackError("this objective cannot go on without some of its samples")
        places = stay.nonzero()[:, 0]
        rows = places.tolist()
        mask = None if self.mask is None else self.mask[places]
        return Work(self.objective.of(rows), self.batch.rows(rows), mask, self.rows[places])


def best_restart(
    run: Callable[[Work, Tensor], Run],
    work: Work,
    budget: Budget,
    rng: SeedBank,
    first: Tensor | None,
) -> Run:
    """The best of several runs per sample, the first from `first`, others from random points.

    Args:
        run: one run of some samples from points ``[b, 3, H, W]``.
        work: the whole batch; later runs have what is not done.
        budget: the ball, and how many runs.
        rng: randomness of the starts.
        first: ``[B, 3, H, W]``; None begins at a random point too.
    """
    found = None
    for index in range(budget.restarts):
        begin = first if index == 0 else None
        if begin is None:
            # For all, done or not: each sample's stream gives what it would give alone.
            own = rng.child(f"restart {index}")
            begin = random_point(work.batch.images, budget, own, work.mask)
        if found is None:
            found = run(work, begin)
        elif not bool(found.done.any()):
            found = better(found, run(work, begin))
        elif bool(found.done.all()):
            break
        else:
            left = work.only(~found.done)
            found = better(found, run(left, begin[left.rows]))
    if found is None:
        raise AttackError(f"restarts is {budget.restarts}; allowed: at least 1")
    return found


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one start, per sample of the whole batch; written in place as it goes on.

    Attributes:
        images: ``[B, 3, H, W]`` best judged iterate, or the one with which the sample was done.
        best: ``[B]`` its loss; infinite where nothing was judged.
        loss: ``[T + 1, B]``, NaN where nothing was judged.
        gradient: ``[T, B]``, NaN where none was taken.
        done: bool ``[B]``, see `Ending`.
    """

    images: Tensor
    best: Tensor
    loss: Tensor
    gradient: Tensor
    done: Tensor

    @classmethod
    def blank(cls, clean: Tensor, budget: Budget) -> Run:
        """Before the first step."""
        count = len(clean)
        return cls(
            clean.clone(),
            clean.new_full((count,), math.inf),
            clean.new_full((budget.steps + 1, count), math.nan),
            clean.new_full((budget.steps, count), math.nan),
            torch.zeros(count, dtype=torch.bool, device=clean.device),
        )

    def judge(self, work: Work, seen: Seen, step: int) -> Tensor | None:
        """Note what was judged at a step; which of these samples are done, None if none is."""
        rows, done = work.rows, work.ended(seen)
        best = self.best[rows]
        take = seen.loss < best
        if done is not None:
            # A sample that is done keeps the iterate that made it so, whatever its loss.
            take = take | done
            self.done[rows] = done
        self.loss[step, rows] = seen.loss
        self.best[rows] = torch.where(take, seen.loss, best)
        here = take.view(-1, 1, 1, 1)
        self.images[rows] = torch.where(here, seen.images, self.images[rows])
        return done

    def slope(self, work: Work, gradient: Tensor, step: int) -> None:
        """Note the largest absolute pixel gradient of a step."""
        self.gradient[step, work.rows] = gradient.abs().flatten(1).amax(1)


def finished(work: Work, run: Run, budget: Budget) -> Proposal:
    """What `propose` returns; made in reduced precision, it is judged once more without.

    Args:
        work: the whole batch.
        run: the best of it.
        budget: it was made in.
    """
    found = Proposal(run.images, run.loss, run.gradient, work.mask, done=run.done, kept=run.best)
    if not is_reduced():
        return found
    with exactly():
        seen = evaluate(work.objective, work.batch, run.images, budget, budget.steps)
    return replace(found, exact=torch.stack([run.best, seen.loss.to(run.best)]))


def better(one: Run, two: Run) -> Run:
    """Of each sample the run with the lower loss, or in which it was done at last."""
    take = two.done | (two.best < one.best)
    return Run(
        torch.where(take.view(-1, 1, 1, 1), two.images, one.images),
        torch.where(take, two.best, one.best),
        torch.where(take, two.loss, one.loss),
        torch.where(take, two.gradient, one.gradient),
        one.done | two.done,
    )


def _run(work: Work, run: Run, budget: Budget, start: Tensor, how: Descent) -> Run:
    images, velocity = start, torch.zeros_like(start)
    for step in range(budget.steps + 1):
        last = step == budget.steps
        seen = evaluate(work.objective, work.batch, images, budget, step, rounded=how.rounded)
        gradient, done = seen.gradient, None
        if last or step % how.judge_every == 0:
            done = run.judge(work, seen, step)
        if last:
            break
        if done is not None:
            if bool(done.all()):
                break
            work, stay = work.only(~done), ~done
            images, gradient, velocity = images[stay], gradient[stay], velocity[stay]
        if work.mask is not None:
            gradient = gradient * work.mask
        run.slope(work, gradient, step)
        velocity = _accumulate(velocity, gradient, how, budget)
        size = budget.step_size * step_scale(how.schedule, step, budget.steps)
        images = project(work.batch.images, images - size * direction(velocity, budget), budget)
    return run


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


@dataclass(frozen=True, slots=True)
class Seen:
    """What one step looked at.

    Attributes:
        images: ``[B, 3, H, W]``, those judged.
        loss: ``[B]``, the penalty included.
        gradient: ``[B, 3, H, W]``; zero at the last step, where none is taken.
        penalty: ``[B]``, the part of the loss that is not the objective's; None if there is none.
    """

    images: Tensor
    loss: Tensor
    gradient: Tensor
    penalty: Tensor | None = None


def evaluate(
    objective: Objective,
    batch: Batch,
    images: Tensor,
    budget: Budget,
    step: int,
    *,
    rounded: bool = True,
) -> Seen:
    """The image judged, its loss and, except at the last step, the gradient."""
    last, penalty = step == budget.steps, None
    if rounded:
        images = quantise(batch.images, images, budget)
    images = images.detach().requires_grad_(not last)
    with torch.set_grad_enabled(not last):
        loss = objective(images, step)
        if batch.penalty is not None:
            penalty = batch.penalty(images).to(loss)
            loss = loss + penalty
        gradient = torch.zeros_like(images) if last else _gradient(loss, images, step)
    loss, images = loss.detach().float(), images.detach()
    _refuse_not_finite(batch, loss, gradient, step)
    return Seen(images, loss, gradient, None if penalty is None else penalty.detach())


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
