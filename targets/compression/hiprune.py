"""HiPrune: objects of a middle tower layer with their neighbours, and what deep layers look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from targets.compression.base import Compressor, Scores, Seen, Selection, Stage
from targets.compression.scoring import log_probability, order_of, top_k_mask
from targets.compression.tiles import Tiles
from targets.compression.tower import at_places, tower_depth, tower_of
from targets.errors import CompressionError

_OBJECT_SHARE = 9 / 24
"""The official object layer is the 9th of 24."""


@dataclass(frozen=True, kw_only=True)
class HiPrune(Compressor):
    """Keep anchors of a middle tower layer, the patches beside them, and registers of a deep one.

    Paper: Liu et al., "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in
    Vision-Language Models" (arXiv 2508.00553). The score is the attention a patch receives: mean
    over heads and over all query positions. Of T tokens the ``round(T · alpha / 5)`` best at the
    object layer are anchors; their four neighbours are buffers; the best at the feature layer fill
    up as registers.

    With ``official`` neighbours are those at distance 1 and one row in reading order, clamped to
    the first and last token, so that they wrap around rows and an anchor in the first row also
    keeps token 0; ``spatial`` takes neighbours on the grid only.

    A picture of several tiles is done tile by tile, the budget shared out by their sizes, and row
    separators go.

    Args:
        object_layer: tower layer of the anchors, 0-based; None is the 9th of 24, in proportion
            (official for Qwen2.5-VL: 15 of 32).
        alpha: share of anchors and buffers among the tokens kept, in [0, 1].
        variant: which neighbours are buffers.
        retention: kept ÷ all visual tokens, in (0, 1].
        keep_tokens: visual tokens kept of each image, ≥ 1, instead of retention.
        positions: contiguous position ids as in the official code [inferred].

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: where anchors and buffers are more than T, anchors go first,
    then buffers by their score at the object layer [inferred].
    """

    name: ClassVar[str] = "hiprune"

    object_layer: Annotated[int, Ge(0)] | None = None
    alpha: Annotated[float, Interval(ge=0, le=1)] = 0.1
    variant: Literal["official", "spatial"] = "official"
    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    positions: Literal["keep", "reindex"] = "reindex"

    @property
    def stage(self) -> Stage:
        """Before the projector."""
        return Stage.VISION

    @property
    def drops_separators(self) -> bool:
        """The official code packs tiles without them."""
        return True

    def tower_layers(self, layers: int, feature_layer: int) -> tuple[int, ...]:
        """The object layer.

        Raises:
            CompressionError: if it lies behind the features.
        """
        return (self._object_layer(layers, feature_layer),)

    def score(self, seen: Seen) -> Scores:
        """Attention received at the feature layer, head mean, ``[I, V]``."""
        score = self._received(seen, None).masked_fill(~seen.valid, 0)
        return Scores(score, log_probability(score))

    @torch.no_grad()
    def select(self, scores: Scores, seen: Seen) -> Selection:
        """Anchors, buffers, registers."""
        feature_layer = tower_of(seen, self.name).feature_layer
        layer = self._object_layer(tower_depth(seen, self.name), feature_layer)
        tiles = Tiles.of(seen.lattice, seen.valid)
        middle, deep = tiles.split(self._received(seen, layer)), tiles.split(scores.score)
        total = tiles.share(seen.counts)
        number = [round(t * self.alpha / 5) for t in total.tolist()]
        room = torch.minimum(torch.tensor(number, device=total.device), total)
        anchors = top_k_mask(middle, room, tiles.present)
        buffers = self._beside(anchors, tiles, seen) & tiles.present & ~anchors
        # Anchors before buffers before registers, each by its own score.
        level = anchors.long() * 2 + buffers.long()
        order = order_of(torch.where(level > 0, middle, deep), tiles.present)
        rank = order_of(level.gather(1, order), tiles.present.gather(1, order))
        order = order.gather(1, rank)
        first = torch.arange(order.shape[1], device=order.device) < total[:, None]
        kept = torch.zeros_like(anchors).scatter(1, order, first)
        return self.complete(tiles.join(kept), seen)

    def _received(self, seen: Seen, layer: int | None) -> Tensor:
        received = tower_of(seen, self.name).received(layer).mean(1)
        return at_places(received[..., None], seen)[..., 0]

    def _object_layer(self, layers: int, feature_layer: int) -> int:
        wanted = self.object_layer
        if wanted is None:
            wanted = max(0, round(_OBJECT_SHARE * layers) - 1)
            return min(wanted, feature_layer)
        if wanted > feature_layer:
            raise CompressionError(
                f"compressor hiprune: object_layer {wanted} lies behind the features, which come "
                f"from layer {feature_layer} (0-based); give a smaller one"
            )
        return wanted

    def _beside(self, anchors: Tensor, tiles: Tiles, seen: Seen) -> Tensor:
        """Neighbours of the anchors, bool ``[G, W]``."""
        shapes = tiles.shapes(seen.lattice)
        height, width = shapes[:, :1], shapes[:, 1:]
        row, column = tiles.split(seen.lattice.row), tiles.split(seen.lattice.column)
        flat = torch.minimum(row * width + column, height * width - 1)
        size = int((height * width).amax())
        marked = torch.zeros(len(flat), size, dtype=torch.long, device=flat.device)
        for down, right in ((0, -1), (0, 1), (-1, 0), (1, 0)):
            near, hit = flat + down * width + right, anchors
            if self.variant == "spatial":
                inside = (row + down >= 0) & (row + down < height)
                hit = hit & inside & (column + right >= 0) & (column + right < width)
            near = torch.minimum(near.clamp_min(0), height * width - 1)
            marked = marked.scatter_add(1, near, hit.long())
        return marked.gather(1, flat) > 0
