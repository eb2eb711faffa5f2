"""VEAttack: move the features of the vision tower as far as they go, all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from attacks.base import Proposal
from attacks.budget import Budget
from attacks.descent import Descent, descend
from attacks.encoder import EncoderAttack
from attacks.encoder_losses import drift
from attacks.seeds import SeedBank
from targets.base import Batch, EncoderView

_ALPHA = 1 / 255
"""The published step size, at 2/255 and at 4/255 alike."""


@dataclass(frozen=True, kw_only=True)
class VEAttack(EncoderAttack):
    """Turn the features of all image tokens away from the clean ones.

    Paper: Mei et al., "VEAttack" (arXiv 2505.17440), compared with hefeimei06/VEAttack-LVLM at
    ce600ec. Maximises ``mean_i (1 − cos(z_i, z_i^c))`` over the tokens, CLS left out. It knows
    nothing of compression: the measure of what an attack on the encoder does with all tokens.

    Args:
        steps: gradient steps T, ≥ 0; 0 is the random start alone.
        alpha: step size in [0, 1] pixel units; None is 1/255 at every epsilon.
        restarts: starts, best loss kept per sample, ≥ 1.
        momentum: decay in [0, 1] of a velocity v ← sign(momentum · v + sign(gradient)). Below 1
            it moves a pixel only where the gradient is exactly 0, as the published rule has it.
        layer: tower layer of the features, −1 the last.
        normalised: behind the tower's final normalisation, where it has one.
        random_start: begin at a random point of the ball.

    Raises:
        AttackError: see `attacks.descent.descend`.

    *Differs from the paper in …*: every iterate is judged as the 8-bit image that will be saved,
    and the best is kept instead of the last. The published code attacks the tower of its own copy
    of CLIP in another resolution; ours attacks the target's. Whether its features lie before or
    behind the final normalisation depends on the version of its library; before is our choice.
    """

    name: ClassVar[str] = "veattack"

    momentum: Annotated[float, Interval(ge=0, le=1)] = 0.9
    layer: int = -1
    normalised: bool = False
    random_start: bool = True

    def budget(self, epsilon: float) -> Budget:
        """Linf radius, step size, steps and restarts."""
        alpha = _ALPHA if self.alpha is None else self.alpha
        return Budget(epsilon, "linf", alpha, self.steps, self.restarts)

    def propose(self, view: EncoderView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Look at the clean images once, then move away from them."""
        with torch.no_grad():
            clean = self._features(view, batch.images)

        def loss(images: Tensor, step: int) -> Tensor:
            del step
            return -drift(self._features(view, images), clean).mean(1)

        how = Descent(momentum=self.momentum, velocity="direction", random_start=self.random_start)
        return descend(loss, batch, budget, rng, how=how)

    def _features(self, view: EncoderView, images: Tensor) -> Tensor:
        (seen,) = view.layers(images, (self.layer,), normalised=self.normalised)
        return seen.hidden
