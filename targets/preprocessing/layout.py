"""Which part of a picture each visual token stands for, and what a preprocessor promises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """The visual tokens of a picture of one size, in the order the language model gets them.

    Attributes:
        boxes: float ``[V, 4]``: top, left, bottom, right of each token in pixels of the picture
            before preprocessing; may reach beyond the picture where it was padded.
        tile: long ``[V]``, which run of the vision tower the token comes from, counted from 0
            within the picture.
        row: long ``[V]``, its row on the token grid of that tile.
        column: long ``[V]``, its column.
        shapes: rows and columns of the token grid of each tile.
        base: the tile that shows the whole picture.
        columns: long ``[V]``, place among all image placeholders of the picture.
        placeholders: how many there are; those that are no token (row separators) are never
            ranked.
    """

    boxes: Tensor
    tile: Tensor
    row: Tensor
    column: Tensor
    shapes: tuple[tuple[int, int], ...]
    base: int
    columns: Tensor
    placeholders: int

    @property
    def tokens(self) -> int:
        """V."""
        return len(self.tile)

    @property
    def separators(self) -> Tensor:
        """Places among the placeholders that are no token, long ``[P − V]``."""
        free = torch.ones(self.placeholders, dtype=torch.bool)
        free[self.columns] = False
        return free.nonzero().flatten()

    def pixels(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Pixels that tokens cover: float ``[B, V]`` → ``[B, 1, *size]``.

        A pixel belongs to the tokens whose box its centre is in; where several do (tiles over a
        whole picture), it has the largest of their values, and 0 where none does.
        """
        height, width = size
        found = tokens.new_zeros(len(tokens), 1, height, width)
        for index, (top, left, bottom, right) in enumerate(self.boxes.tolist()):
            # The first pixel whose centre is not before the edge.
            rows = slice(max(0, _first(top)), max(0, min(height, _first(bottom))))
            cols = slice(max(0, _first(left)), max(0, min(width, _first(right))))
            here = found[:, :, rows, cols]
            found[:, :, rows, cols] = torch.maximum(here, tokens[:, index, None, None, None])
        return found

    @staticmethod
    def grid(
        shape: tuple[int, int], box: tuple[float, float, float, float] | None = None
    ) -> Layout:
        """One tile of `shape` tokens over a box of the picture (unit square if None)."""
        rows, columns = shape
        top, left, bottom, right = box or (0.0, 0.0, 1.0, 1.0)
        row = torch.arange(rows).repeat_interleave(columns)
        column = torch.arange(columns).repeat(rows)
        high, wide = (bottom - top) / rows, (right - left) / columns
        edges = torch.stack(
            [
                top + row.double() * high,
                left + column.double() * wide,
                top + (row + 1).double() * high,
                left + (column + 1).double() * wide,
            ],
            1,
        )
        count = rows * columns
        zeros = torch.zeros(count, dtype=torch.long)
        places = torch.arange(count)
        return Layout(edges, zeros, row, column, (shape,), 0, places, count)


def _first(edge: float) -> int:
    """First pixel whose centre (index + ½) is at or behind an edge."""
    return int(-(-(edge - 0.5) // 1))


@runtime_checkable
class Preprocessing(Protocol):
    """A family's image processor on tensors."""

    def inputs(self, images: Tensor) -> dict[str, Tensor]:
        """Image arguments of the model's ``forward``, differentiable in the images.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1]; any height and width, one for the batch.
        """
        ...

    def layout(self, size: tuple[int, int]) -> Layout:
        """The visual tokens of a picture of this height and width."""
        ...
