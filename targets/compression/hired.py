"""HiRED: budgets of tiles by what an early tower layer looks at, tokens by a late one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from targets.compression.base import Compressor, Scores, Seen, Selection, Stage
from targets.compression.scoring import log_probability, top_k_mask
from targets.compression.tiles import Tiles, shared
from targets.compression.tower import at_places, tower_of
from targets.errors import CompressionError


@dataclass(frozen=True, kw_only=True)
class HiRED(Compressor):
    """Share a budget out among the tiles of a picture, and keep what CLS attends to in each.

    Paper: Arif et al., "HiRED: Attention-Guided Token Dropping for Efficient Inference of
    High-Resolution Vision-Language Models" (AAAI 2025, arXiv 2408.10945). Of a budget B the view
    of the whole picture gets ``int(B · alpha)``, no more than it has tokens. The rest goes to the
    tiles in proportion to how many of the ``int(n · (1 − alpha))`` tokens of the whole view that
    CLS attends to most at tower layer 0 belong to them, n being the tokens of that view. Within a
    tile the tokens with the most attention of CLS (sum over heads) at the feature layer stay.

    With ``official`` the tokens of the whole view are counted for tiles in flattened order, an
    equal run of them for each tile, although tiles lie side by side; ``spatial`` counts those in
    the middle of which the tile lies. A picture of one tile keeps its best tokens.

    Args:
        alpha: share of the whole view, in [0, 1].
        variant: which tokens of the whole view stand for a tile.
        retention: kept ÷ all visual tokens, in (0, 1]; official are 0.2, 0.1 and 0.4.
        keep_tokens: visual tokens kept of each image, ≥ 1, instead of retention.
        positions: contiguous position ids as in the official code [inferred].

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: the official code rounds the budgets of tiles down and keeps
    fewer than B; here they sum to B (largest remainder), and what does not fit into a tile goes to
    the others. A tower without CLS is scored by the mean attention received [inferred].
    """

    name: ClassVar[str] = "hired"

    alpha: Annotated[float, Interval(ge=0, le=1)] = 0.5
    variant: Literal["official", "spatial"] = "official"
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

    @property
    def drops_separators(self) -> bool:
        """The official code packs tiles without them."""
        return True

    def tower_layers(self, layers: int, feature_layer: int) -> tuple[int, ...]:
        """The first."""
        del layers, feature_layer
        return (0,)

    def score(self, seen: Seen) -> Scores:
        """Attention of CLS at the feature layer, summed over heads, ``[I, V]``."""
        if seen.attention is None:
            raise CompressionError("hired needs the attention of the vision tower")
        score = seen.attention.sum(1).masked_fill(~seen.valid, 0)
        return Scores(score, log_probability(score), attends=True)

    @torch.no_grad()
    def select(self, scores: Scores, seen: Seen) -> Selection:
        """The best of each tile, as many as its budget."""
        tiles = Tiles.of(seen.lattice, seen.valid)
        budgets = self.budgets(seen, tiles).flatten()
        kept = top_k_mask(tiles.split(scores.score), budgets, tiles.present)
        return self.complete(tiles.join(kept), seen)

    @torch.no_grad()
    def budgets(self, seen: Seen, tiles: Tiles) -> Tensor:
        """Tokens kept of each tile, ``[I, T]``; the whole view is one of them."""
        sizes, counts = tiles.sizes, seen.counts
        if tiles.number == 1:
            return counts[:, None]
        base = torch.tensor([one.base for one in seen.lattice.layouts], device=counts.device)
        is_base = torch.arange(tiles.number, device=counts.device) == base[:, None]
        whole = (sizes * is_base).sum(1)
        room = sizes.masked_fill(is_base, 0)
        given = torch.minimum((counts.double() * self.alpha).long(), whole)
        # What the tiles have no room for goes back to the whole view.
        given = torch.maximum(given, counts - room.sum(1))
        parts = shared(counts - given, self._weights(seen, is_base, whole), room)
        return torch.where(is_base, given[:, None], parts)

    def _weights(self, seen: Seen, is_base: Tensor, whole: Tensor) -> Tensor:
        """Top tokens of the whole view at layer 0 that stand for each tile, ``[I, T]``."""
        vision = tower_of(seen, self.name)
        early = at_places(vision.attention(0).sum(1)[..., None], seen)[..., 0]
        base = is_base.long().argmax(1, keepdim=True)
        in_base = (seen.lattice.tile == base) & seen.valid
        top = top_k_mask(early, (whole.double() * (1 - self.alpha)).long(), in_base)
        stands = self._stands_for(seen, in_base, is_base)
        return (stands & top[:, None]).sum(2)

    def _stands_for(self, seen: Seen, in_base: Tensor, is_base: Tensor) -> Tensor:
        """Which tokens of the whole view stand for which tile, bool ``[I, T, V]``."""
        number = is_base.shape[1]
        tiles = torch.arange(number, device=in_base.device)
        if self.variant == "spatial":
            return _inside(seen, number) & in_base[:, None] & ~is_base[:, :, None]
        others = torch.tensor([len(one.shapes) - 1 for one in seen.lattice.layouts])
        others = others.to(in_base.device)[:, None]
        rank = in_base.long().cumsum(1) - 1
        share = rank * others // in_base.sum(1, keepdim=True).clamp_min(1)
        # Tiles in their order, the whole view skipped.
        tile = share + (share >= is_base.long().argmax(1, keepdim=True)).long()
        return (tile[:, None] == tiles[:, None]) & in_base[:, None] & ~is_base[:, :, None]


def _inside(seen: Seen, number: int) -> Tensor:
    """Places whose centre lies in the box around a tile's tokens, bool ``[I, T, V]``."""
    images, width = seen.valid.shape
    found = torch.zeros(images, number, width, dtype=torch.bool)
    for image, one in enumerate(seen.lattice.layouts):
        centre = (one.boxes[:, :2] + one.boxes[:, 2:]) / 2
        for tile in range(len(one.shapes)):
            boxes = one.boxes[one.tile == tile]
            low, high = boxes[:, :2].amin(0), boxes[:, 2:].amax(0)
            hit = ((centre >= low) & (centre < high)).all(1)
            found[image, tile, : len(hit)] = hit
    return found.to(seen.valid.device)
