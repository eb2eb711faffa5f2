"""JPEG in torch, forward as a file and backward with a gradient.

Written from the standard (ITU-T T.81: discrete cosine transform, example tables of annex K), JFIF's
colours, and the conventions of the Independent JPEG Group that files in the wild follow: quality
as a factor on those tables, chroma at half the resolution, restored by linear interpolation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

_LEVELS: Final = 255
_MIDDLE: Final = 128
_SIDE: Final = 8

LUMINANCE: Final = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
"""Quantisation of luminance, T.81 table K.1: rows are vertical frequencies."""
CHROMINANCE: Final = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)
"""Quantisation of both chrominances, T.81 table K.2."""
_TO_YCC: Final = (
    (0.299, 0.587, 0.114),
    (-0.168735892, -0.331264108, 0.5),
    (0.5, -0.418687589, -0.081312411),
)
_TO_RGB: Final = ((1.0, 0.0, 1.402), (1.0, -0.344136286, -0.714136286), (1.0, 1.772, 0.0))

Rounding = Callable[[Tensor], Tensor]


def jpeg(images: Tensor, quality: int, *, soft: bool = True) -> Tensor:
    """A picture as it comes back from a JPEG file with chroma at half the resolution.

    Args:
        images: ``[B, 3, H, W]`` in [0, 1], of any height, wider than 4 pixels (of narrower ones
            libraries repeat chroma instead of interpolating); live.
        quality: as the Independent JPEG Group counts it, 1 to 100.
        soft: round as `cubic` does where coefficients are quantised, and nowhere else, so that
            the result has a gradient; else round as a file does, without one.

    Returns:
        ``[B, 3, H, W]`` in [0, 1].

    Raises:
        ValueError: for a quality out of range.
    """
    tables = [torch.tensor(one).to(images) for one in scaled(quality)]
    quantised: Rounding = cubic if soft else _away
    whole: Rounding = (lambda values: values) if soft else torch.round
    height, width = images.shape[-2:]
    planes = whole(_mixed(whole(images * _LEVELS), _TO_YCC, (0, _MIDDLE, _MIDDLE)))
    luma = _coded(planes[:, :1], tables[0], quantised, whole)
    chroma = _coded(_halved(planes[:, 1:], soft), tables[1], quantised, whole)
    # Rows and columns that only fill up blocks have no part in the interpolation.
    chroma = chroma[..., : math.ceil(height / 2), : math.ceil(width / 2)]
    wide = whole(interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False))
    planes = torch.cat([luma[..., :height, :width], wide[..., :height, :width]], 1)
    centred = planes - planes.new_tensor([0, _MIDDLE, _MIDDLE]).view(1, 3, 1, 1)
    return whole(_mixed(centred, _TO_RGB, (0, 0, 0))).clamp(0, _LEVELS) / _LEVELS


def scaled(quality: int) -> tuple[list[list[int]], list[list[int]]]:
    """Tables of luminance and chrominance at a quality of 1 to 100.

    The Independent JPEG Group's rule: a percentage of ``5000 / q`` below 50, else ``200 − 2q``,
    rounded, at least 1 and at most 255.

    Raises:
        ValueError: for a quality out of range.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"quality is {quality!r}; a JPEG's is from 1 to 100")
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality

    def table(base: tuple[tuple[int, ...], ...]) -> list[list[int]]:
        return [[min(max((one * percent + 50) // 100, 1), 255) for one in row] for row in base]

    return table(LUMINANCE), table(CHROMINANCE)


def cubic(values: Tensor) -> Tensor:
    """``⌊x⌉ + (x − ⌊x⌉)³``: nearly a rounding, with a slope of ``3 (x − ⌊x⌉)²``.

    Shin & Song, "JPEG-resistant Adversarial Images" (NIPS 2017 workshop), equation of section 3.
    """
    near = values.detach().round()
    return near + (values - near) ** 3


def _away(values: Tensor) -> Tensor:
    """Rounded, halves away from 0, as coefficients are in a file."""
    return values.sign() * (values.abs() + 0.5).floor()


def cosines() -> Tensor:
    """The orthonormal discrete cosine transform of 8 values, ``[8, 8]``: a row is a frequency."""
    place = torch.arange(_SIDE, dtype=torch.float64)
    rows = torch.cos((2 * place + 1) * place[:, None] * math.pi / (2 * _SIDE)) / 2
    rows[0] /= math.sqrt(2)
    return rows


def _mixed(planes: Tensor, matrix: tuple[tuple[float, ...], ...], add: tuple[int, ...]) -> Tensor:
    mixed = torch.einsum("oc,bchw->bohw", planes.new_tensor(matrix), planes)
    return mixed + planes.new_tensor(add).view(1, -1, 1, 1)


def _halved(planes: Tensor, soft: bool) -> Tensor:
    """Means of 2 × 2; an odd last column or row counts twice.

    In a file, quarters are rounded up from a half in every second column and from three quarters in
    the others, so that none of both is preferred.
    """
    height, width = planes.shape[-2:]
    # The right edge is repeated to the end of the last block before, the lower one behind.
    right = math.ceil(width / (2 * _SIDE)) * 2 * _SIDE - width
    mean = avg_pool2d(pad(planes, (0, right, 0, height % 2), mode="replicate"), 2)
    if soft:
        return mean
    bias = 1 + torch.arange(mean.shape[-1], device=mean.device) % 2
    return (mean + bias / 4).floor()


def _coded(planes: Tensor, table: Tensor, quantised: Rounding, whole: Rounding) -> Tensor:
    """Planes after quantisation of their blocks, enlarged to whole blocks at the right and below.

    Args:
        planes: ``[B, C, h, w]`` levels, 0 to 255.
        table: ``[8, 8]`` steps of the quantisation.
        quantised: rounds coefficients.
        whole: rounds levels.
    """
    height, width = planes.shape[-2:]
    filled = pad(planes, (0, -width % _SIDE, 0, -height % _SIDE), mode="replicate")
    batch, channels, high, wide = filled.shape
    blocks = filled.view(batch, channels, high // _SIDE, _SIDE, wide // _SIDE, _SIDE)
    transform = cosines().to(planes)
    found = transform @ (blocks.transpose(3, 4) - _MIDDLE) @ transform.T
    found = quantised(found / table) * table
    back = transform.T @ found @ transform + _MIDDLE
    return whole(back.transpose(3, 4).reshape(filled.shape)).clamp(0, _LEVELS)
