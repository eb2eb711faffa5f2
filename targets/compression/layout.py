"""Where image tokens sit in a batch of prompts, and what is left of the sequence after a cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from targets.errors import CompressionError


@dataclass(frozen=True, slots=True)
class ImageSlots:
    """Columns of the visual tokens of I images in a batch of B rows.

    A row may hold no image, one, or several; images are numbered in reading order.

    Attributes:
        rows: ``[I]`` row of each image.
        columns: ``[I, V]`` columns of its tokens, ascending.
    """

    rows: Tensor
    columns: Tensor

    def gather(self, values: Tensor) -> Tensor:
        """Entries of ``[B, L, …]`` at the image tokens: ``[I, V, …]``."""
        return values[self.rows[:, None], self.columns]

    def ordinals(self) -> tuple[int, ...]:
        """For each image, how many images come before it in its row."""
        seen: dict[int, int] = {}
        out = []
        for row in self.rows.tolist():
            out.append(seen.get(row, 0))
            seen[row] = out[-1] + 1
        return tuple(out)


def find_slots(image_mask: Tensor, tokens: int) -> ImageSlots | None:
    """Slots from the placeholder mask ``[B, L]``; None where there is no image.

    Raises:
        CompressionError: if a row's placeholders are no multiple of `tokens`.
    """
    hits = image_mask.nonzero()
    if len(hits) == 0:
        return None
    counts = image_mask.sum(1)
    if bool((counts % tokens != 0).any()):
        raise CompressionError(
            f"rows hold {counts.tolist()} image placeholders; every image has {tokens} of them"
        )
    rows, columns = (part.view(-1, tokens) for part in hits.unbind(1))
    return ImageSlots(rows[:, 0], columns)


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive language-model layers that see the same columns.

    Attributes:
        start: first layer.
        mask: ``[B, n]`` 0/1, columns that may be attended to; grows by one a decoding step.
        index: ``[B, n]`` columns of the original sequence; None where all are there.
        shift: ``[B]`` how much position ids of what follows are lowered; None for nothing.
        positions: ``[B, n]`` position ids of the columns, at prefill.
        bias: ``[B, n]`` added to the attention logits of each column (zero forward); None is none.
        inside: whether it was cut inside the language model, so that what the model made for its
            layers does not fit.
    """

    start: int
    mask: Tensor
    index: Tensor | None = None
    shift: Tensor | None = None
    positions: Tensor | None = None
    bias: Tensor | None = None
    inside: bool = False

    def extended(self, steps: int) -> Group:
        """The group `steps` decoded tokens later."""
        ones = self.mask.new_ones(len(self.mask), steps)
        mask = torch.cat([self.mask, ones], 1)
        return Group(self.start, mask, self.index, self.shift, inside=self.inside)


def columns_kept(keep: Tensor) -> tuple[Tensor, Tensor] | None:
    """Columns that survive, as short as the fullest row allows.

    Rows that keep fewer are filled up at the left with dropped columns, which are dead: the order
    stays, and the last column stays last.

    Args:
        keep: bool ``[B, L]``.

    Returns:
        Indices ``[B, n]`` and which of them live, bool ``[B, n]``; None if nothing is dropped.
    """
    width = int(keep.sum(1).amax())
    if width == keep.shape[1]:
        return None
    index = keep.long().argsort(dim=1, stable=True)[:, keep.shape[1] - width :]
    return index, keep.gather(1, index)


def keep_of(slots: ImageSlots, kept: Tensor, length: int, rows: int) -> Tensor:
    """Keep mask ``[B, L]``: all text columns, and the image columns that are kept, ``[I, V]``."""
    keep = torch.ones(rows, length, dtype=torch.bool, device=kept.device)
    keep[slots.rows[:, None], slots.columns] = kept
    return keep


def reindexed(positions: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Position ids without gaps, and by how much what follows moves.

    Args:
        positions: ``[B, n]`` position ids, with gaps.
        live: bool ``[B, n]``, columns that count.

    Returns:
        New ids ``[B, n]``, starting where the first live column stood, and the shift ``[B]``.
    """
    big = torch.iinfo(positions.dtype).max
    first = positions.masked_fill(~live, big).amin(1, keepdim=True)
    fresh = (first + live.long().cumsum(1) - 1).clamp_min(0)
    last = positions.masked_fill(~live, -1).amax(1)
    return fresh, last - fresh.masked_fill(~live, -1).amax(1)
