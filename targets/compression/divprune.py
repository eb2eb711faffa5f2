"""DivPrune: keep the visual tokens that are farthest from one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from targets.compression.base import Compressor, Scores, Seen, Stage
from targets.compression.scoring import gather_rows, standardised


@dataclass(frozen=True, kw_only=True)
class DivPrune(Compressor):
    """Choose visual tokens by greedy max-min diversity of their projected features.

    Paper: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal
    Models" (CVPR 2025, arXiv 2503.02175). Distance is 1 − cosine. First comes the token whose
    nearest other token is farthest, then repeatedly the token farthest from all chosen ones.

    Args:
        retention: kept ÷ all visual tokens, in (0, 1]; the official default is 0.098.
        keep_tokens: visual tokens kept of each image, ≥ 1, instead of retention.
        positions: the official code makes position ids contiguous.

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: the score is ours, the paper has none: the distance to the
    chosen set at which a token was chosen, for the others the distance at which it would be chosen
    next; the first token has its distance to the farthest token. The kept tokens are the top of
    this score. Distances are differentiable, the greedy order is not.
    """

    name: ClassVar[str] = "divprune"

    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    positions: Literal["keep", "reindex"] = "reindex"

    @property
    def stage(self) -> Stage:
        """Before the language model."""
        return Stage.INPUT

    def score(self, seen: Seen) -> Scores:
        """Distance at which a token was or would be chosen, in [0, 2], ``[I, V]``."""
        distance = cosine_distance(seen.features.float())
        order = farthest_first(distance.detach(), seen.count)
        score = distance_when_chosen(distance, order)
        chosen = torch.zeros_like(score, dtype=torch.bool).scatter(1, order, True)
        return Scores(score, standardised(score), chosen=chosen)


def cosine_distance(features: Tensor) -> Tensor:
    """1 − cosine between all rows: ``[I, V, D]`` → ``[I, V, V]``."""
    unit = torch.nn.functional.normalize(features, dim=-1)
    return 1 - unit @ unit.transpose(1, 2)


@torch.no_grad()
def farthest_first(distance: Tensor, count: int) -> Tensor:
    """Greedy max-min order: ``[I, V, V]`` → indices ``[I, count]`` in the order of choosing."""
    tokens = distance.shape[1]
    itself = torch.eye(tokens, dtype=torch.bool, device=distance.device)
    nearest = distance.masked_fill(itself, torch.inf).amin(1)
    chosen = nearest.argmax(1, keepdim=True)
    order = [chosen]
    gap = gather_rows(distance, chosen).squeeze(1)
    for _ in range(count - 1):
        # A chosen token must not come again, even where all that is left coincides with it.
        gap = gap.scatter(1, chosen, -torch.inf)
        chosen = gap.argmax(1, keepdim=True)
        order.append(chosen)
        gap = torch.minimum(gap, gather_rows(distance, chosen).squeeze(1))
    return torch.cat(order, 1)


def distance_when_chosen(distance: Tensor, order: Tensor) -> Tensor:
    """The score ``[I, V]`` of `DivPrune`, live in ``distance [I, V, V]``."""
    count = order.shape[1]
    to_chosen = gather_rows(distance, order)
    place = torch.full(distance.shape[:2], count, device=order.device)
    steps = torch.arange(count, device=order.device).expand_as(order)
    place = place.scatter(1, order, steps)
    later = steps[:, :, None] >= place[:, None]  # chosen no earlier than the token itself
    gap = to_chosen.masked_fill(later, torch.inf).amin(1)
    first = to_chosen[:, 0].amax(1, keepdim=True)
    return torch.where(place == 0, first, gap)
