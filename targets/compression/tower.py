"""What compressors before the projector read of the vision tower, at the places of the prompt."""

from __future__ import annotations

from torch import Tensor

from targets.compression.base import Seen
from targets.compression.scoring import gather_rows
from targets.errors import CompressionError
from targets.families.vision import VisionPass


def tower_of(seen: Seen, name: str) -> VisionPass:
    """The pass of the vision tower.

    Raises:
        CompressionError: where a compressor called `name` is shown none.
    """
    if seen.vision is None:
        raise CompressionError(f"{name} needs to see the vision tower run")
    return seen.vision


def tower_depth(seen: Seen, name: str) -> int:
    """Number of layers of the vision tower.

    Raises:
        CompressionError: where a compressor called `name` does not know the model.
    """
    if seen.family is None:
        raise CompressionError(f"{name} needs to know how deep the vision tower is")
    return seen.family.tower_depth


def at_places(values: Tensor, seen: Seen) -> Tensor:
    """Values of the tower's tokens ``[I, v, …]`` at the places ``[I, V, …]``.

    Where an earlier cut has merged tokens, a place carries another one than its own.
    """
    if seen.text is None:
        return values
    slots = seen.text.slots
    if values.shape[1] == slots.carries.shape[1] and slots.carry_themselves:
        return values
    return gather_rows(values, slots.carries)
