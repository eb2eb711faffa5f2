"""Attacks on how many tokens a compressor keeps, where the picture decides that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from attacks.base import Attack, Proposal
from attacks.budget import Budget
from attacks.descent import Descent, descend
from attacks.objectives import answer_divergence
from attacks.seeds import SeedBank
from targets.base import Batch, Knowledge, Ranking, WhiteBoxView

if TYPE_CHECKING:
    from targets.compression.base import Compressor

FIXED = (
    "the number of tokens kept at the first cut does not depend on what the picture shows, so no "
    "attack can change it; compressors whose budget follows from the picture are prumerge without "
    "a budget, sparsevlm with variant rank, and token_sparse_attention with coverage"
)
"""Why there is nothing to do against a compressor of fixed budget."""


@dataclass(frozen=True, kw_only=True)
class TokenCount(Attack):
    """Make a compressor keep more tokens than it should, or fewer, and spare the answer.

    Papers: the sparsification sponges DeSparsify (Navon et al., "DeSparsify: Adversarial Attack
    Against Token Sparsification Mechanisms in Vision Transformers", NeurIPS 2024, arXiv 2402.02554)
    and SlowFormer (Navaneet et al., CVPR 2024, arXiv 2310.02544), whose loss is L_atk + λ L_cls.
    For compressors of LVLMs nothing of the kind is published; **this is our transfer of it**::

        L = ∓ C(x) / V + λ KL(p(·|clean) ‖ p(·|attacked))

    C is each mechanism's own relaxation of its count (`Compressor.soft_count`): sigmoids around
    the bar, or the coverage, that decides about a token; V is the number of tokens there are. The
    KL divergence is taken on the right answer's tokens.

    Args:
        direction: ``more`` tokens kept (a sponge: an attack on availability), or ``fewer`` (the
            compressor starves the model).
        preserve: the path whose answer is to stay as it is: through the compressor, which is what
            users see, with all tokens, or neither.
        preserve_weight: λ, ≥ 0.
        steps: gradient steps T, ≥ 0.
        alpha: step size in [0, 1] pixel units; None is epsilon / 6. It falls to zero as a cosine.
        restarts: random starts, best loss kept per sample, ≥ 1.
        momentum: decay of accumulated gradients in [0, 1].

    Raises:
        AttackError: see `attacks.descent.descend`.

    *Differs from the papers in …*: they attack token sparsification inside classifiers; there, each
    mechanism has a loss on its scores, here a relaxation of the count itself. A compressor that
    keeps a fixed number gives the clean images back, and a note says so.
    """

    name: ClassVar[str] = "token_count"
    knowledge: ClassVar[Knowledge] = Knowledge.WHITE_BOX
    sometimes_idle: ClassVar[bool] = True

    direction: Literal["more", "fewer"] = "more"
    preserve: Literal["compressed", "full", "none"] = "compressed"
    preserve_weight: Annotated[float, Ge(0)] = 0.1
    steps: Annotated[int, Ge(0)] = 100
    alpha: Annotated[float, Gt(0)] | None = None
    restarts: Annotated[int, Ge(1)] = 1
    momentum: Annotated[float, Interval(ge=0, le=1)] = 0.7

    @property
    def needs(self) -> Knowledge:
        """The whole model only if an answer is preserved; else no further than the ranking."""
        return Knowledge.WHITE_BOX if self.preserves else Knowledge.COMPRESSED

    @property
    def preserves(self) -> bool:
        """Whether an answer is held."""
        return self.preserve != "none" and self.preserve_weight > 0

    def idle(self, compressor: Compressor) -> str | None:
        """Why there is nothing to do where the number of kept tokens is fixed."""
        return None if compressor.count_varies else FIXED

    @property
    def gradients_per_step(self) -> int:
        """Two where an answer is preserved: through the ranking, and through the answer."""
        return 2 if self.preserves else 1

    def budget(self, epsilon: float) -> Budget:
        """Linf radius, step size, steps and restarts."""
        return Budget(epsilon, "linf", self.alpha, self.steps, self.restarts)

    def propose(self, view: WhiteBoxView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Descend on L, or give the clean images back where no number can change."""
        with torch.no_grad():
            fixed = view.rank(batch.images, batch.questions).soft_count is None
        if fixed:
            return Proposal(batch.images, notes=(f"nothing was changed: {FIXED}",))
        objective = _Objective(self, view, batch)
        how = Descent(schedule="cosine", momentum=self.momentum)
        return descend(objective, batch, budget, rng, how=how)


class _Objective:
    """L for one batch, ``[B]`` per call."""

    def __init__(self, attack: TokenCount, view: WhiteBoxView, batch: Batch) -> None:
        self.attack, self.view, self.batch = attack, view, batch
        self.clean: Tensor | None = None
        if attack.preserves:
            with torch.no_grad():
                self.clean, _ = self._answer(batch.images)

    def __call__(self, images: Tensor, step: int) -> Tensor:
        del step
        attack, batch = self.attack, self.batch
        if self.clean is None:
            return counted(self.view.rank(images, batch.questions), attack.direction)
        if attack.preserve == "full":
            logprobs, positions, ranking = self.view.full_and_rank(
                images, batch.questions, batch.answers
            )
        else:
            ranking = self.view.rank(images, batch.questions)
            logprobs, positions = self._answer(images)
        changed = answer_divergence(self.clean, logprobs, positions)
        return counted(ranking, attack.direction) + attack.preserve_weight * changed

    def _answer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        path: Literal["full", "compressed"] = (
            "full" if self.attack.preserve == "full" else "compressed"
        )
        return self.view.answer_logprobs(
            images, self.batch.questions, self.batch.answers, path=path
        )


def counted(ranking: Ranking, direction: Literal["more", "fewer"]) -> Tensor:
    """Relaxed share of tokens kept, ``[B]``, negative where more of them are wanted."""
    if ranking.soft_count is None:
        return torch.zeros_like(ranking.score[:, 0])
    share = ranking.soft_count / ranking.score.shape[1]
    return -share if direction == "more" else share
