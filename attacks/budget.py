"""The perturbation budget: projection onto the ball, and rounding to 8 bits that stays inside it.

Images are float32 ``[B, 3, H, W]`` in [0, 1]; a *level* is 1/255.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attacks.errors import AttackError

Norm = Literal["linf", "l2"]

LEVELS = 255
_BISECTIONS = 16


@dataclass(frozen=True, slots=True)
class Budget:
    """How far and how long an attack may go.

    Attributes:
        epsilon: radius in [0, 1] pixel units; for l2 the norm over all pixels and channels.
        norm: ``linf`` or ``l2``.
        alpha: step size in the unit of epsilon; None lets `step_size` choose.
        steps: optimisation steps of one restart.
        restarts: how often the optimisation starts afresh; the best is kept per sample.
        queries: most questions to the deployed target, per sample; 0 where none are asked.

    Raises:
        AttackError: for a radius that is negative, not finite, or above 1 in linf.
    """

    epsilon: float
    norm: Norm = "linf"
    alpha: float | None = None
    steps: int = 0
    restarts: int = 1
    queries: int = 0

    def __post_init__(self) -> None:
        top = 1.0 if self.norm == "linf" else math.inf
        if not 0 <= self.epsilon <= top or not math.isfinite(self.epsilon):
            raise AttackError(
                f"epsilon is {self.epsilon!r}; allowed for {self.norm} is "
                f"{'[0, 1]' if self.norm == 'linf' else '[0, inf)'} in pixel units of [0, 1]. "
                "Write 8/255, not 8."
            )

    @property
    def step_size(self) -> float:
        """`alpha`, or epsilon / 6 where none was given."""
        return self.epsilon / 6 if self.alpha is None else self.alpha

    @property
    def levels(self) -> int:
        """The largest n with n/255 ≤ epsilon, decided in float64 so that 8/255 gives 8."""
        guess = math.floor(self.epsilon * LEVELS)
        if (guess + 1) / LEVELS <= self.epsilon:
            return guess + 1
        return guess - 1 if guess / LEVELS > self.epsilon else guess

    @property
    def is_empty(self) -> bool:
        """No 8-bit image other than the clean one lies in the ball."""
        return self.epsilon < 1 / LEVELS


def to_levels(images: Tensor) -> Tensor:
    """The nearest 8-bit values of images in [0, 1], as float32 whole numbers."""
    return (images * LEVELS).round()


def from_levels(levels: Tensor) -> Tensor:
    """Images in [0, 1] of 8-bit values; exact, since it is the division every reader does."""
    return levels / LEVELS


def norms(delta: Tensor) -> tuple[Tensor, Tensor]:
    """Linf and l2 norm of each sample's ``[B, ...]`` difference, float64 ``[B]`` each."""
    flat = delta.double().flatten(1)
    return flat.abs().amax(1), flat.square().sum(1).sqrt()


def project(clean: Tensor, images: Tensor, budget: Budget) -> Tensor:
    """The nearest point to `images` in the ball around `clean`, then in [0, 1] (float, unrounded).

    Clamping to [0, 1] afterwards cannot leave the ball: `clean` is in [0, 1] itself.
    """
    delta = images - clean
    if budget.norm == "linf":
        delta = delta.clamp_(-budget.epsilon, budget.epsilon)
    else:
        length = delta.flatten(1).norm(dim=1).clamp_min(1e-12)
        delta = delta * (budget.epsilon / length).clamp_max(1.0).view(-1, 1, 1, 1)
    # In place on what was made here: this runs in every step.
    return delta.add_(clean).clamp_(0.0, 1.0)


def quantise(clean: Tensor, images: Tensor, budget: Budget) -> Tensor:
    """Project, then round to 8 bits such that the rounded image still lies in the ball.

    Args:
        clean: ``[B, 3, H, W]``, exact multiples of 1/255.
        images: ``[B, 3, H, W]``.
        budget: the ball.

    Returns:
        Exact multiples of 1/255. In linf a difference is rounded to the nearest level and, where
        that passes epsilon, to the last level inside. In l2 it is shrunk by the smallest common
        factor whose rounded image fits.
    """
    base = to_levels(clean)
    delta = project(clean, images, budget).mul_(LEVELS).sub_(base)
    if budget.norm == "linf":
        rounded = delta.round_().clamp_(-budget.levels, budget.levels)
    else:
        rounded = _round_in_sphere(delta, budget.epsilon)
    return from_levels(rounded.add_(base).clamp_(0, LEVELS))


def _round_in_sphere(delta: Tensor, epsilon: float) -> Tensor:
    """Round level differences ``[B, 3, H, W]``, scaled by the largest factor ≤ 1 that fits."""

    def fits(scale: Tensor) -> Tensor:
        _, length = norms((delta * scale.view(-1, 1, 1, 1)).round() / LEVELS)
        return length <= epsilon

    low = torch.zeros(len(delta), device=delta.device)
    high = torch.ones_like(low)
    whole = fits(high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        inside = fits(middle)
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    scale = torch.where(whole, torch.ones_like(low), low)
    return (delta * scale.view(-1, 1, 1, 1)).round()
