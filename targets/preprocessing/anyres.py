"""AnyRes: a picture as one small view of the whole and a grid of tiles at a better resolution.

LLaVA-NeXT's way ("LLaVA-NeXT: Improved reasoning, OCR, and world knowledge", 2024), and with a
limit on the number of tokens LLaVA-OneVision's (arXiv 2408.03326). Everything here follows from the
size of a picture alone, so both the image processor and the model's side ask the same `Packing`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import torch
from torch import Tensor

from targets.errors import TargetError
from targets.preprocessing.layout import Layout

Size = tuple[int, int]
_LIMITED: Final = "anyres_max_"
_POOLS_ABOVE: Final = 1.1
"""OneVision leaves grids alone that are longer than the limit by no more than this factor."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a picture of one size is cut into tiles.

    Attributes:
        shape: rows and columns of tiles.
        resized: height and width the picture is resampled to.
        offset: rows and columns of black above and left of it.
    """

    shape: Size
    resized: Size
    offset: Size


@dataclass(frozen=True, slots=True)
class PackedLayout(Layout):
    """A layout that knows which patches of the vision tower each token is made of.

    Attributes:
        patches: long ``[V, r]``, patches counted over the tiles of the picture (tile · P + patch).
        weights: float ``[V, r]``, how much of each; rows sum to 1. Patches are mixed behind the
            projector.
    """

    patches: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class Axis:
    """The tokens of the tiles along one direction of the picture.

    Attributes:
        tile: long ``[n]``, tile along this direction, counted from 0.
        patch: long ``[n]``, patch within the tile that the token's centre lies in.
        start: float64 ``[n]``, where the token begins, in pixels of the picture.
        end: float64 ``[n]``, where it ends.
        sources: long ``[n, 2]``, the two patches of the whole grid it is interpolated from.
        weights: float64 ``[n, 2]``, how much it takes of each; they sum to 1.
        mixes: whether any takes something of both.
    """

    tile: Tensor
    patch: Tensor
    start: Tensor
    end: Tensor
    sources: Tensor
    weights: Tensor
    mixes: bool

    def __len__(self) -> int:
        return len(self.tile)


@dataclass(frozen=True, slots=True)
class Packing:
    """How a model cuts pictures and packs the features of their tiles into one row of tokens.

    Attributes:
        tile: height and width of a tile in pixels, those of the vision tower.
        patch: height and width of a patch.
        pinpoints: heights and widths pictures may be resampled into, multiples of `tile`.
        limit: tiles' worth of tokens above which the grid is interpolated down (OneVision); None
            for no limit.
    """

    tile: int
    patch: int
    pinpoints: tuple[Size, ...]
    limit: int | None = None

    @classmethod
    def of(cls, config: Any) -> Packing:  # noqa: ANN401 - a configuration of transformers
        """Read the packing of a LLaVA-NeXT or LLaVA-OneVision configuration.

        Raises:
            TargetError: for pinpoints that no whole number of tiles fills, or another way of
                packing than ``anyres_max_N``.
        """
        vision = config.vision_config
        tile, patch = int(vision.image_size), int(vision.patch_size)
        pinpoints = tuple(
            (int(rows), int(columns)) for rows, columns in config.image_grid_pinpoints
        )
        odd = [place for place in pinpoints if place[0] % tile or place[1] % tile]
        if odd or not pinpoints:
            raise TargetError(
                f"{config.model_type}: image_grid_pinpoints {odd or 'are empty'}; each has to be a "
                f"height and width that are multiples of the vision tower's {tile} pixels"
            )
        aspect = getattr(config, "vision_aspect_ratio", None)
        return cls(tile, patch, pinpoints, None if aspect is None else _limit(aspect))

    @property
    def side(self) -> int:
        """Patches along one direction of a tile; pixels behind the last are never seen."""
        return self.tile // self.patch

    def tiling(self, size: Size) -> Tiling:
        """How a picture of this height and width is cut."""
        target = best_resolution(size, self.pinpoints)
        high, wide = target[0] / size[0], target[1] / size[1]
        if wide < high:
            resized = (min(math.ceil(size[0] * wide), target[0]), target[1])
        else:
            resized = (target[0], min(math.ceil(size[1] * high), target[1]))
        offset = ((target[0] - resized[0]) // 2, (target[1] - resized[1]) // 2)
        return Tiling((target[0] // self.tile, target[1] // self.tile), resized, offset)

    def axes(self, size: Size) -> tuple[Axis, Axis]:
        """Rows and columns of the tokens of the tiles, padding and what is over the limit gone."""
        how = self.tiling(size)
        grid = (how.shape[0] * self.side, how.shape[1] * self.side)
        parts = unpadded(size, grid)
        wanted = self._pooled((len(parts[0]), len(parts[1])))
        rows, columns = (self._axis(size, how, parts[axis], wanted[axis], axis) for axis in (0, 1))
        return rows, columns

    def layout(self, size: Size) -> PackedLayout:
        """Tokens of a picture of this height and width, in the order of the language model.

        First the whole picture, row by row; then the grid of the tiles, each row closed by a
        newline. A token that is interpolated (OneVision) has the cell of the interpolated grid as
        its box and the patch in which the centre of that cell lies as its place.
        """
        return _layout(self, size)

    def single(self, size: Size) -> PackedLayout:
        """Tokens of a picture that is one padded square (OneVision, several in a prompt).

        They are closed by one newline.
        """
        side = max(size)
        corner = (-float((side - size[0]) // 2), -float((side - size[1]) // 2))
        square = self.view(corner, (side / self.tile,) * 2)
        return replace(square, placeholders=square.tokens + 1)

    def view(self, corner: tuple[float, float], scale: tuple[float, float]) -> PackedLayout:
        """A tile that shows the picture from a corner on, each of its pixels `scale` of those."""
        top, left = corner
        length = self.side * self.patch
        box = (top, left, top + length * scale[0], left + length * scale[1])
        grid = Layout.grid((self.side, self.side), box)
        values = {one.name: getattr(grid, one.name) for one in fields(Layout)}
        own = torch.arange(grid.tokens)[:, None]
        return PackedLayout(**values, patches=own, weights=torch.ones(grid.tokens, 1).double())

    def mixture(self, rows: Axis, columns: Axis, wide: int) -> tuple[Tensor, Tensor]:
        """`patches` and `weights` of the tokens of the tiles, `wide` of which are side by side."""
        take = 2 if rows.mixes or columns.mixes else 1
        side = self.side
        down, across = rows.sources[:, None, :take, None], columns.sources[None, :, None, :take]
        tile = 1 + (down // side) * wide + across // side
        patches = tile * side**2 + (down % side) * side + across % side
        weights = rows.weights[:, None, :take, None] * columns.weights[None, :, None, :take]
        return patches.flatten(2).flatten(0, 1), weights.flatten(2).flatten(0, 1)

    def _pooled(self, grid: Size) -> Size:
        """Rows and columns after the limit."""
        if self.limit is None:
            return grid
        over = math.sqrt(grid[0] * grid[1] / (self.limit * self.side**2))
        return (int(grid[0] // over), int(grid[1] // over)) if over > _POOLS_ABOVE else grid

    def _axis(self, size: Size, how: Tiling, part: range, wanted: int, axis: int) -> Axis:
        side, have = self.side, len(part)
        edges = [part.start + index * have / max(wanted, 1) for index in range(wanted + 1)]
        middle = (torch.arange(wanted, dtype=torch.float64) + 0.5) * have / max(wanted, 1)
        centre = part.start + middle.long()
        # Bilinear interpolation between the centres of two patches, held at the ends.
        before = (middle - 0.5).clamp(min=0)
        low = before.long()
        high = (low + 1).clamp(max=max(have - 1, 0))
        share = before - low
        pixels = size[axis] / how.resized[axis]
        start = [self._pixel(edge, math.floor(edge)) for edge in edges[:-1]]
        end = [self._pixel(edge, math.ceil(edge) - 1) for edge in edges[1:]]
        begin, stop = (torch.tensor(places, dtype=torch.float64) for places in (start, end))
        return Axis(
            tile=centre // side,
            patch=centre % side,
            start=(begin - how.offset[axis]) * pixels,
            end=(stop - how.offset[axis]) * pixels,
            sources=part.start + torch.stack([low, high], 1),
            weights=torch.stack([1 - share, share], 1),
            mixes=wanted != have,
        )

    def _pixel(self, place: float, patch: int) -> float:
        """Pixel of a place on the grid of patches, as an edge of `patch`.

        Where a tile is no whole number of patches, the next one begins behind a strip unseen.
        """
        tile, inside = divmod(patch, self.side)
        return tile * self.tile + (inside + place - patch) * self.patch


@functools.lru_cache(maxsize=64)
def _layout(packing: Packing, size: Size) -> PackedLayout:
    """`Packing.layout`; asked for several times in every forward of a picture."""
    rows, columns = packing.axes(size)
    high, wide = len(rows), len(columns)
    down = torch.arange(high).repeat_interleave(wide)
    across = torch.arange(wide).repeat(high)
    tiles = packing.tiling(size).shape
    scale = (size[0] / packing.tile, size[1] / packing.tile)
    base = packing.view((0.0, 0.0), scale)
    boxes = torch.stack(
        [rows.start[down], columns.start[across], rows.end[down], columns.end[across]], 1
    )
    first = base.tokens
    patches, weights = packing.mixture(rows, columns, tiles[1])
    whole = base.patches.expand(-1, patches.shape[1])
    return PackedLayout(
        boxes=torch.cat([base.boxes, boxes]),
        tile=torch.cat([base.tile, 1 + rows.tile[down] * tiles[1] + columns.tile[across]]),
        row=torch.cat([base.row, rows.patch[down]]),
        column=torch.cat([base.column, columns.patch[across]]),
        shapes=base.shapes * (1 + tiles[0] * tiles[1]),
        base=0,
        columns=torch.cat([base.columns, first + down * (wide + 1) + across]),
        placeholders=first + high * (wide + 1),
        patches=torch.cat([whole, patches]),
        weights=torch.cat([torch.eye(1, patches.shape[1]).double().expand(first, -1), weights]),
    )


def best_resolution(size: Size, pinpoints: tuple[Size, ...]) -> Size:
    """The pinpoint that shows most of a picture, at no more than its own resolution.

    Among those that show as many pixels, the one that leaves the fewest empty; then the first.
    """
    height, width = size

    def worth(place: Size) -> tuple[int, int]:
        scale = min(place[1] / width, place[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - place[0] * place[1]

    return max(pinpoints, key=worth)


def unpadded(size: Size, grid: Size) -> tuple[range, range]:
    """Rows and columns of a grid of patches that are left when padding is cut off.

    The model goes by the shape of the picture, not by what was padded in pixels, and cuts whole
    patches: some that are partly padding stay, up to one patch of the picture may go at either
    side, and a picture thinner than a patch loses all of it.
    """
    height, width = size
    rows, columns = grid
    if width / height > columns / rows:
        inner = int(round(height * (columns / width), 7))
        cut = (rows - inner) // 2
        return range(cut, rows - cut), range(columns)
    inner = int(round(width * (rows / height), 7))
    cut = (columns - inner) // 2
    return range(rows), range(cut, columns - cut)


def pairs(pinpoints: Any) -> tuple[Size, ...]:  # noqa: ANN401 - lists of transformers
    """Pinpoints as they are written in configurations, heights first."""
    return tuple((int(rows), int(columns)) for rows, columns in pinpoints)


def _limit(aspect: str) -> int:
    number = aspect.removeprefix(_LIMITED)
    if not aspect.startswith(_LIMITED) or not number.isdigit() or int(number) < 1:
        raise TargetError(
            f"vision_aspect_ratio is {aspect!r}; supported is {_LIMITED}N, with N the tiles' worth "
            "of tokens a picture may have (anyres_max_9)"
        )
    return int(number)
