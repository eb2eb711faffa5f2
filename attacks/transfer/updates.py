"""Update rules of transfer attacks: how gradients become a step. All minimise.

A *point* is whatever is optimised, ``[B, C, h, w]``: a perturbation, or a template of one. A
*gradient at a point* is a function, because some rules ask for more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.seeds import SeedBank

GradientAt = Callable[[Tensor], Tensor]
Feasible = Callable[[Tensor], Tensor]
"""Maps a point to the nearest one that is allowed."""
_TINY = 1e-30


def unit(gradient: Tensor) -> Tensor:
    """A gradient divided by its mean absolute value, sample by sample."""
    return gradient / gradient.abs().flatten(1).mean(1).clamp_min(_TINY).view(-1, 1, 1, 1)


def accumulate(velocity: Tensor, gradient: Tensor, momentum: float) -> Tensor:
    """``v ← mu·v + g / mean|g|`` (MI-FGSM, Dong et al., arXiv 1710.06081, eq. 6).

    The paper divides by the sum, which is the mean times a constant: the direction is the same.
    """
    return momentum * velocity + unit(gradient)


def look_ahead(point: Tensor, velocity: Tensor, alpha: float, momentum: float) -> Tensor:
    """``z − alpha·mu·v``, where Nesterov's gradient is taken (NI, Lin et al., 1908.06281).

    With velocities of `accumulate`, about 1 per entry, as in published code; the paper's have a sum
    of 1, which would look ahead by next to nothing.
    """
    return point - alpha * momentum * velocity


def variance(
    gradient_at: GradientAt,
    point: Tensor,
    gradient: Tensor,
    rng: SeedBank,
    radius: float,
    count: int,
) -> Tensor:
    """Mean gradient of random neighbours minus the gradient (VMI, Wang & He, 2103.15571).

    ``V(z) = 1/N Σ ∇J(z + r_i) − ∇J(z)``, r_i uniform in [−radius, radius]. It is added to the
    gradient of the *next* step, before momentum.

    Args:
        gradient_at: of the loss.
        point: z.
        gradient: ∇J(z).
        rng: one stream per sample.
        radius: beta × epsilon; the paper's beta is 1.5.
        count: N ≥ 1; the paper's is 20.
    """
    total = torch.zeros_like(gradient)
    for number in range(count):
        noise = rng.child(f"neighbour {number}").uniform(point.shape[1:], -radius, radius)
        total = total + gradient_at(point + noise.to(point))
    return total / count - gradient


def mean_of(gradients: Sequence[Tensor]) -> Tensor:
    """Mean of the surrogates' gradients, each divided by its mean size, so that none drowns."""
    return torch.stack([unit(gradient) for gradient in gradients]).mean(0)


@dataclass(frozen=True, slots=True)
class CommonWeakness:
    """The ensemble step of CWA (Chen et al., "Rethinking Model Ensemble", arXiv 2303.09105).

    Seeks a point that is flat for every model and where their gradients agree. One step from z::

        z^0 = z + reverse · sign(∇ mean_f J_f(z))            (SAM: first uphill)
        m   ← mu·m − ∇J_f(z^i) / ‖∇J_f(z^i)‖_2,   z^{i+1} = z^i + inner · m,   f = 1 … n in turn
        M   ← mu·M + (z^n − z) / mean|z^n − z|,   z ← z + alpha · sign(M)

    every point clipped to what is allowed (algorithm 1 and the published settings of MI-CWA).

    Attributes:
        alpha: outer step in the unit of the point.
        reverse: step uphill; the paper's is epsilon / 15.
        inner: step of each model, times a gradient of length 1; the paper's is 250.
        momentum: mu.
    """

    alpha: float
    reverse: float
    inner: float
    momentum: float

    def step(
        self,
        members: Sequence[GradientAt],
        point: Tensor,
        inner_velocity: Tensor,
        velocity: Tensor,
        feasible: Feasible,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One outer step.

        Args:
            members: the gradient of each surrogate's loss.
            point: z.
            inner_velocity: m.
            velocity: M.
            feasible: projection onto what is allowed.

        Returns:
            New z, m and M, and the mean gradient at the old z.
        """
        uphill = torch.stack([gradient_at(point) for gradient_at in members]).mean(0)
        now = feasible(point + self.reverse * uphill.sign())
        for gradient_at in members:
            gradient = gradient_at(now)
            length = gradient.flatten(1).norm(dim=1).clamp_min(_TINY).view(-1, 1, 1, 1)
            inner_velocity = self.momentum * inner_velocity - gradient / length
            now = feasible(now + self.inner * inner_velocity)
        velocity = self.momentum * velocity + unit(now - point)
        moved = feasible(point + self.alpha * velocity.sign())
        return moved, inner_velocity, velocity, uphill
