"""Where image tokens sit in a batch of prompts, and what is left of the sequence after a cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from targets.errors import CompressionError
from targets.preprocessing.layout import Layout


@dataclass(frozen=True, slots=True)
class Lattice:
    """Where in its picture each place of I images lies; entries of absent places are 0.

    Attributes:
        tile: long ``[I, V]``, run of the vision tower within the image.
        row: long ``[I, V]``, row on that tile's grid of tokens.
        column: long ``[I, V]``.
        layouts: of each image; grids of tiles and which one shows the whole picture.
    """

    tile: Tensor
    row: Tensor
    column: Tensor
    layouts: tuple[Layout, ...]

    @staticmethod
    def of(layouts: Sequence[Layout], device: torch.device) -> Lattice:
        """The lattice of images of these layouts, padded to the longest."""
        width = max(one.tokens for one in layouts)

        members = alike(layouts)

        def padded(name: str) -> Tensor:
            found = torch.zeros(len(layouts), width, dtype=torch.long)
            for images in members:
                row = getattr(layouts[images[0]], name)
                found[images, : len(row)] = row
            return found.to(device)

        return Lattice(padded("tile"), padded("row"), padded("column"), tuple(layouts))


@dataclass(frozen=True, slots=True)
class ImageSlots:
    """Columns of the visual tokens of I images in a batch of B rows.

    A row may hold no image, one, or several; images are numbered in reading order. A *place* is one
    of the V slots an image has in the uncompressed prompt; places never change their number, so
    that selections of later cuts compose.

    Attributes:
        rows: ``[I]`` row of each image.
        columns: ``[I, V]`` present column of each place; 0 where it has none.
        alive: bool ``[I, V]``, places that have a column and may be attended to.
        carries: ``[I, V]`` visual token each place carries; others than itself after merging.
        lattice: where the tokens lie.
        separators: bool ``[B, L]``, image placeholders that are no token (row separators).
    """

    rows: Tensor
    columns: Tensor
    alive: Tensor
    carries: Tensor
    lattice: Lattice
    separators: Tensor

    @property
    def carry_themselves(self) -> bool:
        """Whether every place carries its own token, as before any merging."""
        own = torch.arange(self.carries.shape[1], device=self.carries.device)
        return torch.equal(self.carries, own.expand_as(self.carries))

    @property
    def totals(self) -> Tensor:
        """``[I]`` visual tokens each image had before any cut."""
        counts = [one.tokens for one in self.lattice.layouts]
        return torch.tensor(counts, device=self.rows.device)

    def gather(self, values: Tensor) -> Tensor:
        """Entries of ``[B, L, …]`` at the places: ``[I, V, …]``; some column's where dead."""
        return values[self.rows[:, None], self.columns]

    def ordinals(self) -> tuple[int, ...]:
        """For each image, how many images come before it in its row."""
        seen: dict[int, int] = {}
        out = []
        for row in self.rows.tolist():
            out.append(seen.get(row, 0))
            seen[row] = out[-1] + 1
        return tuple(out)

    def image_columns(self, length: int, batch: int) -> Tensor:
        """Columns that hold a visual token or a separator, bool ``[B, L]``."""
        found = self.separators.clone() if self.separators.numel() else None
        if found is None or found.shape != (batch, length):
            found = torch.zeros(batch, length, dtype=torch.bool, device=self.rows.device)
        rows = self.rows[:, None].expand_as(self.columns)
        found[rows[self.alive], self.columns[self.alive]] = True
        return found

    def spread(self, values: Tensor, length: int, batch: int) -> Tensor:
        """Values ``[I, V]`` of the living places on their columns ``[B, L]``, 0 elsewhere."""
        out = values.new_zeros(batch, length)
        rows = self.rows[:, None].expand_as(self.columns)
        return out.index_put((rows[self.alive], self.columns[self.alive]), values[self.alive])

    def after(self, kept: Tensor, index: Tensor | None) -> ImageSlots:
        """The slots once only `kept` places live on the columns ``index [B, n]``."""
        alive = self.alive & kept
        if index is None:
            return replace(self, alive=alive)
        # Where each old column stands now; columns that are gone point nowhere of interest.
        width = int(max(self.columns.amax(), index.amax())) + 1
        where = torch.zeros(len(index), width, dtype=torch.long, device=index.device)
        where.scatter_(1, index, torch.arange(index.shape[1], device=index.device).expand_as(index))
        columns = where[self.rows[:, None], self.columns].masked_fill(~alive, 0)
        separators = self.separators.gather(1, index)
        return replace(self, columns=columns, alive=alive, separators=separators)


def find_slots(image_mask: Tensor, layouts: Sequence[Layout]) -> ImageSlots | None:
    """Slots from the placeholder mask ``[B, L]`` and the layout of each image in reading order.

    Raises:
        CompressionError: if placeholders and layouts do not fit.
    """
    hits = image_mask.nonzero()
    if len(hits) == 0:
        return None
    wanted = [one.placeholders for one in layouts]
    if sum(wanted) != len(hits):
        raise CompressionError(
            f"rows hold {image_mask.sum(1).tolist()} image placeholders, but the images have "
            f"{wanted} of them"
        )
    count, width = len(layouts), max(one.tokens for one in layouts)
    rows = hits.new_zeros(count)
    columns = hits.new_zeros(count, width)
    alive = torch.zeros(count, width, dtype=torch.bool, device=hits.device)
    separators = torch.zeros_like(image_mask)
    starts = torch.tensor([0, *wanted[:-1]], device=hits.device).cumsum(0)
    for images in alike(layouts):
        one = layouts[images[0]]
        # [n, placeholders, 2]: row and column of each placeholder of n images.
        part = hits[starts[images][:, None] + torch.arange(one.placeholders, device=hits.device)]
        if bool((part[..., 0] != part[:, :1, 0]).any()):
            raise CompressionError(
                f"the {one.placeholders} placeholders of an image are spread over several rows: "
                f"rows hold {image_mask.sum(1).tolist()}, the images have {wanted}"
            )
        rows[images] = part[:, 0, 0]
        columns[images, : one.tokens] = part[:, one.columns.to(part.device), 1]
        alive[images, : one.tokens] = True
        apart = part[:, one.separators.to(part.device)].flatten(0, 1)
        separators[apart[:, 0], apart[:, 1]] = True
    places = torch.arange(width, device=hits.device).expand(count, width).clone()
    return ImageSlots(rows, columns, alive, places, Lattice.of(layouts, hits.device), separators)


def alike(layouts: Sequence[Layout]) -> list[list[int]]:
    """Images of one layout, the very object: a batch of equal pictures has one for all."""
    found: dict[int, list[int]] = {}
    for image, one in enumerate(layouts):
        found.setdefault(id(one), []).append(image)
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive language-model layers that see the same columns.

    Attributes:
        start: first layer.
        mask: ``[B, n]`` 0/1, columns that may be attended to; grows by one a decoding step.
        index: ``[B, n]`` columns of the original sequence; None where all are there.
        shift: ``[B]`` how much position ids of what follows are lowered; None for nothing.
        positions: ``[…, B, n]`` position ids of the columns, at prefill.
        bias: ``[B, n]`` added to the attention logits of each column (zero forward); None is none.
        inside: whether it was cut inside the language model, so that what the model made for its
            layers does not fit.
        slots: where the images are, at prefill.
    """

    start: int
    mask: Tensor
    index: Tensor | None = None
    shift: Tensor | None = None
    positions: Tensor | None = None
    bias: Tensor | None = None
    inside: bool = False
    slots: ImageSlots | None = None

    def extended(self, steps: int) -> Group:
        """The group `steps` decoded tokens later."""
        ones = self.mask.new_ones(len(self.mask), steps)
        mask = torch.cat([self.mask, ones], 1)
        return Group(self.start, mask, self.index, self.shift, inside=self.inside)


def columns_kept(keep: Tensor) -> Tensor | None:
    """Columns that survive, as short as the fullest row allows.

    Rows that keep fewer are filled up at the left with dropped columns, which are dead: the order
    stays, and the last column stays last.

    Args:
        keep: bool ``[B, L]``.

    Returns:
        Indices ``[B, n]``; None if nothing is dropped.
    """
    width = int(keep.sum(1).amax())
    if width == keep.shape[1]:
        return None
    return keep.long().argsort(dim=1, stable=True)[:, keep.shape[1] - width :]


def take(positions: Tensor, index: Tensor) -> Tensor:
    """Position ids ``[…, B, L]`` of the columns ``index [B, n]``: ``[…, B, n]``."""
    return positions.gather(-1, index.expand(*positions.shape[:-2], *index.shape))


def last_position(positions: Tensor, live: Tensor) -> Tensor:
    """``[B]`` the largest position id of living columns, over all axes of ``[…, B, n]``."""
    largest = positions.masked_fill(~live, -1).amax(-1)
    return largest.reshape(-1, largest.shape[-1]).amax(0)


def reindexed(positions: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Position ids without gaps, and by how much what follows moves.

    Args:
        positions: ``[…, B, n]`` position ids, with gaps. Where a column has several ids (axes of
            multimodal rotary embeddings) all of them become the same number, as for text.
        live: bool ``[B, n]``, columns that count.

    Returns:
        New ids ``[…, B, n]``, starting where the first live column stood, and the shift ``[B]``.
    """
    big = torch.iinfo(positions.dtype).max
    flat = positions.reshape(-1, *positions.shape[-2:])
    first = flat.masked_fill(~live, big).amin((0, 2))[:, None]
    fresh = (first + live.long().cumsum(1) - 1).clamp_min(0)
    shift = last_position(positions, live) - fresh.masked_fill(~live, -1).amax(1)
    return fresh.expand_as(positions), shift
