"""Projected descent that chooses its step size by itself, per sample: the loop of Auto-PGD.

Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks" (arXiv 2003.01690), algorithm 1. Like `attacks.descent.descend` it judges
8-bit images and keeps the best, and lets samples go that are done; samples do not depend on their
neighbours.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from attacks.base import Proposal
from attacks.budget import Budget, project
from attacks.descent import Objective, Run, Work, best_restart, direction, evaluate, finished
from attacks.seeds import SeedBank
from targets.base import Batch

MOMENTUM: Final = 0.75
"""Alpha of the paper: weight of the step in the update; the rest is the last move."""
RHO: Final = 0.75
"""Share of steps that must improve between two checkpoints, or the step size is halved."""
FIRST_STEP: Final = 2.0
"""Step size at the beginning, in units of epsilon."""
_FIRST, _SHRINK, _SHORTEST = 22, 3, 6  # percent of the steps; whole, so that ceil is exact


def checkpoints(steps: int) -> tuple[int, ...]:
    """Steps w_j at which the step size may be halved, ``⌈p_j · steps⌉``.

    p_1 = 0.22 and p_{j+1} = p_j + max(p_j − p_{j−1} − 0.03, 0.06): 0.22, 0.41, 0.57, 0.70 …
    """
    found, before, now = [], 0, _FIRST
    while now <= 100:
        found.append(-(-now * steps // 100))
        before, now = now, now + max(now - before - _SHRINK, _SHORTEST)
    return tuple(sorted(set(found) - {0}))


def autostep(
    objective: Objective,
    batch: Batch,
    budget: Budget,
    rng: SeedBank,
    *,
    random_start: bool = True,
    mask: Tensor | None = None,
) -> Proposal:
    """Minimise an objective over the ball around the clean images, without a step size to set.

    Args:
        objective: loss ``[B]`` of images.
        batch: clean images, float32 ``[B, 3, H, W]``, and the ids for error messages.
        budget: radius, norm, steps T and restarts; its alpha is not used. A restart costs T + 1
            forward and T backward passes.
        rng: randomness of the starts.
        random_start: begin at a random point of the ball; restarts after the first always do.
        mask: ``[B, 1, H, W]`` of 0 and 1; only pixels with 1 move.

    Returns:
        Per sample the best iterate over all restarts, with the trace of its restart.

    Raises:
        AttackError: the loss does not depend on the image, or a loss or gradient is not finite.
    """

    def run(work: Work, begin: Tensor) -> Run:
        return _run(work, Run.blank(batch.images, budget), budget, begin)

    first = None if random_start else batch.images
    work = Work.all(objective, batch, mask)
    return finished(work, best_restart(run, work, budget, rng, first), budget)


class _Best:
    """Per sample the best point walked on so far, and the gradient there."""

    def __init__(self, start: Tensor) -> None:
        self.loss = torch.full((len(start),), math.inf, device=start.device)
        self.walked, self.gradient = start, torch.zeros_like(start)

    def see(self, walked: Tensor, loss: Tensor, gradient: Tensor) -> None:
        take = loss < self.loss
        self.loss = torch.where(take, loss, self.loss)
        here = take.view(-1, 1, 1, 1)
        self.walked = torch.where(here, walked, self.walked)
        self.gradient = torch.where(here, gradient, self.gradient)

    def only(self, stay: Tensor) -> None:
        """Forget samples that are done."""
        self.loss, self.walked = self.loss[stay], self.walked[stay]
        self.gradient = self.gradient[stay]


class _Sizes:
    """Per sample the step size, halved where the last stretch between checkpoints failed."""

    def __init__(self, budget: Budget, like: Tensor) -> None:
        self.size = torch.full_like(like, FIRST_STEP * budget.epsilon)
        self._due = checkpoints(budget.steps)
        self._best = torch.full_like(like, math.inf)  # at the last checkpoint
        self._halved = torch.ones_like(like, dtype=torch.bool)  # there is nothing to compare yet
        self._last = 0

    def only(self, stay: Tensor) -> None:
        """Forget samples that are done."""
        self.size, self._best, self._halved = self.size[stay], self._best[stay], self._halved[stay]

    def check(self, step: int, losses: Tensor, best: Tensor) -> Tensor:
        """Halve where due; True where a sample has to go back to its best iterate, ``[B]``.

        Losses are ``[T + 1, B]``, known up to this step; `best` is the lowest so far, ``[B]``.

        Condition 1: fewer than rho of the steps since the last checkpoint improved on the step
        before. Condition 2: neither step size nor best loss changed since then.
        """
        if step == 0:
            self._best = best
        if step not in self._due:
            return torch.zeros_like(self._halved)
        stretch = losses[self._last : step + 1]
        improved = (stretch[1:] < stretch[:-1]).sum(0)
        stuck = improved < RHO * (step - self._last)
        stuck |= ~self._halved & (best == self._best)
        self.size = torch.where(stuck, self.size / 2, self.size)
        self._last, self._best, self._halved = step, best, stuck
        return stuck


def _run(work: Work, run: Run, budget: Budget, start: Tensor) -> Run:
    images = previous = start
    best, sizes = _Best(start), _Sizes(budget, start[:, 0, 0, 0])
    for step in range(budget.steps + 1):
        seen = evaluate(work.objective, work.batch, images, budget, step)
        gradient = seen.gradient if work.mask is None else seen.gradient * work.mask
        done = run.judge(work, seen, step)
        best.see(images, seen.loss, gradient)
        if step == budget.steps:
            break
        if done is not None:
            if bool(done.all()):
                break
            work, stay = work.only(~done), ~done
            images, previous, gradient = images[stay], previous[stay], gradient[stay]
            best.only(stay)
            sizes.only(stay)
        run.slope(work, gradient, step)
        back = sizes.check(step, run.loss[:, work.rows], best.loss).view(-1, 1, 1, 1)
        images = torch.where(back, best.walked, images)
        gradient = torch.where(back, best.gradient, gradient)
        ahead = images - sizes.size.view(-1, 1, 1, 1) * direction(gradient, budget)
        clean = work.batch.images
        moved = project(clean, ahead, budget)
        if step > 0:
            blend = MOMENTUM * (moved - images) + (1 - MOMENTUM) * (images - previous)
            moved = project(clean, images + blend, budget)
        images, previous = moved, images
    return run
