"""Hybrid selection: some tokens by attention, the others by how far they are from those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from defenses.base import AdaptiveRoute
from defenses.selection import SelectionDefense
from targets.compression.base import Scores, Seen
from targets.compression.divprune import cosine_distance
from targets.compression.scoring import precise, standardised, standardised_log, top_k_mask


@dataclass(frozen=True, kw_only=True)
class Hybrid(SelectionDefense):
    """Keep fewer tokens by the compressor's score and fill up with the most different ones.

    [inferred] union of attention and diversity at the same K, which VisPruner (arXiv 2412.01818)
    and others build in: the best ``K_a = K − round(diverse · K)`` by score, then one at a time the
    token whose largest cosine with a kept one is smallest (max-min, as DivPrune, arXiv 2503.02175).
    An attacker of the attention has no say in the second half, unless through the features.

    Args:
        diverse: share of K chosen by difference, in [0, 1]; 0 is no defence.

    Raises:
        DefenseError: when it is to protect what does not choose a number fixed in advance at one
            point.

    *Differs from the paper in …*: there is none. The choice has no gradient; what attacks push is
    the mean of the standardised log-score and the standardised log-distance to the K_a best.
    """

    name: ClassVar[str] = "hybrid"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.BPDA

    diverse: Annotated[float, Interval(ge=0, le=1)] = 0.5

    def combine(self, own: Scores, others: Sequence[Scores], seen: Seen) -> Scores:
        """The compressor's score; the log-score also knows how different a token is."""
        del others
        if self.diverse == 0:
            return own
        best = top_k_mask(own.score, seen.counts - _share(self.diverse, seen.counts), seen.valid)
        distance = cosine_distance(precise(seen.features))
        distance = distance.masked_fill(~best[:, None], torch.inf).amin(2)
        # A token among the best has no distance to them; it is as far as the farthest.
        most = distance.masked_fill(best | distance.isinf() | ~seen.valid, 0).amax(1, keepdim=True)
        distance = torch.where(best | distance.isinf(), most, distance).clamp_min(0)
        parts = standardised(own.log_score, seen.valid), standardised_log(distance, seen.valid)
        return Scores(own.score, torch.stack(parts).mean(0), own.attends, own.chosen)

    @torch.no_grad()
    def keep(
        self, kept: Tensor, scores: Scores, seen: Seen, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """The best of the kept, and the most different of all others."""
        del generators
        total = kept.sum(1)
        more = _share(self.diverse, total)
        chosen = top_k_mask(scores.score, total - more, kept)
        features = precise(seen.features).masked_fill(~seen.valid[..., None], 0)
        return filled_up(cosine_distance(features), chosen, total, seen.valid)


def _share(share: float, counts: Tensor) -> Tensor:
    return (counts.double() * share).round().long()


def filled_up(distance: Tensor, chosen: Tensor, total: Tensor, valid: Tensor) -> Tensor:
    """Add the token farthest from all chosen ones until each row has `total`.

    Args:
        distance: ``[I, V, V]``.
        chosen: bool ``[I, V]`` to begin with; a row may be empty, and then begins with its first
            valid token.
        total: long ``[I]``.
        valid: bool ``[I, V]``, tokens that may be chosen; of equally far ones the first.
    """
    chosen = chosen.clone()
    for _ in range(int((total - chosen.sum(1)).amax().clamp_min(0))):
        gap = distance.masked_fill(~chosen[:, None], torch.inf).amin(2)
        gap = gap.masked_fill(chosen | ~valid, -torch.inf)
        place = gap.argmax(1, keepdim=True)
        wanted = (chosen.sum(1) < total)[:, None]
        chosen = chosen | (torch.zeros_like(chosen).scatter(1, place, True) & wanted)
    return chosen
