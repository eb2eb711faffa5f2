"""Generic compression by explainability: a small network learnt which tokens explain the answer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from targets.compression import trained
from targets.compression.base import Compressor, Scores, Seen, Stage
from targets.compression.explainability_net import RelevanceNet
from targets.errors import CompressionError

if TYPE_CHECKING:
    from targets.compression.sight import TextSight
    from targets.families.base import Family


@dataclass(frozen=True, kw_only=True)
class Explainability(Compressor):
    """Keep the tokens that a small network takes for the reason of the answer to come.

    Paper: "Generic Token Compression in Multimodal Large Language Models from an Explainability
    Perspective" (ICLR 2026, arXiv 2506.01097). The network f sees the attention of the language
    model's layer 0 to the visual tokens, mean over heads and over the words of the question,
    computed from the raw input embeddings; five depthwise-separable 1-D convolutions make a
    distribution over tokens of it, and the tokens with the largest share enter the language model.
    f was trained on the relevance of each token for the answers: ``R ← R + E_h[(A · dA)⁺] R`` over
    all layers, with dA the gradient of a generated token's logit; the row of that token, mean over
    the answer, its lower half set to zero (`targets.scenes.compressors.relevance`).

    Args:
        retention: kept ÷ all visual tokens, in (0, 1].
        keep_tokens: visual tokens kept of each image, ≥ 1, instead of retention.
        weights: trained weights, by the name of the scenes model they are shipped with
            (``scenes-a``) or as a folder; ``none`` is the untrained mode: f with starting values
            from seed 0, which ranks no better than chance.
        positions: whether kept tokens keep their position ids.

    Raises:
        CompressionError: for an option outside its range, or weights that cannot be read.

    *Differs from the paper in …*: a reconstruction, there is no public code. Kernel (7), activation
    (GELU), norms (over channels, behind all convolutions but the first), the pointwise head, the
    logarithm of the input over its mean, and contiguous positions are [inferred]. The shipped f has
    half the paper's channels. The question is the text behind the last image of the prompt, the
    end of the chat template included; where there is none, the last prompt token. Absent places
    are zero to f, as beyond the ends of the row.
    """

    name: ClassVar[str] = "explainability"

    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    weights: str = "scenes-a"
    positions: Literal["keep", "reindex"] = "reindex"

    @property
    def stage(self) -> Stage:
        """At the input of layer 0, whose queries and keys it needs: nothing has run yet."""
        return Stage.LAYER

    @property
    def prunes_at(self) -> int:
        """Layer 0."""
        return 0

    def refuses(self, family: Family) -> str | None:
        """Weights of another model."""
        return trained.misfit(self.name, self.weights, family)

    def score(self, seen: Seen) -> Scores:
        """Share of the relevance that f expects of each token, ``[I, V]``; rows sum to 1."""
        if seen.text is None:
            raise CompressionError("explainability needs to see the prompt at layer 0")
        attention = seen.text.attention(asking(seen.text)).mean(1)
        network = self._network.to(attention.device, attention.dtype)
        logs = network(attention, seen.valid)
        return Scores(logs.exp().masked_fill(~seen.valid, 0), logs)

    @cached_property
    def _network(self) -> RelevanceNet:
        if self.weights == trained.UNTRAINED:
            network: Any = trained.seeded(RelevanceNet, {})
            network.eval().requires_grad_(False)
        else:
            found = trained.read(self.name, self.weights)
            network = trained.seeded(RelevanceNet, found.network)
            found.fill(network, self.name)
        made: RelevanceNet = network
        return made


def asking(text: TextSight) -> Tensor:
    """Columns of the question, bool ``[B, n]``: behind the last image, else the last one."""
    behind = text.words_after()
    last = torch.zeros_like(behind)
    last[:, text.last] = True
    return torch.where(behind.any(1, keepdim=True), behind, last)
