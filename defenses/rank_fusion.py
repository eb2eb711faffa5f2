"""Rank fusion: keep what several scorers rank high, not one alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from defenses.base import AdaptiveRoute, DefenseError
from defenses.selection import SelectionDefense, rank_quantiles, soft_quantiles
from targets.compression.base import Compressor, Scores, Seen
from targets.compression.scoring import log_probability, ranks, standardised
from targets.compression.tower import at_places, tower_of
from targets.errors import CompressionError

_RRF = 60
"""The constant of reciprocal-rank fusion."""


@dataclass(frozen=True, kw_only=True)
class RankFusion(SelectionDefense):
    """Fuse the compressor's ranking with those of CLS attention at other layers of the tower.

    [inferred]: an ensemble of scorers as aggregation of their rankings. With r the rank from 1 of a
    token in each of m rankings: Borda, the mean rank quantile; reciprocal-rank fusion,
    ``Σ 1 / (60 + r)`` (Cormack et al., SIGIR 2009); or votes, in how many it is among the K best,
    equal ones told apart by Borda. The compressor's own score is always one of the m; in towers
    without CLS the others are the mean attention a token receives. Costs no pass.

    Args:
        layers: of the tower, counted from the one that makes the features: 0 is that one, −1 the
            one before. Those a shallow tower does not have are left out; none is no defence.
        fusion: ``borda``, ``rrf`` or ``vote``.

    Raises:
        DefenseError: for a layer behind the features, or named twice; when it is to protect what
            does not choose a number fixed in advance at one point.
        CompressionError: for a compressor that chooses tokens one after another.

    *Differs from the paper in …*: there is none. One attack (CIRA) is built to turn the ranking of
    several layers at once, so agreement between layers is no proof. Backward, soft ranks stand
    for the ranks, whatever the fusion.
    """

    name: ClassVar[str] = "rank_fusion"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.BPDA

    layers: tuple[int, ...] = (0, -1, -3)
    fusion: Literal["borda", "rrf", "vote"] = "borda"

    def __post_init__(self) -> None:
        """Check the layers."""
        wrong = [layer for layer in self.layers if layer > 0]
        if wrong or len(set(self.layers)) != len(self.layers):
            raise DefenseError(
                f"defence rank_fusion: layers are {list(self.layers)}; allowed: 0 (the layer that "
                "makes the features) and negative ones before it, each once"
            )

    def refuses(self, compressor: Compressor) -> str | None:
        """Also what does not choose by an attention, whose scale of importance is another."""
        if not compressor.attends:
            return "it does not choose by an attention, so there is no ranking of a kind to fuse"
        return super().refuses(compressor)

    def tower_layers(self, layers: int, feature_layer: int) -> tuple[int, ...]:
        """Those of `layers` that the tower has."""
        del layers
        return tuple(sorted(feature_layer + n for n in self.layers if feature_layer + n >= 0))

    def combine(self, own: Scores, others: Sequence[Scores], seen: Seen) -> Scores:
        """The fusion of the compressor's ranking and those of the layers."""
        del others
        if not self.layers:
            return own
        if own.chosen is not None:
            raise CompressionError(
                f"defence {self.name} does not go with a compressor that chooses tokens one after "
                "another: its scores say when a token was taken, not how important it is"
            )
        vision = tower_of(seen, self.name)
        paid = [
            at_places(vision.attention(layer).mean(1), seen)
            for layer in self.tower_layers(0, vision.feature_layer)
        ]
        scores = [own.score, *paid]
        logs = [own.log_score, *(log_probability(one) for one in paid)]
        hard = fused(scores, seen.valid, seen.counts, self.fusion)
        soft = torch.stack([soft_quantiles(one, seen.valid) for one in logs]).mean(0)
        score = hard + (soft - soft.detach())
        return Scores(score, standardised(soft, seen.valid), own.attends)


def fused(scores: Sequence[Tensor], valid: Tensor, counts: Tensor, fusion: str) -> Tensor:
    """One score out of m rankings, float64 ``[I, V]`` without gradient; 0 where not valid.

    Args:
        scores: m of ``[I, V]``, larger is better.
        valid: bool ``[I, V]``.
        counts: long ``[I]``, K of a vote.
        fusion: ``borda``, ``rrf`` or ``vote``.
    """
    places = torch.stack([ranks(one, valid) for one in scores])
    if fusion == "rrf":
        found = (1 / (_RRF + 1 + places.double())).sum(0)
    else:
        found = torch.stack([rank_quantiles(one, valid).double() for one in scores]).mean(0)
        if fusion == "vote":
            found = (places < counts[:, None]).sum(0) + found / 2
    return found.masked_fill(~valid, 0)
