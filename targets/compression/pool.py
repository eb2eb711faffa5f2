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
        chosen = plan.tiles.join(plan.centres())
        score = chosen.float()
        return Scores(score, standardised(score, seen.valid), chosen=chosen)

    def merge(self, selection: Selection, seen: Seen) -> Merged:
        """The coarser grids of all tiles, ``[I, S, D]``, in reading order of each tile."""
        del selection
        plan = Thinning.of(seen)
        hidden = plan.tiles.split(seen.features.masked_fill(~seen.valid[..., None], 0))
        number = len(plan.shapes)
        width = max(1, *(rows * columns for rows, columns in plan.shapes))
        made = hidden.new_zeros(number, width, hidden.shape[2])
        real = torch.zeros(number, width, dtype=torch.bool, device=hidden.device)
        source = torch.zeros(number, width, dtype=torch.long, device=hidden.device)
        for key in sorted(set(zip(plan.spans, plan.shapes, strict=True))):
            span, shape = key
            if shape[0] == 0:
                continue
            pairs = enumerate(zip(plan.spans, plan.shapes, strict=True))
            group = torch.tensor([tile for tile, one in pairs if one == key], device=hidden.device)
            cells = shape[0] * shape[1]
            pooled, filled, middle = self._pooled(hidden, plan, group, span, shape)
            made = made.index_put((group[:, None], _upto(cells, group)), pooled)
            real[group, :cells], source[group, :cells] = filled, middle
        return _in_images(made, real, plan.tiles.places.gather(1, source), seen, plan)

    def _pooled(
        self,
        hidden: Tensor,
        plan: Thinning,
        group: Tensor,
        span: tuple[int, int],
        shape: tuple[int, int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cells ``[g, C, D]`` of tiles that are alike, which have tokens, and the middle one's."""
        present, width = plan.tiles.present[group], hidden.shape[2]
        flat = plan.row[group] * span[1] + plan.column[group]
        area = span[0] * span[1]
        # Absent tokens are put behind the rectangle, and cut off.
        flat = flat.masked_fill(~present, area)
        index = (torch.arange(len(group), device=hidden.device)[:, None], flat)
        grid = precise(hidden).new_zeros(len(group), area + 1, width)
        grid = grid.index_put(index, precise(hidden[group]))[:, :area]
        full = grid.new_zeros(len(group), area + 1).index_put(index, grid.new_ones(()))[:, :area]
        values = grid.transpose(1, 2).reshape(len(group), width, *span)
        holds = full.reshape(len(group), 1, *span)
        share = functional.adaptive_avg_pool2d(holds, shape)
        if self.kind == "average":
            cells = functional.adaptive_avg_pool2d(values, shape) / share.clamp_min(1e-9)
        else:
            lowest = torch.finfo(values.dtype).min
            cells = functional.adaptive_max_pool2d(values.masked_fill(holds == 0, lowest), shape)
            cells = cells.masked_fill(share == 0, 0)
        middle = _nearest(plan.row[group], plan.column[group], present, span, shape)
        pooled = cells.flatten(2).transpose(1, 2).to(hidden.dtype)
        return pooled, share.flatten(1) > 0, middle


def _upto(cells: int, group: Tensor) -> Tensor:
    return torch.arange(cells, device=group.device).expand(len(group), cells)


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
