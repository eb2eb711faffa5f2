"""Pooling: a coarser grid of averages, or maxima, of projected tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor
from torch.nn import functional

from targets.compression.base import Compressor, Merged, Scores, Seen, Selection, Stage
from targets.compression.scoring import gather_rows, precise, standardised
from targets.compression.thinning import Thinning


@dataclass(frozen=True, kw_only=True)
class Pool(Compressor):
    """Replace the grid of projected visual tokens by a coarser one, pooled adaptively.

    Cell i of h over H rows takes rows ``floor(i H / h)`` to ``ceil((i + 1) H / h) − 1``, columns
    alike, as in adaptive pooling of images; h × w is the largest grid that fits into the budget and
    distorts the picture least (n × n for n² of a square). Tiles are pooled one by one, the budget
    shared out by their sizes; row separators go.

    Args:
        kind: what a cell gives of its tokens.
        retention: left ÷ all visual tokens, in (0, 1], at most.
        keep_tokens: visual tokens left of each image, ≥ 1, at most, instead of retention.
        positions: whether new tokens get contiguous position ids, or that of the token in the
            middle of their cell.

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: a baseline without a paper. Places without a token (padding cut
    off, or dropped before) are left out of averages. Nothing is ranked: the score is 1 for the
    token in the middle of a cell, which counts as kept, and 0 for the rest.
    """

    name: ClassVar[str] = "pool"

    kind: Literal["average", "max"] = "average"
    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    positions: Literal["keep", "reindex"] = "reindex"

    @property
    def stage(self) -> Stage:
        """Before the language model."""
        return Stage.INPUT

    @property
    def merges(self) -> bool:
        """Its tokens are all new."""
        return True

    @property
    def drops_separators(self) -> bool:
        """A coarser grid has other rows."""
        return True

    def score(self, seen: Seen) -> Scores:
        """1 for tokens in the middle of a cell, else 0, ``[I, V]``."""
        plan = Thinning.of(seen)
        middle, real = _middles(plan)
        chosen = torch.zeros_like(middle).new_zeros(plan.tiles.present.shape)
        chosen = plan.tiles.join(chosen.scatter_add(1, middle, real.long())) > 0
        score = chosen.float()
        return Scores(score, standardised(score, seen.valid), chosen=chosen)

    def merge(self, selection: Selection, seen: Seen) -> Merged:
        """The coarser grids of all tiles, ``[I, S, D]``, in reading order of each tile.

        With a forced selection, of cells whose middle it keeps.
        """
        plan = Thinning.of(seen)
        hidden = plan.tiles.split(seen.features.masked_fill(~seen.valid[..., None], 0))
        middle, real = _middles(plan)
        made = hidden.new_zeros(*middle.shape, hidden.shape[2])
        for group, span, shape in plan.alike():
            pooled = self._pooled(hidden[group], plan, group, span, shape)
            index = torch.arange(pooled.shape[1], device=group.device)
            made = made.index_put((group[:, None], index), pooled)
        real = real & plan.tiles.split(selection.kept).gather(1, middle)
        return _in_images(made, real, plan.tiles.places.gather(1, middle), seen, plan)

    def _pooled(
        self,
        hidden: Tensor,
        plan: Thinning,
        group: Tensor,
        span: tuple[int, int],
        shape: tuple[int, int],
    ) -> Tensor:
        """Cells ``[g, C, D]`` of tiles that are alike; 0 where a cell has no token."""
        index, area = plan.spread(group, span), span[0] * span[1]
        grid = precise(hidden).new_zeros(len(group), area + 1, hidden.shape[2])
        grid = grid.index_put(index, precise(hidden))[:, :area]
        full = grid.new_zeros(len(group), area + 1).index_put(index, grid.new_ones(()))[:, :area]
        values = grid.transpose(1, 2).reshape(len(group), -1, *span)
        holds = full.reshape(len(group), 1, *span)
        share = functional.adaptive_avg_pool2d(holds, shape)
        if self.kind == "average":
            cells = functional.adaptive_avg_pool2d(values, shape) / share.clamp_min(1e-9)
        else:
            lowest = torch.finfo(values.dtype).min
            cells = functional.adaptive_max_pool2d(values.masked_fill(holds == 0, lowest), shape)
            cells = cells.masked_fill(share == 0, 0)
        return cells.flatten(2).transpose(1, 2).to(hidden.dtype)


def _middles(plan: Thinning) -> tuple[Tensor, Tensor]:
    """The token nearest to the middle of each cell, ``[G, C]``, and which cells have tokens."""
    number = len(plan.shapes)
    width = max(1, *(rows * columns for rows, columns in plan.shapes))
    middle = torch.zeros(number, width, dtype=torch.long, device=plan.row.device)
    real = torch.zeros(number, width, dtype=torch.bool, device=plan.row.device)
    for group, span, shape in plan.alike():
        cells, area = shape[0] * shape[1], span[0] * span[1]
        full = torch.zeros(len(group), area + 1, device=group.device)
        full = full.index_put(plan.spread(group, span), full.new_ones(()))[:, :area]
        share = functional.adaptive_avg_pool2d(full.reshape(len(group), 1, *span), shape)
        real[group, :cells] = share.flatten(1) > 0
        present = plan.tiles.present[group]
        middle[group, :cells] = _nearest(plan.row[group], plan.column[group], present, span, shape)
    return middle, real


def _nearest(
    row: Tensor, column: Tensor, present: Tensor, span: tuple[int, int], shape: tuple[int, int]
) -> Tensor:
    """The present token nearest to the middle of each cell, ``[g, C]``."""
    height, width = (
        (2 * torch.arange(cells, device=row.device) + 1) * size // (2 * cells)
        for size, cells in zip(span, shape, strict=True)
    )
    down = (row[:, None] - height[:, None]).abs()  # [g, h, W]
    right = (column[:, None] - width[:, None]).abs()  # [g, w, W]
    far = (down[:, :, None] + right[:, None]).flatten(1, 2)
    return far.masked_fill(~present[:, None], torch.iinfo(far.dtype).max).argmin(2)


def _in_images(made: Tensor, real: Tensor, source: Tensor, seen: Seen, plan: Thinning) -> Merged:
    """Tokens of tiles ``[G, C, D]``, one tile after the other, without gaps.

    An image that is left as it is keeps the order of its places, which tiles may share rows of.
    """
    images = len(seen.counts)
    features = made.reshape(images, -1, made.shape[2])
    real, source = real.reshape(images, -1), source.reshape(images, -1)
    whole = (seen.counts >= seen.valid.sum(1))[:, None]
    order = torch.where(whole, source, 0).masked_fill(~real, plan.tiles.width)
    index = order.argsort(dim=1, stable=True)[:, : int(real.sum(1).amax())]
    valid = real.gather(1, index)
    return Merged(
        gather_rows(features, index), valid, source.gather(1, index), torch.zeros_like(valid)
    )
