"""Resampling as PIL does it, to the bit, on tensors and with gradients.

Separable, antialiased, with weights in fixed point and rounding to 8 bits after each direction; the
rounding passes gradients straight through.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from targets.errors import TargetError


def _sinc(x: float) -> float:
    return 1.0 if x == 0 else math.sin(math.pi * x) / (math.pi * x)


def _bicubic(x: float) -> float:
    x, a = abs(x), -0.5
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


_FILTERS: Final[dict[int, tuple[str, float, Callable[[float], float]]]] = {
    1: ("lanczos", 3.0, lambda x: _sinc(x) * _sinc(x / 3) if abs(x) < 3 else 0.0),
    2: ("bilinear", 1.0, lambda x: max(0.0, 1 - abs(x))),
    3: ("bicubic", 2.0, _bicubic),
    4: ("box", 0.5, lambda x: 1.0 if -0.5 < x <= 0.5 else 0.0),
    5: (
        "hamming",
        1.0,
        lambda x: _sinc(x) * (0.54 + 0.46 * math.cos(math.pi * x)) if abs(x) < 1 else 0.0,
    ),
}
"""PIL's resampling codes: name, support and kernel."""
_FIXED_POINT: Final = 2.0**22
"""PIL's weights are whole multiples of 1 / this."""


@functools.lru_cache(maxsize=64)
def resampling_matrix(size: int, wanted: int, resample: int) -> Tensor:
    """Weights ``[wanted, size]`` of PIL's resampling along one direction, float64.

    They are rounded to PIL's fixed point, so rows sum to 1 up to that.

    Args:
        size: pixels there are.
        wanted: pixels to make.
        resample: PIL's code (1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming).

    Raises:
        TargetError: for another code.
    """
    if resample not in _FILTERS:
        raise TargetError(
            f"resample code {resample} of the image processor is not supported; supported: "
            f"{', '.join(f'{code} ({entry[0]})' for code, entry in _FILTERS.items())}"
        )
    _, support, kernel = _FILTERS[resample]
    scale = size / wanted
    stretch = max(scale, 1.0)
    reach = support * stretch
    weights = torch.zeros(wanted, size, dtype=torch.float64)
    for row in range(wanted):
        centre = (row + 0.5) * scale
        first = max(0, int(centre - reach + 0.5))
        last = min(size, int(centre + reach + 0.5))
        for column in range(first, last):
            weights[row, column] = kernel((column - centre + 0.5) / stretch)
    fixed = weights / weights.sum(1, keepdim=True) * _FIXED_POINT
    return (fixed.abs() + 0.5).floor() * fixed.sign() / _FIXED_POINT


@functools.lru_cache(maxsize=256)
def vertical_first(size: tuple[int, int], wanted: tuple[int, int], resample: int) -> bool:
    """Whether the PIL at hand resamples vertically first between these sizes.

    Older ones never do, newer ones where it is less work; the order shows in the rounding. It is
    found out by resampling a picture of noise and comparing.
    """
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    made = np.asarray(Image.fromarray(noise).resize(wanted[::-1], Image.Resampling(resample)))
    levels = torch.from_numpy(noise).permute(2, 0, 1).double()
    for direction in (1, 0):
        levels = round_levels(_along(levels, wanted[direction], direction, resample))
    return not np.array_equal(made, levels.permute(1, 2, 0).numpy())


def _along(levels: Tensor, wanted: int, direction: int, resample: int) -> Tensor:
    """Resample the last two dimensions along one: 0 is vertical, 1 horizontal."""
    size = levels.shape[direction - 2]
    weights = resampling_matrix(size, wanted, resample).to(levels.device)
    return weights @ levels if direction == 0 else levels @ weights.T


def round_levels(levels: Tensor) -> Tensor:
    """Round to whole levels in [0, 255]; the gradient passes straight through."""
    rounded = (levels + 0.5).floor().clamp(0, 255)
    return levels + (rounded - levels).detach()


def resize(images: Tensor, size: tuple[int, int], resample: int, *, rounded: bool) -> Tensor:
    """Resample images ``[B, 3, H, W]`` given in levels 0 … 255 to ``[B, 3, *size]``.

    Args:
        images: float levels.
        size: height and width wanted.
        resample: PIL's code.
        rounded: round to whole levels after each direction, as PIL does.
    """
    here = (images.shape[-2], images.shape[-1])
    # Float64 holds PIL's fixed-point sums exactly, so that rounding falls the same way.
    exact = images.double()
    order = (0, 1) if here != size and vertical_first(here, size, resample) else (1, 0)
    for direction in order:
        if exact.shape[direction - 2] != size[direction]:
            exact = _along(exact, size[direction], direction, resample)
            exact = round_levels(exact) if rounded else exact
    return exact.to(images.dtype)
