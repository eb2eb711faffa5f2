"""The margin split: break the answer behind the compressor while the full path has to keep it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from attacks.base import Attack, Proposal
from attacks.budget import Budget
from attacks.descent import Descent, descend
from attacks.errors import AttackError
from attacks.seeds import SeedBank
from targets.base import Batch, Knowledge, WhiteBoxView

_MOST = 1e2
"""Of the multiplier; above it the compressed path's gradient is lost in the sign of the sum."""


@dataclass(frozen=True, kw_only=True)
class MarginSplit(Attack):
    """Drive the answer's margins on the full and on the compressed path apart, by a Lagrangian.

    **This attack is our own**, not a published one. It states a compression-specific failure as a
    constrained problem and hands the constraint to a multiplier per sample. With m the margin of
    the correct answer (`targets.base.PathMargins`), m_C through the compressor and m_F with all
    visual tokens::

        minimise  m_C(x')   subject to   m_F(x') ≥ kappa,   ‖x' − x‖ ≤ epsilon
        descend on  m_C − lambda · ⟨g, x'⟩,   g = ∇m_F of the last step that took it
        lambda ← clip(grow · lambda if m_F < kappa else shrink · lambda, floor, 100)

    The compressed path runs with the hard selection, and a sigmoid relaxation of the top-k carries
    the gradient back to the scores: ranking and content are attacked together, in whatever mixture
    breaks the answer, and the swap test says afterwards which it was. The multiplier takes the
    place of a fixed preservation weight. A sample whose full path is firm spends its steps on the
    compressed one; one whose full path gets thin turns back before it breaks. Margins are
    differences of log-probabilities, which do not level off while the model is still sure, as its
    likelihood does. A sample stops as soon as it is a failure of compression alone.

    The constraint is looked at in every step, but its gradient is taken in every `refresh`-th
    only: with small steps it hardly turns, and what it would have cost buys more steps.

    Built from: straight-through top-k (Bengio et al., arXiv 1308.3432), momentum (MI-FGSM, Dong et
    al., arXiv 1710.06081), multipliers for constrained attacks (Rony et al., "Augmented Lagrangian
    Adversarial Attacks", arXiv 2011.11857), and the outcome that CIRA counts (CSFR).

    A step runs the vision tower once and the language model twice, and counts as two forward
    passes. It takes one gradient, and a second one where that of the constraint is renewed.

    Args:
        steps: gradient steps T, ≥ 0; 0 is the start alone. It takes T + ⌈T / refresh⌉
            gradients, 99 by default.
        refresh: steps for which a gradient of the full path's margin serves, ≥ 1; 1 takes it anew
            in every step.
        alpha: step size in [0, 1] pixel units; None is epsilon / 2.
        restarts: starts, the best kept per sample, ≥ 1.
        momentum: decay of accumulated gradients in [0, 1].
        schedule: step size over the run.
        random_start: begin at a random point of the ball; restarts after the first always do. Off,
            the first begins at the clean image.
        kappa: full-path margin that is defended, in nats, ≥ 0.
        confidence: a sample stops when m_C < −confidence and m_F > confidence, in nats, ≥ 0; more
            than 0, so that the failure outlives the rounding of another batch.
        multiplier: lambda at the start, in [`floor`, 100].
        floor: least lambda, in (0, 100]: from far below it comes back too late.
        grow: factor on lambda while m_F < kappa, > 1.
        shrink: factor on lambda otherwise, in (0, 1).

    Raises:
        AttackError: `multiplier` out of range; see also `attacks.descent.descend`.

    *Differs from the papers in …*: there is no paper of this attack. Compared with multipliers for
    minimal perturbations, the radius is fixed, the constraint is on the model's second path, the
    update is multiplicative, and no penalty function is tuned.
    """

    name: ClassVar[str] = "margin_split"
    knowledge: ClassVar[Knowledge] = Knowledge.WHITE_BOX

    steps: Annotated[int, Ge(0)] = 90
    refresh: Annotated[int, Ge(1)] = 10
    alpha: Annotated[float, Gt(0)] | None = None
    restarts: Annotated[int, Ge(1)] = 1
    momentum: Annotated[float, Interval(ge=0, le=1)] = 0.7
    schedule: Literal["constant", "cosine", "halving"] = "cosine"
    random_start: bool = False
    kappa: Annotated[float, Ge(0)] = 1.0
    confidence: Annotated[float, Ge(0)] = 0.01
    multiplier: Annotated[float, Gt(0)] = 1.0
    floor: Annotated[float, Interval(gt=0, le=100)] = 0.3
    grow: Annotated[float, Gt(1)] = 1.5
    shrink: Annotated[float, Interval(gt=0, lt=1)] = 0.8

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not self.floor <= self.multiplier <= _MOST:
            raise AttackError(
                f"attack {self.name}: multiplier is {self.multiplier}; allowed is "
                f"[{self.floor}, {_MOST:g}], from floor on"
            )

    @property
    def gradients_per_step(self) -> int:
        """At most one on each path; see `gradients` for a whole run."""
        return 2

    def gradients(self, budget: Budget) -> int:
        """One a step, and one more where the constraint's is renewed."""
        return budget.restarts * (budget.steps + math.ceil(budget.steps / self.refresh))

    def budget(self, epsilon: float) -> Budget:
        """Radius, step size, steps and restarts."""
        alpha = epsilon / 2 if self.alpha is None else self.alpha
        return Budget(epsilon, "linf", alpha, self.steps, self.restarts)

    def believes(self, batch: Batch, losses: Sequence[float | None]) -> list[bool | None]:
        """Below −confidence the margin through the compressor is negative: another token wins."""
        del batch
        return [None if loss is None else loss < -self.confidence for loss in losses]

    def propose(self, view: WhiteBoxView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Descend on the Lagrangian; what fails only compressed leaves."""
        objective = _Objective(self, view, batch)
        how = Descent(
            momentum=self.momentum,
            schedule=self.schedule,
            random_start=self.random_start,
        )
        return descend(objective, batch, budget, rng, how=how)


class _Objective:
    """The Lagrangian's gradient, with the value of what is wanted: ``[B]``.

    Samples that are failures of compression alone are done.
    """

    def __init__(self, attack: MarginSplit, view: WhiteBoxView, batch: Batch) -> None:
        self.attack, self.view, self.batch = attack, view, batch
        self.multiplier = torch.zeros(len(batch.ids), device=batch.images.device)
        self.slope = torch.zeros_like(batch.images)  # of the full path's margin, [B, 3, H, W]

    def __call__(self, images: Tensor, step: int) -> Tensor:
        attack = self.attack
        if step == 0:  # a restart begins with the first multiplier too
            self.multiplier = torch.full_like(self.multiplier, attack.multiplier)
        renew = step % attack.refresh == 0 and images.requires_grad
        found = self.view.path_margins(
            images, self.batch.questions, self.batch.answers, full_gradient=renew
        )
        if renew:
            (self.slope,) = torch.autograd.grad(found.full.sum(), images, retain_graph=True)
        compressed, full = found.compressed.detach(), found.full.detach()
        multiplier = self.multiplier
        self.multiplier = renewed(
            multiplier, full, attack.kappa, attack.grow, attack.shrink, attack.floor
        )
        lagrangian = found.compressed - multiplier * (self.slope * images).flatten(1).sum(1)
        # Iterates are compared by what is wanted, whatever multiplier they were made with.
        value = worth(compressed, full, attack.confidence)
        return value + (lagrangian - lagrangian.detach())

    def done(self, images: Tensor, loss: Tensor, may: Tensor) -> Tensor:
        del images
        return may & (loss < -self.attack.confidence)

    def of(self, rows: Sequence[int]) -> _Objective:
        """The same of some samples, with the multipliers and slopes they have."""
        some = _Objective(self.attack, self.view, self.batch.rows(rows))
        places = list(rows)
        some.multiplier, some.slope = self.multiplier[places], self.slope[places]
        return some


def renewed(
    multiplier: Tensor, full: Tensor, kappa: float, grow: float, shrink: float, floor: float
) -> Tensor:
    """The multiplier of the next step, ``[B]``.

    Args:
        multiplier: of this step, ``[B]``.
        full: ``[B]`` margin on the full path.
        kappa: margin below which the constraint is violated.
        grow: factor where it is.
        shrink: factor where it is not.
        floor: least multiplier.
    """
    factor = torch.where(full < kappa, grow, shrink).to(multiplier)
    return (multiplier * factor).clamp(floor, _MOST)


def worth(compressed: Tensor, full: Tensor, confidence: float) -> Tensor:
    """What an image is worth, minimised: first the full path has to be right, ``[B]``.

    The compressed margin where the full margin is above `confidence`; elsewhere 1000 more than the
    full margin lacks, so that such an image loses against any that the full path reads.

    Args:
        compressed: ``[B]`` margin on the compressed path.
        full: ``[B]`` margin on the full path.
        confidence: in nats, ≥ 0.
    """
    return torch.where(full > confidence, compressed, 1e3 + confidence - full)
