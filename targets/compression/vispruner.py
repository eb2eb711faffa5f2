"""VisPruner: what CLS looks at, and of the rest what is left when duplicates are gone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from targets.compression.base import Compressor, Scores, Seen, Selection, Stage
from targets.compression.fastervlm import cls_scores
from targets.compression.scoring import gather_rows, order_of
from targets.compression.tiles import Tiles

_A_ROUND = 8
"""Most tokens removed in a round."""


@dataclass(frozen=True, kw_only=True)
class VisPruner(Compressor):
    """Keep the patches CLS attends to most, and diverse ones among the others.

    Paper: Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token
    Pruning in VLMs" (ICCV 2025, arXiv 2412.01818v2). The score is FasterVLM's. Of T tokens
    ``int(T · important)`` are the best. The others, in order of score, lose duplicates in rounds:
    every second token (the first, third, …) is compared with those between; of these tokens the
    ``min(8, number left − number wanted)`` with the largest cosine to any of the tokens between go.
    The next round begins with the surviving compared ones, by falling similarity, then those
    between, until T tokens are left in all.

    A picture of several tiles is done tile by tile, the budget shared out by their sizes. Row
    separators stay.

    Args:
        important: share of the tokens that is chosen by attention, in [0, 1]; also published
            with 0.75.
        retention: kept ÷ all visual tokens, in (0, 1].
        keep_tokens: visual tokens kept of each image, ≥ 1, instead of retention.
        positions: the official code makes position ids contiguous.

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: a tower without CLS is scored by the mean attention received
    [inferred]. Similarity is between the features that enter the projector; where tokens are
    groups of patches, between groups [inferred].
    """

    name: ClassVar[str] = "vispruner"

    important: Annotated[float, Interval(ge=0, le=1)] = 0.5
    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    positions: Literal["keep", "reindex"] = "reindex"

    @property
    def stage(self) -> Stage:
        """Before the projector."""
        return Stage.VISION

    @property
    def attends(self) -> bool:
        """Its score is an attention."""
        return True

    def score(self, seen: Seen) -> Scores:
        """Head-mean attention of CLS, ``[I, V]``."""
        return cls_scores(seen, self.name)

    @torch.no_grad()
    def select(self, scores: Scores, seen: Seen) -> Selection:
        """The important, then what the rounds leave."""
        tiles = Tiles.of(seen.lattice, seen.valid)
        total = tiles.share(seen.counts)
        chosen = (total.double() * self.important).long()
        order = order_of(tiles.split(scores.score), tiles.present)
        features = seen.features.float().masked_fill(~seen.valid[..., None], 0)
        unit = torch.nn.functional.normalize(tiles.split(features), dim=-1)
        place = torch.arange(order.shape[1], device=order.device)
        rest = (place >= chosen[:, None]) & (place < tiles.present.sum(1, keepdim=True))
        left, real = _compacted(order, rest)
        left, real = distinct(unit, left, real, total - chosen)
        first = place < chosen[:, None]
        kept = torch.zeros(order.shape, dtype=torch.long, device=order.device)
        kept = kept.scatter_add(1, order, first.long()).scatter_add(1, left, real.long())
        return self.complete(tiles.join(kept > 0), seen)


def distinct(unit: Tensor, left: Tensor, real: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Remove duplicates in rounds until each row has as many as wanted.

    Args:
        unit: ``[G, W, D]`` unit features.
        left: long ``[G, R]`` places of the candidates, best first.
        real: bool ``[G, R]``, which of them exist; those come first.
        wanted: long ``[G]``.

    Returns:
        `left` and `real` of the survivors.
    """
    while True:
        removed = (real.sum(1) - wanted).clamp(0, _A_ROUND)
        if left.shape[1] < 2 or not bool((removed > 0).any()):
            return left, real
        even, odd = left[:, ::2], left[:, 1::2]
        is_even, is_odd = real[:, ::2], real[:, 1::2]
        cosine = gather_rows(unit, even) @ gather_rows(unit, odd).transpose(1, 2)
        most = cosine.masked_fill(~is_odd[:, None], -torch.inf).amax(2)
        by_likeness = order_of(most, is_even)
        place = torch.arange(even.shape[1], device=left.device)
        stays = (place >= removed[:, None]) & (place < is_even.sum(1, keepdim=True))
        left = torch.cat([even.gather(1, by_likeness), odd], 1)
        left, real = _compacted(left, torch.cat([stays, is_odd], 1))


def _compacted(places: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The real places first, in their order, no wider than the fullest row."""
    index = (~real).long().argsort(dim=1, stable=True)[:, : int(real.sum(1).amax())]
    return places.gather(1, index), real.gather(1, index)
