"""M3ID: the longer the answer, the more the picture has to say in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from defenses.base import AdaptiveRoute
from defenses.decoding import DecodingDefense
from targets.decoding import Step, View


@dataclass(frozen=True, kw_only=True)
class M3ID(DecodingDefense):
    """Add what the picture changes about a token, more with every token said.

    Paper: Favero et al., "Multi-Modal Hallucination Control by Visual Information Grounding"
    (CVPR 2024, arXiv 2403.14003): with l_c and l_u the log-probabilities with and without the
    picture and ``γ_t = exp(−λ t)``::

        l* = l_c + 1[max_k l_c(k) < log α] · (1 − γ_t) / γ_t · (l_c − l_u)

    Args:
        forgetting: λ ≥ 0, per token; 0 is plain decoding, without the second pass.
        confidence: α in (0, 1]; only tokens whose likeliest candidate has less are changed.
        beams: width of the search.
        length_penalty: see `DecodingDefense`.

    Each token costs a second forward, of the text alone. Differentiable: an adaptive attack goes
    through both (the indicator has no gradient, what it switches has).

    *Differs from the paper in …*: λ and α are not public [unknown]; the defaults are ours, as is
    counting t from 1 [inferred], without which the first token of an answer is never changed. The
    rule is taken from secondary sources.
    """

    name: ClassVar[str] = "m3id"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.DIFFERENTIABLE

    forgetting: Annotated[float, Ge(0)] = 0.02
    confidence: Annotated[float, Interval(gt=0, le=1)] = 0.9

    def views(self) -> tuple[View, ...]:
        """The question without its picture."""
        return (View(image=False),) if self.forgetting else ()

    def logits(self, step: Step) -> Tensor:
        """Log-probabilities, corrected where the model is unsure."""
        if not self.forgetting:
            return step.logits
        return grounded(
            step.logits, step.views[0], step.first + 1, self.forgetting, self.confidence
        )


def grounded(
    logits: Tensor, blind: Tensor, first: int, forgetting: float, confidence: float
) -> Tensor:
    """The rule of `M3ID` on logits ``[B, R, vocabulary]``.

    Args:
        logits: with the picture.
        blind: without.
        first: t of the first of the R tokens, ≥ 1.
        forgetting: λ.
        confidence: α.
    """
    seen, unseen = logits.log_softmax(-1), blind.log_softmax(-1)
    t = torch.arange(first, first + logits.shape[1], device=logits.device)
    weight = torch.expm1(forgetting * t)[:, None]  # (1 − γ) / γ
    unsure = seen.amax(-1, keepdim=True) < math.log(confidence)
    return seen + unsure * weight * (seen - unseen)
