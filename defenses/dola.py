"""DoLa: subtract what an earlier layer would have said already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from defenses.base import AdaptiveRoute
from defenses.decoding import DecodingDefense, cut, plausible
from targets.decoding import Step


@dataclass(frozen=True, kw_only=True)
class DoLa(DecodingDefense):
    """Contrast the last layer with the earlier one that disagrees most.

    Paper: Chuang et al., "DoLa: Decoding by Contrasting Layers Improves Factuality in Large
    Language Models" (ICLR 2024, arXiv 2309.03883), Eq. 2 to 5; code voidism/DoLa. Among candidate
    depths the premature one M has the largest Jensen-Shannon divergence between
    ``softmax(final)`` and ``softmax(head(h_M))``; a token scores ``log p_final − log p_M`` if
    ``p_final ≥ b · max p_final``.

    It does not look at the picture: nothing a compressor dropped comes back.

    Args:
        candidates: depths, 0 is the embedding and d the output of the d-th layer; ``low`` is every
            other depth of the lower half, ``high`` of the upper (0, 2 … 14 or 16 … 30 of 32). With
            tied embeddings leave 0 out: it says the present token again.
        weight: of the premature layer, ≥ 0; the paper's is 1, and 0 is plain decoding.
        cutoff: b in [0, 1].
        beams: width of the search.
        length_penalty: see `DecodingDefense`.

    Each token costs the head once for every candidate. Differentiable: an adaptive attack goes
    through both layers (which one is premature has no gradient).

    *Differs from the paper in …*: the premature layer is found for each sample and token alone (the
    code takes the mean over the batch); `weight` is ours [inferred], to switch it off. Hidden
    states go to the head without the final normalisation, as in the code. There is no repetition
    penalty.
    """

    name: ClassVar[str] = "dola"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.DIFFERENTIABLE

    candidates: Literal["low", "high"] | tuple[int, ...] = "low"
    weight: Annotated[float, Ge(0)] = 1.0
    cutoff: Annotated[float, Interval(ge=0, le=1)] = 0.1

    def depths(self, layers: int) -> tuple[int, ...]:
        """The candidates, in a model of so many layers."""
        if not self.weight:
            return ()
        if self.candidates == "low":
            return tuple(range(0, layers // 2, 2)) or (0,)
        if self.candidates == "high":
            return tuple(range(layers // 2, layers, 2))
        return tuple(self.candidates)

    def logits(self, step: Step) -> Tensor:
        """Contrasted with the premature layer."""
        if not self.weight or not step.early:
            return step.logits
        early = torch.stack(list(step.early.values()))
        premature = most_divergent(step.logits, early)
        final = step.logits.log_softmax(-1)
        score = final - self.weight * premature.log_softmax(-1)
        return cut(score, plausible(final, self.cutoff))


def most_divergent(logits: Tensor, early: Tensor) -> Tensor:
    """Of candidates ``[C, B, R, vocabulary]`` the farthest from `logits`, token by token.

    Distance is the Jensen-Shannon divergence of the softmax; of equal ones the first is taken.
    """
    with torch.no_grad():
        final, others = logits.log_softmax(-1), early.log_softmax(-1)
        mean = torch.logaddexp(final, others) - torch.log(final.new_tensor(2.0))
        from_final = (final.exp() * (final - mean)).sum(-1)
        from_other = (others.exp() * (others - mean)).sum(-1)
        best = (from_final + from_other).argmax(0)  # [B, R]
    index = best[None, ..., None].expand(1, *logits.shape)
    return early.gather(0, index)[0]
