"""The loop of transfer attacks: the update rules of `attacks.transfer.updates` on one problem."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from attacks.base import Proposal
from attacks.budget import Budget, quantise
from attacks.descent import Schedule, step_scale
from attacks.errors import AttackError
from attacks.seeds import SeedBank
from attacks.transfer.templates import fold, tile
from attacks.transfer.transformations import smooth
from attacks.transfer.updates import (
    CommonWeakness,
    GradientAt,
    accumulate,
    look_ahead,
    mean_of,
    variance,
)
from targets.base import Batch

Size = tuple[int, int]


class Problem(Protocol):
    """What is optimised."""

    @property
    def count(self) -> int:
        """Number of surrogates."""
        ...

    def gradient(self, number: int, delta: Tensor, rng: SeedBank, step: int) -> Tensor:
        """Gradient of one surrogate's loss at a perturbation, ``[B, 3, H, W]``."""
        ...

    def judge(self, images: Tensor) -> Tensor:
        """Loss ``[B]`` by which finished pictures are compared."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How to descend.

    Attributes:
        momentum: mu of MI.
        nesterov: look ahead (NI).
        smoothing: side of the TI kernel in pixels, odd; 1 is none.
        smoothing_sigma: deviation of that kernel in pixels.
        neighbours: N of VMI; 0 is none.
        neighbourhood: beta of VMI, in units of epsilon.
        ensemble: mean gradient, or CWA.
        inner: step of each model in CWA.
        schedule: step size over the run.
        random_start: begin at a random point.
        judge_every: a finished picture is judged at every n-th step and the last.
        template: side of the tiled template in pixels; None is a free perturbation.
    """

    momentum: float
    nesterov: bool
    smoothing: int
    smoothing_sigma: float
    neighbours: int
    neighbourhood: float
    ensemble: Literal["mean", "cwa"]
    inner: float
    schedule: Schedule
    random_start: bool
    judge_every: int
    template: int | None


class _Pattern:
    """The point that moves: a free perturbation of the frame, or a template tiled over it."""

    def __init__(self, canvas: Tensor, mask: Tensor, epsilon: float, side: int | None) -> None:
        self.canvas, self.mask, self.epsilon, self.side = canvas, mask, epsilon, side
        self.size: Size = (canvas.shape[-2], canvas.shape[-1])
        self.shape = canvas.shape[1:] if side is None else torch.Size((3, side, side))

    def spread(self, point: Tensor, phase: Tensor | None) -> Tensor:
        """The perturbation of a point."""
        return self.mask * (point if self.side is None else tile(point, self.size, phase))

    def gather(self, gradient: Tensor, phase: Tensor | None) -> Tensor:
        """Gradient of the point from that of the perturbation."""
        gradient = gradient * self.mask
        return gradient if self.side is None else fold(gradient, self.side, phase)

    def feasible(self, point: Tensor) -> Tensor:
        """The nearest allowed point."""
        point = point.clamp(-self.epsilon, self.epsilon)
        if self.side is not None:
            return point  # its tiles lie on pixels of every value
        return ((self.canvas + point).clamp(0, 1) - self.canvas) * self.mask

    def phase(self, rng: SeedBank) -> Tensor | None:
        """A random phase of the tiling."""
        if self.side is None:
            return None
        return (rng.child("phase").uniform((2,)).cpu() * self.side).floor().long()


def optimise(
    problem: Problem, batch: Batch, budget: Budget, rng: SeedBank, how: Rules, mask: Tensor
) -> Proposal:
    """Minimise a problem over perturbations of a mask.

    Args:
        problem: gradients by surrogate.
        batch: canvases.
        budget: linf radius, step size, steps T.
        rng: randomness of start and views.
        how: rules.
        mask: ``[B, 1, H, W]`` of 0 and 1.

    Returns:
        Per sample the best judged picture. A template is judged and returned at phase 0.

    Raises:
        AttackError: a loss or gradient is not finite.
    """
    return _Descent(problem, batch, budget, rng, how, mask).run()


class _Descent:
    """One run; its state is that of the update rules."""

    def __init__(
        self,
        problem: Problem,
        batch: Batch,
        budget: Budget,
        rng: SeedBank,
        how: Rules,
        mask: Tensor,
    ) -> None:
        self.problem, self.batch, self.budget = problem, batch, budget
        self.rng, self.how, self.mask = rng, how, mask
        self.pattern = _Pattern(batch.images, mask, budget.epsilon, how.template)
        blank = batch.images.new_zeros((len(batch.images), *self.pattern.shape))
        self.point = self.velocity = self.inner = self.spread_of_gradients = blank
        if how.random_start:
            start = rng.child("start").uniform(self.pattern.shape, -budget.epsilon, budget.epsilon)
            self.point = self.pattern.feasible(start.to(blank))

    def run(self) -> Proposal:
        """All steps."""
        count, steps = len(self.batch.images), self.budget.steps
        losses = self.point.new_full((steps + 1, count), math.nan)
        slopes = self.point.new_full((steps, count), math.nan)
        best = self.point.new_full((count,), math.inf)
        kept = self.batch.images
        for step in range(steps + 1):
            if step % self.how.judge_every == 0 or step == steps:
                images = self._picture()
                losses[step] = self._finite(self.problem.judge(images), step)
                kept = torch.where((losses[step] < best).view(-1, 1, 1, 1), images, kept)
                best = torch.minimum(best, losses[step])
            if step < steps:
                gradient = self._finite(self._step(step), step)
                slopes[step] = gradient.abs().flatten(1).amax(1)
        return Proposal(kept, losses, slopes, self.mask, kept=best)

    def _picture(self) -> Tensor:
        delta = self.pattern.spread(self.point, None)
        return quantise(self.batch.images, self.batch.images + delta, self.budget)

    def _step(self, step: int) -> Tensor:
        """Move the point; gives the gradient it moved by."""
        how, own = self.how, self.rng.child(f"step {step}")
        phase = self.pattern.phase(own)
        members = [self._member(number, phase, own, step) for number in range(self.problem.count)]
        alpha = self.budget.step_size * step_scale(how.schedule, step, self.budget.steps)
        if how.ensemble == "cwa":
            rule = CommonWeakness(alpha, self.budget.epsilon / 15, how.inner, how.momentum)
            self.point, self.inner, self.velocity, gradient = rule.step(
                members, self.point, self.inner, self.velocity, self.pattern.feasible
            )
            return gradient

        def gradient_at(point: Tensor) -> Tensor:
            return mean_of([member(point) for member in members])

        at = self.point
        if how.nesterov:
            at = look_ahead(at, self.velocity, alpha, how.momentum)
        gradient = gradient_at(at)
        self.velocity = accumulate(self.velocity, gradient + self.spread_of_gradients, how.momentum)
        if how.neighbours > 0:
            radius = how.neighbourhood * self.budget.epsilon
            self.spread_of_gradients = variance(
                gradient_at, at, gradient, own, radius, how.neighbours
            )
        self.point = self.pattern.feasible(self.point - alpha * self.velocity.sign())
        return gradient

    def _member(self, number: int, phase: Tensor | None, rng: SeedBank, step: int) -> GradientAt:
        """The gradient of one surrogate's loss at a point; TI acts on pixels, before folding."""

        def gradient_at(point: Tensor) -> Tensor:
            delta = self.pattern.spread(point, phase)
            found = self.problem.gradient(number, delta, rng, step)
            if self.how.smoothing > 1:
                found = smooth(found, self.how.smoothing, self.how.smoothing_sigma)
            return self.pattern.gather(found, phase)

        return gradient_at

    def _finite(self, values: Tensor, step: int) -> Tensor:
        fine = values.flatten(1).isfinite().all(1) if values.ndim > 1 else values.isfinite()
        if bool(fine.all()):
            return values
        bad = tuple(
            name for name, good in zip(self.batch.ids, fine.tolist(), strict=True) if not good
        )
        raise AttackError(
            f"loss or gradient is not finite at step {step} for samples {', '.join(bad)}; try "
            "float32 surrogates, or leave these samples out",
            sample_ids=bad,
            step=step,
        )
