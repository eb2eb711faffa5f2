"""Pictures as 8-bit PNG files and as tensors, and how far apart two of them are."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from reports.records import Distance

Pixels = npt.NDArray[np.uint8]
"""uint8 ``[H, W, 3]``, RGB."""

_COMPRESS_LEVEL = 3  # noise hardly compresses; higher levels only cost time


def encode_png(pixels: Pixels) -> bytes:
    """PNG of an 8-bit picture, without metadata: equal pixels give equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=_COMPRESS_LEVEL)
    return buffer.getvalue()


def decode_png(data: bytes) -> Pixels:
    """The pixels of a PNG."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.uint8).copy()


def to_tensor(pictures: Sequence[Pixels]) -> Tensor:
    """Pictures of one size as float32 ``[B, 3, H, W]``, exact multiples of 1/255."""
    stacked = torch.from_numpy(np.stack(pictures))
    return stacked.permute(0, 3, 1, 2).contiguous().float() / 255


def to_pixels(images: Tensor) -> list[Pixels]:
    """Images ``[B, 3, H, W]`` in [0, 1] as 8-bit pictures."""
    levels = (images.detach() * 255).round().clamp(0, 255).to(torch.uint8)
    return [np.ascontiguousarray(one.numpy()) for one in levels.permute(0, 2, 3, 1).cpu()]


def distance(clean: Pixels, attacked: Pixels) -> Distance:
    """Size of a perturbation, from 8-bit pictures."""
    delta = (attacked.astype(np.int16) - clean.astype(np.int16)).astype(np.float64) / 255
    square = float(np.square(delta).sum())
    psnr = None if square == 0 else -10 * math.log10(square / delta.size)
    return Distance(linf=float(np.abs(delta).max()), l2=math.sqrt(square), psnr=psnr)
