"""Coarser grids: how many rows and columns a tile of tokens gets, and which tokens they cover."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from targets.compression.base import Seen
from targets.compression.tiles import Tiles


def thinned(shape: tuple[int, int], count: int) -> tuple[int, int]:
    """Rows and columns of the largest grid of at most `count` cells, as little distorted as can be.

    Both sides shrink alike; while it fits, the side that shrank more gets one more. A square grid
    with a square count becomes a square.

    Args:
        shape: rows and columns there are, ≥ 1 each.
        count: cells wanted, ≥ 1.
    """
    height, width = shape
    if count >= height * width:
        return shape
    scale = (count / (height * width)) ** 0.5
    rows = min(count, max(1, int(height * scale + 1e-9)))
    columns = min(count // rows, max(1, int(width * scale + 1e-9)))
    while True:
        taller = rows < height and (rows + 1) * columns <= count
        wider = columns < width and rows * (columns + 1) <= count
        if not (taller or wider):
            return rows, columns
        if taller and (not wider or rows * width <= columns * height):
            rows += 1
        else:
            columns += 1


@dataclass(frozen=True, slots=True)
class Thinning:
    """The present tokens of each tile on the rectangle they span, and the coarser grid for it.

    G tiles of W places, as in `Tiles`.

    Attributes:
        tiles: the tiles.
        row: long ``[G, W]``, within the rectangle.
        column: long ``[G, W]``.
        spans: rows and columns of each rectangle; (0, 0) where a tile has no token.
        shapes: rows and columns of each coarser grid.
    """

    tiles: Tiles
    row: Tensor
    column: Tensor
    spans: tuple[tuple[int, int], ...]
    shapes: tuple[tuple[int, int], ...]

    @staticmethod
    def of(seen: Seen) -> Thinning:
        """Grids for the budgets of an image's tiles, shared out by their sizes."""
        tiles = Tiles.of(seen.lattice, seen.valid)
        wanted = tiles.share(seen.counts).tolist()
        sides = []
        for values in (tiles.split(seen.lattice.row), tiles.split(seen.lattice.column)):
            most = torch.iinfo(values.dtype).max
            low = values.masked_fill(~tiles.present, most).amin(1, keepdim=True)
            inside = (values - low).masked_fill(~tiles.present, 0)
            empty = ~tiles.present.any(1)
            sides.append((inside, (inside.amax(1) + 1).masked_fill(empty, 0).tolist()))
        (row, heights), (column, widths) = sides
        spans = tuple(zip(heights, widths, strict=True))
        shapes = tuple(
            thinned(span, count) if span[0] and count else (0, 0)
            for span, count in zip(spans, wanted, strict=True)
        )
        return Thinning(tiles, row, column, spans, shapes)

    def alike(self) -> Iterator[tuple[Tensor, tuple[int, int], tuple[int, int]]]:
        """Indices of tiles with one span and one coarser grid, and these; empty ones left out."""
        pairs = tuple(zip(self.spans, self.shapes, strict=True))
        for key in sorted({pair for pair in pairs if pair[1][0] > 0}):
            found = [index for index, pair in enumerate(pairs) if pair == key]
            yield torch.tensor(found, device=self.row.device), *key

    def spread(self, group: Tensor, span: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Where the tokens of some tiles go in ``[g, area + 1]``; absent ones go to the end."""
        flat = self.row[group] * span[1] + self.column[group]
        flat = flat.masked_fill(~self.tiles.present[group], span[0] * span[1])
        return torch.arange(len(group), device=flat.device)[:, None], flat

    def centres(self) -> Tensor:
        """Present tokens in the middle of a cell, bool ``[G, W]``."""
        middle = torch.zeros_like(self.tiles.present)
        for tile, (span, shape) in enumerate(zip(self.spans, self.shapes, strict=True)):
            if shape[0] == 0:
                continue
            rows, columns = (
                torch.zeros(size, dtype=torch.bool, device=middle.device).index_fill(
                    0, torch.tensor(_middles(size, cells), device=middle.device), True
                )
                for size, cells in zip(span, shape, strict=True)
            )
            middle[tile] = rows[self.row[tile]] & columns[self.column[tile]]
        return middle & self.tiles.present


def _middles(size: int, cells: int) -> list[int]:
    """The index in the middle of each of `cells` equal parts of `size`."""
    return [(2 * cell + 1) * size // (2 * cells) for cell in range(cells)]
