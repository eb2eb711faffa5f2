"""PruMerge and PruMerge+: keep what CLS looks at in the last tower layer, and add its likes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from targets.compression.base import Compressor, Merged, Scores, Seen, Selection, Stage
from targets.compression.scoring import (
    TINY,
    gather_rows,
    log_probability,
    order_of,
    ranks,
    top_k_mask,
)
from targets.compression.tiles import Tiles
from targets.compression.tower import at_places, tower_depth, tower_of
from targets.compression.uniform import evenly_spaced
from targets.families.vision import LayerPass

_SPREAD = 3
"""Evenly spaced tokens for each outlier, with `plus`."""
_WIDTH = 0.2
"""Of the sigmoid in the relaxed count, in units of Q3 − Q1."""


@dataclass(frozen=True, kw_only=True)
class PruMerge(Compressor):
    """Keep outliers of CLS attention with their nearest others added, and one token of the rest.

    Paper: Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal
    Models" (ICCV 2025, arXiv 2403.15388). The score a is the softmax attention of CLS at the *last*
    tower layer, its queries and keys taken as one head over the full width D (factor D^−½). Without
    a budget, a token is kept if its score exceeds Q3 + 1.5 (Q3 − Q1) (at least one is). A kept
    token i becomes ``x_i + Σ_j a_j x_j`` over the 32 others j with the most similar keys (cosine),
    kept ones included; the last token is ``Σ_j a_j x_j`` over all that were not kept. The weights
    are not normalised. Tokens come in the order of their score, not of space.

    With `plus` (PruMerge+) evenly spaced tokens are kept besides. Without a budget these are every
    ``int(step / 3)``-th, step being ``int(tokens / outliers)``, the last token excepted.

    A picture of several tiles is done tile by tile, a budget shared out by their sizes; row
    separators go.

    Args:
        plus: PruMerge+.
        neighbours: others added to a kept token, ≥ 0.
        retention: tokens left ÷ all visual tokens, in (0, 1]; None together with keep_tokens keeps
            as many as there are outliers. 1 means no compression at all.
        keep_tokens: tokens left of each image, ≥ 1, the last one among them.
        positions: the official code makes position ids contiguous; with ``keep`` a token has the
            position of its patch, the last that of the largest score not kept.

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: with a budget of T tokens, T − 1 are kept, as published
    evaluations do; for T = 1 that one is kept and no rest is added. PruMerge+ then takes half of
    them by score and spreads the others evenly among what is left [inferred; the official fixed
    form spreads as many over all tokens and may keep one twice]. A tower without CLS is scored by
    the mean attention received [inferred]. What is added to which token is worked out again for
    each image, also where a selection is imposed.
    """

    name: ClassVar[str] = "prumerge"
    budget_optional: ClassVar[bool] = True

    plus: bool = False
    neighbours: Annotated[int, Ge(0)] = 32
    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    positions: Literal["keep", "reindex"] = "reindex"

    def __post_init__(self) -> None:
        """Check the budget, which may be left out."""
        if not self.adaptive:
            super().__post_init__()

    @property
    def adaptive(self) -> bool:
        """Whether the image itself says how many tokens are kept."""
        return self.retention is None and self.keep_tokens is None

    @property
    def count_varies(self) -> bool:
        """Without a budget."""
        return self.adaptive

    @property
    def stage(self) -> Stage:
        """Before the projector."""
        return Stage.VISION

    @property
    def merges(self) -> bool:
        """It adds others to the tokens it keeps."""
        return True

    @property
    def drops_separators(self) -> bool:
        """Its order is not that of space."""
        return True

    def tower_layers(self, layers: int, feature_layer: int) -> tuple[int, ...]:
        """The last."""
        del feature_layer
        return (layers - 1,)

    def score(self, seen: Seen) -> Scores:
        """Attention of CLS at the last layer, as one head, in [0, 1], ``[I, V]``."""
        score = self._attention(seen)[0]
        chosen = self._outliers(score.detach(), seen) if self.adaptive else None
        return Scores(score, log_probability(score), chosen=chosen)

    def select(self, scores: Scores, seen: Seen) -> Selection:
        """Outliers, or as many as the budget has room for beside the last token."""
        if scores.chosen is not None:
            return self.complete(scores.chosen, seen)
        tiles = Tiles.of(seen.lattice, seen.valid)
        score = tiles.split(scores.score.detach())
        total = tiles.share(seen.counts) - self._rests(tiles, seen).long()
        spread = total // 2 if self.plus else torch.zeros_like(total)
        kept = top_k_mask(score, total - spread, tiles.present)
        kept = kept | evenly_spaced(spread, tiles.present & ~kept)
        return self.complete(tiles.join(kept), seen)

    def merge(self, selection: Selection, seen: Seen) -> Merged:
        """Kept tokens with their likes, by falling score, then the rest, tile by tile."""
        tiles = Tiles.of(seen.lattice, seen.valid)
        hidden = tiles.split(seen.features.masked_fill(~seen.valid[..., None], 0))
        attention, keys = (tiles.split(part) for part in self._attention(seen))
        kept = tiles.split(selection.kept) & tiles.present
        whole = self._whole(tiles, seen)[:, None]
        order = order_of(attention, kept)[:, : int(kept.sum(1).amax())]
        is_kept = kept.gather(1, order)
        near = self._nearest(keys, order, tiles.present) & ~whole[..., None]
        weights = attention.to(hidden.dtype)[:, None] * near
        joined = gather_rows(hidden, order) + weights @ hidden
        rest = tiles.present & ~kept
        has_rest = rest.any(1, keepdim=True) & (self._rests(tiles, seen)[:, None])
        left = (attention.to(hidden.dtype) * rest)[:, None] @ hidden
        first = order_of(attention, rest)[:, :1]
        place = tiles.places.gather(1, torch.cat([order, first], 1))
        own = torch.cat([is_kept, torch.zeros_like(has_rest)], 1)
        made = Merged(torch.cat([joined, left], 1), torch.cat([is_kept, has_rest], 1), place, own)
        return _one_after_the_other(made, seen, whole.view(-1, tiles.number)[:, 0])

    def _attention(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Attention of CLS ``[I, V]`` and keys ``[I, V, D]`` of the last layer, as one head."""
        vision, layer = tower_of(seen, self.name), tower_depth(seen, self.name) - 1
        here = vision.layers[layer]
        queries, keys = (part.transpose(1, 2).flatten(2) for part in (here.queries, here.keys))
        one = LayerPass(here.hidden, queries[:, None], keys[:, None])
        vision = replace(vision, layers={layer: one}, scaling=float(keys.shape[-1] ** -0.5))
        attention = at_places(vision.attention(layer)[:, 0, :, None], seen)[..., 0]
        keys = at_places(vision.keys(layer)[:, 0], seen)
        return attention.masked_fill(~seen.valid, 0), keys

    def _nearest(self, keys: Tensor, order: Tensor, present: Tensor) -> Tensor:
        """The most similar others of each kept token, bool ``[G, K, W]``."""
        with torch.no_grad():
            keys = keys.float().masked_fill(~present[..., None], 0)
            unit = torch.nn.functional.normalize(keys, dim=-1)
            cosine = gather_rows(unit, order) @ unit.transpose(1, 2)
            places = torch.arange(keys.shape[1], device=keys.device)
            others = present[:, None] & (places != order[..., None])
            flat, free = cosine.flatten(0, 1), others.flatten(0, 1)
            return ((ranks(flat, free) < self.neighbours) & free).view_as(cosine)

    def _whole(self, tiles: Tiles, seen: Seen) -> Tensor:
        """Tiles of images whose budget is all they have, bool ``[G]``."""
        full = (seen.counts >= seen.valid.sum(1)) & (not self.adaptive)
        return full.repeat_interleave(tiles.number)

    def _rests(self, tiles: Tiles, seen: Seen) -> Tensor:
        """Tiles that end in the token of all that was not kept, bool ``[G]``."""
        if self.adaptive:
            return tiles.present.sum(1) > 1
        return (tiles.share(seen.counts) > 1) & ~self._whole(tiles, seen)

    def soft_count(self, scores: Scores, seen: Seen) -> Tensor | None:
        """Outliers by a sigmoid of what their score has above its bar, ``[I]``; four times `plus`.

        The bar Q3 + 1.5 (Q3 − Q1) is live: who flattens the middle of the scores lowers it. The
        unit of the sigmoid, Q3 − Q1, is not.
        """
        if not self.adaptive:
            return None
        tiles = Tiles.of(seen.lattice, seen.valid)
        score = tiles.split(scores.score).double()
        bar, spread = _bar(score, tiles.present)
        gates = torch.sigmoid((score - bar) / (_WIDTH * spread.detach() + TINY)) * tiles.present
        soft = gates.sum(1).view(-1, tiles.number).sum(1)
        return (soft * (1 + _SPREAD if self.plus else 1)).to(scores.score.dtype)

    @torch.no_grad()
    def _outliers(self, score: Tensor, seen: Seen) -> Tensor:
        """Tokens far above the others of their tile, and with `plus` evenly spaced ones."""
        tiles = Tiles.of(seen.lattice, seen.valid)
        score, number = tiles.split(score).double(), tiles.present.sum(1)
        outliers = (score > _bar(score, tiles.present)[0]) & tiles.present
        count = outliers.sum(1).clamp_min(1).clamp_max(number)
        kept = top_k_mask(score, count, tiles.present)
        if self.plus:
            step = (number // count.clamp_min(1) // _SPREAD).clamp_min(1)
            rank = tiles.present.long().cumsum(1) - 1
            spread = (rank % step[:, None] == 0) & (rank < number[:, None] - 1)
            kept = kept | (spread & tiles.present)
        return tiles.join(kept)


def _one_after_the_other(made: Merged, seen: Seen, whole: Tensor) -> Merged:
    """Tokens of G tiles as those of I images without gaps; `whole` ones in the order of places."""
    images = len(seen.counts)
    valid, source, own = (
        part.reshape(images, -1) for part in (made.valid, made.source, made.dominant)
    )
    features = made.features.reshape(images, valid.shape[1], -1)
    order = torch.where(whole[:, None], source, 0).masked_fill(~valid, seen.valid.shape[1])
    index = order.argsort(dim=1, stable=True)[:, : int(valid.sum(1).amax())]
    return Merged(
        gather_rows(features, index),
        valid.gather(1, index),
        source.gather(1, index),
        own.gather(1, index),
    )


def _bar(score: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """The score above which a token is an outlier of its tile, and Q3 − Q1: ``[G, 1]`` each."""
    low, high = (_quantile(score, present, share)[:, None] for share in (0.25, 0.75))
    return high + 1.5 * (high - low), high - low


def _quantile(values: Tensor, present: Tensor, share: float) -> Tensor:
    """Quantile ``[G]`` of the present values ``[G, W]``, linearly interpolated."""
    ordered = values.masked_fill(~present, torch.inf).sort(1).values
    place = (present.sum(1) - 1).clamp_min(0) * share
    below = place.floor().long()[:, None]
    above = place.ceil().long()[:, None]
    low, high = ordered.gather(1, below)[:, 0], ordered.gather(1, above)[:, 0]
    # Where both are one value, infinite or not, there is nothing to interpolate.
    return torch.where(below[:, 0] == above[:, 0], low, low + (high - low) * (place - below[:, 0]))
