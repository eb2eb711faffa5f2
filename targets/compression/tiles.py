"""Tokens sorted by the tile of their picture, and budgets shared out among tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from targets.compression.layout import Lattice
from targets.compression.scoring import gather_rows


@dataclass(frozen=True, slots=True)
class Tiles:
    """The living places of I images, tile by tile, each in reading order of its tile.

    All methods take and give G = I · T rows of W places, the T tiles of an image one after the
    other, so that a method written for pictures works on tiles.

    Attributes:
        places: long ``[G, W]``, place of each token; 0 where there is none.
        present: bool ``[G, W]``.
        number: T, the most tiles of any image.
        width: V, places of an image.
    """

    places: Tensor
    present: Tensor
    number: int
    width: int

    @staticmethod
    def of(lattice: Lattice, valid: Tensor) -> Tiles:
        """Tiles of the valid places, bool ``[I, V]``."""
        images, width = valid.shape
        number = max((len(one.shapes) for one in lattice.layouts), default=1)
        if number == 1:
            places = torch.arange(width, device=valid.device).expand(images, width)
            return Tiles(places, valid, 1, width)
        tiles = torch.arange(number, device=valid.device)[:, None]
        inside = ((lattice.tile[:, None] == tiles) & valid[:, None]).flatten(0, 1)  # [G, V]
        count = inside.sum(1)
        longest = int(count.amax()) if len(count) else 0
        places = (~inside).long().argsort(dim=1, stable=True)[:, :longest]
        present = torch.arange(longest, device=valid.device) < count[:, None]
        return Tiles(places.masked_fill(~present, 0), present, number, width)

    @property
    def sizes(self) -> Tensor:
        """``[I, T]`` living tokens of each tile."""
        return self.present.sum(1).view(-1, self.number)

    def shapes(self, lattice: Lattice) -> Tensor:
        """Rows and columns of the grid of each tile, long ``[G, 2]``; ones where there is none."""
        found = [
            shape
            for one in lattice.layouts
            for shape in (*one.shapes, *[(1, 1)] * (self.number - len(one.shapes)))
        ]
        return torch.tensor(found, device=self.places.device)

    def split(self, values: Tensor) -> Tensor:
        """Values ``[I, V, …]`` of the places: ``[G, W, …]``, anything where absent."""
        if self.number == 1:
            return values
        return gather_rows(values.repeat_interleave(self.number, 0), self.places)

    def join(self, values: Tensor, absent: float = 0) -> Tensor:
        """Values ``[G, W]`` on the places of the images, ``[I, V]``; elsewhere `absent`."""
        found = values.new_full((len(values) // self.number, self.width), absent)
        image = torch.arange(len(values), device=values.device) // self.number
        rows = image[:, None].expand_as(self.places)
        return found.index_put(
            (rows[self.present], self.places[self.present]), values[self.present]
        )

    def share(self, counts: Tensor) -> Tensor:
        """Budgets ``[I]`` in proportion to the tiles' sizes: ``[G]``."""
        return shared(counts, self.sizes, self.sizes).flatten()


def shared(counts: Tensor, weights: Tensor, room: Tensor) -> Tensor:
    """Share out whole tokens in proportion to weights, by largest remainders.

    What does not fit into its part goes to the other parts, heaviest claim first; of equal claims
    the first part has it.

    Args:
        counts: long ``[I]`` to share out; no more than `room` holds is.
        weights: long ``[I, T]``, ≥ 0; where all are 0, `room` is the weight.
        room: long ``[I, T]``, the most each part takes.

    Returns:
        long ``[I, T]``, rows sum to `counts`.
    """
    counts = torch.minimum(counts, room.sum(1))
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, room)
    # In whole numbers, so that equal claims are equal.
    total = weights.sum(1, keepdim=True).clamp_min(1)
    due = weights * counts[:, None]
    given = torch.minimum(due // total, room)
    while bool((counts > given.sum(1)).any()):
        claim = (due - given * total).masked_fill(given >= room, torch.iinfo(due.dtype).min)
        left = counts - given.sum(1)
        place = claim.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        given = given + ((place < left[:, None]) & (given < room)).long()
    return given
