"""DivPrune: keep the visual tokens that are farthest from one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from targets.compression.base import Compressor, Scores, Seen, Stage
from targets.compression.scoring import gather_rows, standardised_log


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
    this score. Distances are differentiable, the greedy order is not. A picture of several tiles
    is one set of tokens.
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
        features = seen.features.float().masked_fill(~seen.valid[..., None], 0)
        distance = cosine_distance(features)
        order = farthest_first(distance.detach(), seen.counts, seen.valid)
        score = distance_when_chosen(distance, order, seen.counts, seen.valid)
        return Scores(
            score,
            standardised_log(score, seen.valid),
            chosen=marked(order, seen.counts, seen.valid),
        )


def cosine_distance(features: Tensor) -> Tensor:
    """1 − cosine between all rows: ``[I, V, D]`` → ``[I, V, V]``."""
    unit = torch.nn.functional.normalize(features, dim=-1)
    return 1 - unit @ unit.transpose(1, 2)


@torch.no_grad()
def farthest_first(distance: Tensor, counts: Tensor, valid: Tensor) -> Tensor:
    """Greedy max-min order: ``[I, V, V]`` → indices ``[I, K]`` in the order of choosing.

    Args:
        distance: between all places.
        counts: long ``[I]``; K is the largest. Only the first `counts` of a row mean anything.
        valid: bool ``[I, V]``, places that may be chosen.
    """
    itself = torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device)
    nearest = distance.masked_fill(itself | ~valid[:, :, None], torch.inf).amin(1)
    chosen = nearest.masked_fill(~valid, -torch.inf).argmax(1, keepdim=True)
    order = [chosen]
    gap = gather_rows(distance, chosen).squeeze(1).masked_fill(~valid, -torch.inf)
    for _ in range(int(counts.amax()) - 1):
        # A chosen token must not come again, even where all that is left coincides with it.
        gap = gap.scatter(1, chosen, -torch.inf)
        chosen = gap.argmax(1, keepdim=True)
        order.append(chosen)
        gap = torch.minimum(gap, gather_rows(distance, chosen).squeeze(1))
    return torch.cat(order, 1)


def marked(order: Tensor, counts: Tensor, valid: Tensor) -> Tensor:
    """The first ``counts [I]`` places of each row of ``order [I, K]``, bool ``[I, V]``."""
    taken = torch.arange(order.shape[1], device=order.device) < counts[:, None]
    found = torch.zeros(valid.shape, dtype=torch.long, device=order.device)
    return (found.scatter_add(1, order, taken.long()) > 0) & valid


def distance_when_chosen(distance: Tensor, order: Tensor, counts: Tensor, valid: Tensor) -> Tensor:
    """The score ``[I, V]`` of `DivPrune`, live in ``distance [I, V, V]``; 0 where not valid."""
    to_chosen = gather_rows(distance, order)
    steps = torch.arange(order.shape[1], device=order.device).expand_as(order)
    real = steps < counts[:, None]
    place = places_of(order, counts, distance.shape[1])
    later = steps[:, :, None] >= place[:, None]  # chosen no earlier than the token itself
    gap = to_chosen.masked_fill(later | ~real[:, :, None], torch.inf).amin(1)
    first = to_chosen[:, 0].masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    score = torch.where(place == 0, first, gap)
    return score.masked_fill(~valid | score.detach().isinf(), 0)


def places_of(order: Tensor, counts: Tensor, width: int) -> Tensor:
    """At which step each of `width` places was chosen, `counts` where it was not: ``[I, width]``.

    Args:
        order: long ``[I, K]``, places in the order of choosing.
        counts: long ``[I]``, how many of them count.
        width: places there are.
    """
    steps = torch.arange(order.shape[1], device=order.device).expand_as(order)
    place = counts[:, None].expand(-1, width)
    steps = torch.where(steps < counts[:, None], steps, counts[:, None])
    return place.scatter_reduce(1, order, steps, "amin")
