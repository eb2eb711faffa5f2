"""Raise the alarm: a picture that a detector flags, whatever the answer becomes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from attacks.base import Attack, Proposal
from attacks.budget import Budget
from attacks.descent import Descent, descend
from attacks.errors import AttackError
from attacks.evade import Suspicion
from attacks.seeds import SeedBank
from targets.base import Batch, Knowledge, WhiteBoxView


@dataclass(frozen=True, kw_only=True)
class RaiseAlarm(Attack):
    """Climb a detector's score, so that whatever an alarm sets off is set off by every request.

    An attack on availability: where a flagged request is answered again with all tokens, or goes
    to a person, whoever raises alarms takes the time of both. It minimises::

        −(score − threshold) / scale,   the score a mean over draws of a random detector

    No publication describes it; **it is ours**. Not in the catalogue: a run makes it of
    `attacks.force_fallback` with ``adaptive: true`` for each detector.

    Args:
        suspicion: of the detector; None before it is calibrated, when nothing can be attacked yet.
        limit: threshold above which it flags.
        scale: unit of the score, > 0: its deviation on clean pictures.
        draws: of a random detector, of which the mean is taken, ≥ 1.
        passes: passes of one picture through a model in one score, ≥ 1.
        steps: gradient steps T, ≥ 0.
        alpha: step size in [0, 1] pixel units; None is epsilon / 6. It falls to zero as a cosine.
        restarts: random starts, best loss kept per sample, ≥ 1.
        momentum: decay of accumulated gradients, ≥ 0.

    Raises:
        AttackError: where the score does not depend on the picture; see `attacks.descent.descend`.

    *Differs from the paper in …*: there is none. A monitor that watches a share of the traffic is
    attacked as if it watched all: which requests are watched is not the attacker's to choose.
    """

    name: ClassVar[str] = "raise_alarm"
    knowledge: ClassVar[Knowledge] = Knowledge.WHITE_BOX

    suspicion: Suspicion | None = None
    limit: float = 0.0
    scale: Annotated[float, Gt(0)] = 1.0
    draws: Annotated[int, Ge(1)] = 1
    passes: Annotated[int, Ge(1)] = 1
    steps: Annotated[int, Ge(0)] = 50
    alpha: Annotated[float, Gt(0)] | None = None
    restarts: Annotated[int, Ge(1)] = 1
    momentum: Annotated[float, Ge(0)] = 0.7

    @property
    def gradients_per_step(self) -> int:
        """Those of the score, of each draw."""
        return self.passes * self.draws

    def budget(self, epsilon: float) -> Budget:
        """Linf radius, step size, steps and restarts."""
        return Budget(epsilon, "linf", self.alpha, self.steps, self.restarts)

    def propose(self, view: WhiteBoxView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Climb from random starts: where both paths agree a monitor has no slope."""
        del view
        suspicion = self.suspicion
        if suspicion is None:
            raise AttackError("attack raise_alarm: the detector it sets off is not calibrated yet")
        asked = [0, 0]

        def loss(images: Tensor, step: int) -> Tensor:
            del step
            asked[0] += self.gradients_per_step
            asked[1] += self.gradients_per_step * images.requires_grad
            found = [suspicion(images, batch.questions, draw) for draw in range(self.draws)]
            return -(torch.stack(found).mean(0) - self.limit) / self.scale

        how = Descent(schedule="cosine", momentum=self.momentum)
        found = descend(loss, batch, budget, rng, how=how)
        return replace(found, forwards=asked[0], backwards=asked[1])
