"""What compressors share that make one token of every cell of a square grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from targets.compression.base import Merged, Seen, Selection
from targets.errors import CompressionError

if TYPE_CHECKING:
    from targets.families.base import Family


def refusal(family: Family) -> str | None:
    """Why a family's pictures are no single square grid; None if they are."""
    tokens = family.fixed_tokens()
    if tokens == 0:
        return (
            f"it divides one square grid of tokens into cells, and pictures of "
            f"{family.model_types[0]} have grids or tiles that depend on their size; use `pool`"
        )
    if side_of(tokens) ** 2 != tokens:
        return f"it needs a square grid of tokens, and a picture has {tokens}; use `pool`"
    return None


def side_of(tokens: int) -> int:
    """Rows and columns of the largest square grid of at most so many tokens."""
    return int(torch.tensor(tokens, dtype=torch.float64).sqrt().add(1e-9))


def grid_of(seen: Seen, name: str) -> int:
    """Rows and columns of the images' grid.

    Raises:
        CompressionError: if an image is not one whole square.
    """
    shapes = {shape for one in seen.lattice.layouts for shape in one.shapes}
    tiles = {len(one.shapes) for one in seen.lattice.layouts}
    whole = bool(seen.valid.all()) and len(shapes) == 1 and tiles == {1}
    rows, columns = next(iter(shapes))
    if not whole or rows != columns:
        raise CompressionError(
            f"compressor {name}: every image has to be one whole square grid of tokens; here grids "
            f"are {sorted(shapes)} and images have {sorted(tiles)} tiles, "
            f"{seen.valid.sum(1).tolist()} of {seen.totals.tolist()} tokens being left"
        )
    return rows


def pick(selection: Selection, sources: Tensor) -> Tensor:
    """Cells that a selection leaves, bool ``[I, S]``: those whose centre is kept.

    Args:
        selection: the compressor's own keeps the centre of every cell; a forced one may not.
        sources: ``[S]`` place in the centre of each cell.
    """
    return selection.kept[:, sources]


def merged(features: Tensor, sources: Tensor, left: Tensor, *, projected: bool) -> Merged:
    """Tokens of cells ``[I, S, D]``, those `left` first.

    Args:
        features: of all cells.
        sources: ``[S]``.
        left: bool ``[I, S]``, cells that stay.
        projected: see `Merged`.
    """
    order = (~left).long().argsort(dim=1, stable=True)
    width = max(1, int(left.sum(1).amax()))
    order = order[:, :width]
    wide = order[..., None].expand(*order.shape, features.shape[2])
    valid = left.gather(1, order)
    dominant = torch.zeros_like(valid)
    return Merged(features.gather(1, wide), valid, sources[order], dominant, projected)
