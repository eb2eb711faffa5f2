"""VisionZip: keep what CLS looks at, merge the rest into a few contextual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from targets.compression.base import Compressor, Merged, Scores, Seen, Selection, Stage
from targets.compression.scoring import gather_rows, log_probability, top_k_mask
from targets.compression.tiles import Tiles
from targets.errors import CompressionError
from targets.families.vision import VisionPass

_CONTEXTUAL_SHARE = 6.4
"""Tokens per contextual token: 5.4 dominant ones for each, as in (54, 10) and (162, 30)."""


@dataclass(frozen=True, kw_only=True)
class VisionZip(Compressor):
    """Keep CLS and the patches it attends to most; sum up the others in contextual tokens.

    Paper: Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models"
    (CVPR 2025, arXiv 2412.04467). At the layer that makes the features: the score is the attention
    of CLS, summed over heads. Of T tokens, C are contextual and D = T − C dominant, CLS being one
    of the D, so that D − 1 patches are kept. Of the remaining patches every ``step``-th becomes a
    target (step = remaining // C, the first C); each other one joins the target whose head-mean key
    has the largest cosine with its own; a contextual token is ``target + mean(joined)``. The
    projector receives [CLS, dominant in spatial order, contextual].

    Args:
        retention: T ÷ all visual tokens, in (0, 1]; T = round(retention · V) counts CLS and
            contextual tokens. 1 means no compression at all.
        keep_tokens: T, ≥ 1, instead of retention.
        contextual_tokens: C, of each tile; None is round(T / 6.4), the official split 5.4 : 1.
        positions: the official code makes position ids contiguous; with ``keep`` a token has the
            position of its patch, CLS that of the first patch.

    Raises:
        CompressionError: for an option outside its range.

    A picture of several tiles is done tile by tile, T shared out by their sizes (largest remainder;
    a tile too small for the split keeps patches only); the dominant patches of all tiles come
    first, then CLS and contextual tokens of each. Row separators go.

    *Differs from the paper in …*: a tower without CLS is scored by the mean attention received,
    and all D dominant tokens are patches; so they are where tokens are groups of patches, which
    CLS cannot join. Given the whole budget (T = V) nothing is merged.
    """

    name: ClassVar[str] = "visionzip"

    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    contextual_tokens: Annotated[int, Ge(0)] | None = None
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
    def merges(self) -> bool:
        """It makes contextual tokens."""
        return True

    @property
    def drops_separators(self) -> bool:
        """The official code for tiles leaves row separators out."""
        return True

    def split(self, total: int, has_cls: bool) -> tuple[int, int]:
        """Patches kept as they are, and contextual tokens, for T = `total`.

        Raises:
            CompressionError: if nothing is left for a patch.
        """
        wanted = self.contextual_tokens
        contextual = round(total / _CONTEXTUAL_SHARE) if wanted is None else wanted
        patches = total - contextual - int(has_cls)
        if patches < 1:
            raise CompressionError(
                f"compressor visionzip: {total} tokens less {contextual} contextual"
                f"{' and CLS' if has_cls else ''} leave no patch; keep more tokens or lower "
                "contextual_tokens"
            )
        return patches, contextual

    def score(self, seen: Seen) -> Scores:
        """Attention of CLS summed over heads, in [0, N], ``[I, V]``."""
        if seen.attention is None:
            raise CompressionError("visionzip needs the attention of the vision tower")
        score = seen.attention.sum(1).masked_fill(~seen.valid, 0)
        return Scores(score, log_probability(score), attends=True)

    def select(self, scores: Scores, seen: Seen) -> Selection:
        """The dominant patches, and where each other one goes."""
        tiles = Tiles.of(seen.lattice, seen.valid)
        patches = self._budgets(seen, tiles)[0]
        best = top_k_mask(tiles.split(scores.score), patches, tiles.present)
        return self.complete(tiles.join(best), seen)

    @torch.no_grad()
    def complete(self, kept: Tensor, seen: Seen) -> Selection:
        """Targets and assignment for a dominant set; both follow from the keys."""
        tiles = Tiles.of(seen.lattice, seen.valid)
        contextual = self._budgets(seen, tiles)[1]
        rest = tiles.split(~kept) & tiles.present
        short = (rest.sum(1) < contextual).nonzero().flatten().tolist()
        if short:
            raise CompressionError(
                f"visionzip: a forced set leaves {int(rest[short[0]].sum())} patches, too few for "
                f"{int(contextual[short[0]])} contextual tokens; force a smaller set"
            )
        targets = _targets(rest, contextual)
        assignment = _assignment(tiles.split(_metric(seen)), targets, rest)
        # Entries of `targets` are counted over all tiles of an image.
        width = targets.shape[1]
        before = torch.arange(len(targets), device=kept.device)[:, None] % tiles.number * width
        assignment = torch.where(assignment < 0, -1, assignment + before)
        places = tiles.places.gather(1, targets.clamp_min(0)).masked_fill(targets < 0, -1)
        places = places.reshape(len(kept), tiles.number * width)
        return Selection(kept, places, tiles.join(assignment, -1))

    def merge(self, selection: Selection, seen: Seen) -> Merged:
        """[CLS, dominant, contextual] before the projector, ``[I, S, D]``.

        With several tiles the dominant patches of all come first, in the order of their places,
        then CLS and contextual tokens, tile by tile.
        """
        kept, targets, assignment = selection.kept, selection.targets, selection.assignment
        if targets is None or assignment is None:
            raise CompressionError("visionzip: the forced selection has no merge targets")
        tiles = Tiles.of(seen.lattice, seen.valid)
        hidden = seen.features.masked_fill(~seen.valid[..., None], 0)
        order = (~kept).long().argsort(dim=1, stable=True)[:, : int(kept.sum(1).amax())]
        is_target, spots = targets >= 0, targets.clamp_min(0)
        tile = seen.lattice.tile.gather(1, spots)
        parts = [
            _Part(gather_rows(hidden, order), kept.gather(1, order), order, torch.ones_like(order)),
            _Part(_contextual(hidden, targets, assignment), is_target, spots, 2 * tile + 3),
        ]
        if _takes_cls(seen):
            parts.insert(0, _heads(seen, tiles, self._budgets(seen, tiles)[2]))
        return _in_order(parts, seen)

    def _budgets(self, seen: Seen, tiles: Tiles) -> Tensor:
        """Patches, contextual tokens and CLS tokens of each tile, ``[3, G]``."""
        whole = (seen.counts == seen.valid.sum(1)).repeat_interleave(tiles.number).tolist()
        totals = tiles.share(seen.counts).tolist()
        has_cls = _takes_cls(seen)
        several = (~_single(seen)).repeat_interleave(tiles.number).tolist()
        rows = [
            (total, 0, 0) if total == 0 or all_of_it else self._split(total, has_cls, tiled)
            for total, all_of_it, tiled in zip(totals, whole, several, strict=True)
        ]
        return torch.tensor(rows, device=seen.counts.device).T

    def _split(self, total: int, has_cls: bool, several: bool) -> tuple[int, int, int]:
        try:
            patches, contextual = self.split(total, has_cls)
        except CompressionError:
            if not several:
                raise
            return total, 0, 0  # a small tile has nothing to spare
        return patches, contextual, int(has_cls)


@dataclass(frozen=True, slots=True)
class _Part:
    """Tokens that go into the projector: features ``[I, n, D]``, and ``[I, n]`` of the rest.

    Attributes:
        features: of each.
        valid: whether it exists.
        source: place it stands for.
        rank: tokens of one image stand in the order of this; 1 marks dominant ones.
    """

    features: Tensor
    valid: Tensor
    source: Tensor
    rank: Tensor


def _heads(seen: Seen, tiles: Tiles, wanted: Tensor) -> _Part:
    """CLS of each tile, first in a picture of one tile."""
    vision = _pass(seen)
    images = len(seen.counts)
    first = tiles.places.gather(1, (~tiles.present).long().argmin(1, keepdim=True))
    first = first.reshape(images, tiles.number)
    hidden = vision.layers[vision.feature_layer].hidden
    run = vision.patches_of[..., 0].gather(1, first) // (hidden.shape[1] - 1)
    tile = torch.arange(tiles.number, device=first.device).expand_as(first)
    rank = torch.where(_single(seen)[:, None], 0, 2 * tile + 2)
    head = hidden[run, 0].to(seen.features.dtype)
    return _Part(head, wanted.reshape(images, -1) > 0, first, rank)


def _in_order(parts: list[_Part], seen: Seen) -> Merged:
    """All tokens of each image in the order of their rank, without gaps."""
    valid = torch.cat([part.valid for part in parts], 1)
    rank = torch.cat([part.rank for part in parts], 1)
    needed, room = valid.sum(1), seen.valid.sum(1)
    if bool((needed > room).any()):
        image = int((needed > room).nonzero()[0])
        raise CompressionError(
            f"visionzip: {int(needed[image])} tokens do not fit into the {int(room[image])} places "
            f"of an image; force a smaller kept set ({len(valid)} images)"
        )
    place = rank.masked_fill(~valid, torch.iinfo(rank.dtype).max)
    place = place.argsort(dim=1, stable=True)[:, : int(needed.amax())]
    features = torch.cat([part.features for part in parts], 1)
    source = torch.cat([part.source for part in parts], 1)
    valid, rank = valid.gather(1, place), rank.gather(1, place)
    return Merged(gather_rows(features, place), valid, source.gather(1, place), valid & (rank == 1))


def _pass(seen: Seen) -> VisionPass:
    if seen.vision is None:
        raise CompressionError("visionzip needs to see the vision tower run")
    return seen.vision


def _takes_cls(seen: Seen) -> bool:
    """Whether CLS is of the kind that enters the projector."""
    vision = _pass(seen)
    return vision.has_cls and vision.features is None and vision.patches_of.shape[2] == 1


def _single(seen: Seen) -> Tensor:
    """Images of one tile, bool ``[I]``."""
    single = [len(one.shapes) == 1 for one in seen.lattice.layouts]
    return torch.tensor(single, device=seen.counts.device)


def _metric(seen: Seen) -> Tensor:
    """Unit head-mean keys ``[I, V, E]``."""
    keys = _pass(seen).patch_keys if seen.keys is None else seen.keys
    mean = keys.float().mean(1).masked_fill(~seen.valid[..., None], 0)
    return torch.nn.functional.normalize(mean, dim=-1)


def _targets(rest: Tensor, count: Tensor) -> Tensor:
    """Every step-th place of ``rest [G, W]``, the first ``count [G]``: ``[G, C]``, −1 for none."""
    order = (~rest).long().argsort(dim=1, stable=True)
    step = rest.sum(1) // count.clamp_min(1)
    number = torch.arange(int(count.amax()), device=rest.device)
    places = (number * step[:, None]).clamp_max(rest.shape[1] - 1)
    return order.gather(1, places).masked_fill(number >= count[:, None], -1)


def _assignment(metric: Tensor, targets: Tensor, rest: Tensor) -> Tensor:
    """Entry of ``targets [G, C]`` each place of `rest` joins, −1 for none: ``[G, W]``."""
    none = torch.full(rest.shape, -1, device=rest.device)
    if targets.shape[1] == 0:
        return none
    places = targets.clamp_min(0)
    similarity = metric @ gather_rows(metric, places).transpose(1, 2)  # [G, W, C]
    similarity = similarity.masked_fill(targets[:, None] < 0, -torch.inf)
    is_target = torch.zeros(rest.shape, dtype=torch.long, device=rest.device)
    is_target = is_target.scatter_add(1, places, (targets >= 0).long()) > 0
    joins = rest & ~is_target & (targets >= 0).any(1, keepdim=True)
    return torch.where(joins, similarity.argmax(-1), none)


def _contextual(hidden: Tensor, targets: Tensor, assignment: Tensor) -> Tensor:
    """``target + mean(joined)`` for each target: ``[I, C, D]``."""
    places = torch.arange(targets.shape[1], device=hidden.device)
    joins = (assignment[:, None] == places[:, None]).to(hidden.dtype)  # [I, C, V]
    mean = (joins @ hidden) / joins.sum(-1, keepdim=True).clamp_min(1)
    return gather_rows(hidden, targets.clamp_min(0)) + mean
