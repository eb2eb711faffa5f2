"""Suppression of attention alone: FATA's baseline, which does not mind what else it breaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from attacks.base import Proposal
from attacks.budget import Budget
from attacks.descent import Descent
from attacks.encoder import EncoderAttack
from attacks.fata import suppress
from attacks.seeds import SeedBank
from targets.base import Batch, EncoderView


@dataclass(frozen=True, kw_only=True)
class AttentionOnly(EncoderAttack):
    """Take the attention away from the most important tokens, whatever becomes of their features.

    Paper: the baseline "Base" of "Feature-Aware Token Attack", its loss with lambda = 0: minimise
    ``Σ_M s``, the attention that CLS pays, in the last layer of the vision tower, to the tokens it
    pays most on the clean image.

    Args:
        steps: gradient steps T, ≥ 0; 0 is the random start alone.
        alpha: step size in [0, 1] pixel units; None is epsilon / 4.
        restarts: starts, best loss kept per sample, ≥ 1.
        top: number of tokens in M, ≥ 1; None is 64 of 576, the same share of any other number.
        random_start: begin at a random point of the ball.

    Raises:
        AttackError: see `attacks.descent.descend`.

    *Differs from the paper in …*: as `attacks.fata.FATA` does.
    """

    name: ClassVar[str] = "attention_only"
    takes_penalty: ClassVar[bool] = True

    top: Annotated[int, Ge(1)] | None = None
    random_start: bool = True

    def propose(self, view: EncoderView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Fix M on the clean images, then descend."""
        how = Descent(random_start=self.random_start)
        return suppress(view, batch, budget, rng, how, self.top, 0.0)
