"""Templates: one small pattern that is repeated over the whole picture."""

from __future__ import annotations

import torch
from torch import Tensor


def tile(template: Tensor, size: tuple[int, int], phase: Tensor | None = None) -> Tensor:
    """Repeat a template over a picture.

    ``delta[y, x] = u[(y + p_y) mod t, (x + p_x) mod t]``. Differentiable: the gradient of u is the
    gradient of delta summed over all pixels that show the same entry of u.

    Args:
        template: u, ``[B, C, t, t]``.
        size: height and width of the picture.
        phase: int64 ``[B, 2]``, where in the template the top left pixel lies (row, column);
            None is 0, 0.

    Returns:
        ``[B, C, H, W]``.
    """
    rows, columns = _places(template, size, phase)
    picked = template.gather(2, rows[:, None, :, None].expand(-1, template.shape[1], -1,
                                                               template.shape[3]))  # fmt: skip
    return picked.gather(3, columns[:, None, None, :].expand(-1, template.shape[1], size[0], -1))


def fold(delta: Tensor, side: int, phase: Tensor | None = None) -> Tensor:
    """Sum a picture over the pixels that show the same entry of a template; adjoint of `tile`.

    Args:
        delta: ``[B, C, H, W]``, e.g. the gradient of a tiled perturbation.
        side: t.
        phase: see `tile`.

    Returns:
        ``[B, C, t, t]``.
    """
    count, channels, height, breadth = delta.shape
    blank = delta.new_zeros((count, channels, side, side))
    rows, columns = _places(blank, (height, breadth), phase)
    across = delta.new_zeros((count, channels, height, side)).scatter_add(
        3, columns[:, None, None, :].expand(-1, channels, height, -1), delta
    )
    return blank.scatter_add(2, rows[:, None, :, None].expand(-1, channels, -1, side), across)


def _places(template: Tensor, size: tuple[int, int], phase: Tensor | None) -> tuple[Tensor, Tensor]:
    """Row and column of the template shown at those of the picture: ``[B, H]``, ``[B, W]``."""
    count, side = len(template), template.shape[-1]
    if phase is None:
        phase = torch.zeros((count, 2), dtype=torch.int64)
    phase = phase.to(template.device)
    rows, columns = (
        (torch.arange(length, device=template.device) + phase[:, axis, None]) % side
        for axis, length in enumerate(size)
    )
    return rows, columns
