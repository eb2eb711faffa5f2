"""Borders: a frame of pixels along the edge, on the picture or around it, and its tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from attacks.errors import AttackError
from targets.base import ImageView

GREY = 128 / 255
"""Value of an added frame before it is perturbed: the 8-bit level next to the middle."""
_CHUNK = 64


def thickness(size: tuple[int, int], width: float) -> int:
    """Pixels of a frame.

    Args:
        size: height and width of the picture.
        width: share of the shorter side, in (0, 0.5]; at least one pixel.
    """
    return max(1, round(width * min(size)))


def frame(images: Tensor, width: float) -> Tensor:
    """A frame along the border: ``[B, 1, H, W]``, 1 in the frame and 0 inside.

    Args:
        images: ``[B, 3, H, W]``, for the size.
        width: share of the shorter side, in (0, 0.5]; at least one pixel.
    """
    count, _, height, breadth = images.shape
    thick = thickness((height, breadth), width)
    mask = torch.ones((count, 1, height, breadth), device=images.device)
    mask[:, :, thick : height - thick, thick : breadth - thick] = 0
    return mask


def framed(images: Tensor, width: float) -> Tensor:
    """Pictures shrunk into the inside of a mid-grey frame; the size stays.

    The picture is resized by antialiased bilinear interpolation, its shape changes slightly where
    it is not square. Nothing of it lies under the frame.

    Args:
        images: ``[B, 3, H, W]``.
        width: of the frame, see `frame`.

    Raises:
        AttackError: if the frame leaves nothing inside.
    """
    height, breadth = images.shape[-2:]
    thick = thickness((height, breadth), width)
    inner = (height - 2 * thick, breadth - 2 * thick)
    if min(inner) < 1:
        raise AttackError(
            f"an added frame of {width:.4g} of the shorter side leaves nothing of a picture of "
            f"{height}×{breadth} pixels; take a narrower border"
        )
    small = interpolate(images, inner, mode="bilinear", antialias=True, align_corners=False)
    return pad(small.clamp(0, 1), (thick,) * 4, value=GREY)


def inside_of(size: tuple[int, int], width: float) -> tuple[int, int, int, int]:
    """Top, left, bottom, right of what a frame encloses."""
    thick = thickness(size, width)
    return thick, thick, size[0] - thick, size[1] - thick


def token_boxes(view: ImageView, tokens: int, size: tuple[int, int]) -> Tensor:
    """Smallest box of pixels around what each visual token covers: int64 ``[V, 4]``.

    Args:
        view: of the model whose tokens they are.
        tokens: V.
        size: height and width of the pictures.

    Returns:
        Top, left, bottom, right; ends exclusive. A token that covers nothing has an empty box.
    """
    boxes = []
    for start in range(0, tokens, _CHUNK):
        chosen = torch.arange(start, min(start + _CHUNK, tokens))
        one = torch.zeros((len(chosen), tokens), dtype=torch.bool)
        one[torch.arange(len(chosen)), chosen] = True
        seen = view.token_mask_to_pixels(one, size)[:, 0] > 0
        edges = [_extent(seen.any(2)), _extent(seen.any(1))]
        boxes.append(torch.stack([edges[0][0], edges[1][0], edges[0][1], edges[1][1]], 1))
    return torch.cat(boxes)


def _extent(line: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last True of each row; 0, 0 where there is none."""
    length = line.shape[1]
    first = line.to(torch.uint8).argmax(1)
    last = length - line.flip(1).to(torch.uint8).argmax(1)
    return first, torch.where(line.any(1), last, first)


def covered(mask: Tensor, boxes: Tensor) -> Tensor:
    """Mean of a pixel mask over the box of each token: ``[B, V]``, 0 over empty boxes.

    Args:
        mask: ``[B, 1, H, W]`` in [0, 1].
        boxes: ``[V, 4]`` of `token_boxes`.
    """
    # Sums over rectangles from one table of sums: V × H × W would not fit for large pictures.
    table = pad(mask[:, 0].double().cumsum(1).cumsum(2), (1, 0, 1, 0))
    top, left, bottom, right = boxes.to(mask.device).unbind(1)
    total = table[:, bottom, right] - table[:, top, right]
    total = total - table[:, bottom, left] + table[:, top, left]
    return (total / ((bottom - top) * (right - left)).clamp_min(1)).float()
