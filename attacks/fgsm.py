"""The fast gradient sign method: one step as far as the budget allows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from attacks.answers import Aim, AnswerLoss, choose_targets
from attacks.base import Attack, Proposal
from attacks.budget import Budget, project
from attacks.descent import Descent, descend, direction
from attacks.seeds import SeedBank
from targets.base import Batch, Knowledge, WhiteBoxView

_STEP = {"clean": 1.0, "rfgsm": 0.5, "fast": 1.25}
"""Step in units of epsilon."""


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """Take one gradient step on the likelihood of the answer.

    Paper: Goodfellow et al., "Explaining and Harnessing Adversarial Examples" (arXiv 1412.6572),
    ``x + epsilon · sign(∇L)``; in l2 ``x + epsilon · ∇L / ‖∇L‖``. The cheapest attack with a
    gradient, and a check on dearer ones: an iterative attack that does not beat it is broken.

    Args:
        path: ``full`` attacks the model with all visual tokens and does not know the compressor;
            ``compressed`` attacks through the compressor, straight-through the top-k.
        start: ``clean``; ``rfgsm``, random signs of epsilon / 2 (in l2 a random direction), then
            a step of epsilon / 2 (Tramèr et al., arXiv 1705.07204); ``fast``, a uniform point of
            the ball, then a step of 1.25 epsilon, clipped (Wong et al., arXiv 2001.03994).
        target: None, any wrong answer; ``option``, each sample's likeliest wrong option on the
            clean image; or the wanted answer itself. See `attacks.pgd.PGD`.
        norm: norm of the ball.

    Raises:
        AttackError: a right answer that is not among its options; see also
            `attacks.descent.descend`.

    *Differs from the paper in …*: the loss is the mean cross-entropy of a sequence, and a step
    that makes it worse is not taken, at the price of one more forward pass.
    """

    name: ClassVar[str] = "fgsm"
    knowledge: ClassVar[Knowledge] = Knowledge.WHITE_BOX

    path: Literal["full", "compressed"] = "full"
    start: Literal["clean", "rfgsm", "fast"] = "clean"
    target: str | None = None
    norm: Literal["linf", "l2"] = "linf"

    @property
    def knows_compression(self) -> bool:
        """Only on the compressed path."""
        return self.path == "compressed"

    def budget(self, epsilon: float) -> Budget:
        """Radius, norm and a single step."""
        return Budget(epsilon, self.norm, _STEP[self.start] * epsilon, steps=1)

    def propose(self, view: WhiteBoxView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """One step of descent."""
        targets, notes = choose_targets(view, batch, self.target, self.path)
        objective = AnswerLoss(view, batch, Aim(path=self.path), targets)
        begin = half_way(batch.images, budget, rng) if self.start == "rfgsm" else None
        how = Descent(random_start=self.start == "fast")
        found = descend(objective, batch, budget, rng, how=how, start=begin)
        return replace(found, notes=notes)


def half_way(clean: Tensor, budget: Budget, rng: SeedBank) -> Tensor:
    """A random corner (in l2 a random direction) at half the radius around ``[B, 3, H, W]``."""
    away = direction(rng.normal(clean.shape[1:]), budget)
    return project(clean, clean + budget.epsilon / 2 * away, budget)
