"""Structured random sign patterns: perturbations that fool without knowing a model.

Convolutional and patch-based models react far more to structured patterns than to white noise of
the same size (procedural noise, Co et al., arXiv 1810.00470; low-frequency noise, Guo et al.,
arXiv 1809.08758). Each pattern is a sign, −1 or +1, per pixel and colour: a corner of the ball.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from attacks.seeds import SeedBank

Size = tuple[int, int]


def stripes(size: Size, rng: SeedBank) -> Tensor:
    """Upright or lying stripes of one width, each with a random sign per colour.

    The start of the Square Attack (arXiv 1912.00049), at a random width.

    Args:
        size: height and width.
        rng: one pattern per sample.

    Returns:
        ``[B, 3, H, W]`` of −1 and +1; so do all of this module.
    """
    width = _scale(1, min(size) / 4, rng)
    lying = rng.uniform((1,)) < 0.5
    rows, columns = _grid(size, rng)
    place = (torch.where(lying[..., None], rows, columns) // width[..., None]).long()
    signs = rng.signs((3, max(size)))
    return signs.gather(2, place.flatten(1)[:, None].expand(-1, 3, -1)).view(-1, 3, *size)


def blocks(size: Size, rng: SeedBank) -> Tensor:
    """Square blocks, each with a random sign per colour (Moon et al., arXiv 1905.06635)."""
    side = _scale(2, min(size) / 3, rng)[..., None]
    rows, columns = _grid(size, rng)
    across = max(size) // 2 + 1
    place = (rows // side).long() * across + (columns // side).long()
    signs = rng.signs((3, across * across))
    return signs.gather(2, place.flatten(1)[:, None].expand(-1, 3, -1)).view(-1, 3, *size)


def gabor(size: Size, rng: SeedBank) -> Tensor:
    """Sign of Gabor noise: white noise with only a band of frequencies in one direction.

    Wavelength 3 pixels to a third of the picture, one octave wide, one direction per pattern, as
    in procedural noise attacks; sparse kernels there, all phases at once here.
    """
    wavelength = _scale(3, min(size) / 3, rng)[..., None]
    angle = rng.uniform((1, 1), 0, math.pi)
    return _band(size, rng, angle.cos() / wavelength, angle.sin() / wavelength, 0.25 / wavelength)


def low_frequency(size: Size, rng: SeedBank) -> Tensor:
    """Sign of white noise below a cut-off: blobs an eighth to two thirds of the picture wide."""
    wavelength = _scale(min(size) / 8, min(size) / 1.5, rng)[..., None]
    still = torch.zeros_like(wavelength)
    return _band(size, rng, still, still, 0.5 / wavelength)


PATTERNS: Final[dict[str, Callable[[Size, SeedBank], Tensor]]] = {
    "gabor": gabor,
    "stripes": stripes,
    "blocks": blocks,
    "low_frequency": low_frequency,
}


def _band(size: Size, rng: SeedBank, down: Tensor, across: Tensor, width: Tensor) -> Tensor:
    """Sign of noise with a Gaussian band around ± a frequency ``[B, 1, 1]`` in cycles per pixel.

    Half of the patterns are alike in all colours but for their sign, half have three of their own.
    """
    noise = rng.normal((3, *size))
    noise = torch.where(rng.uniform((1, 1, 1)) < 0.5, noise[:, :1], noise)
    spectrum = torch.fft.rfft2(noise)
    vertical = torch.fft.fftfreq(size[0], device=noise.device)[None, :, None]
    horizontal = torch.fft.rfftfreq(size[1], device=noise.device)[None, None]
    near = [
        ((vertical - sign * down).square() + (horizontal - sign * across).square())
        for sign in (1, -1)
    ]
    keep = sum((-one / (2 * width.square())).exp() for one in near)
    found = torch.fft.irfft2(spectrum * torch.as_tensor(keep)[:, None], s=size)
    found = found * rng.signs((3, 1, 1))
    return torch.where(found < 0, -1.0, 1.0)


def _scale(low: float, high: float, rng: SeedBank) -> Tensor:
    """A length in pixels, log-uniform, at least 1: ``[B, 1]``."""
    low, high = max(low, 1.0), max(high, low, 1.0)
    exponent = rng.uniform((1,), math.log(low), math.log(high))
    return exponent.exp().clamp(low, high)


def _grid(size: Size, rng: SeedBank) -> tuple[Tensor, Tensor]:
    """Row and column of each pixel, shifted at random by up to a pixel: ``[B, H, W]`` each."""
    offset = rng.uniform((2, 1, 1))
    rows = torch.arange(size[0], device=rng.device).view(1, -1, 1) + offset[:, 0]
    columns = torch.arange(size[1], device=rng.device).view(1, 1, -1) + offset[:, 1]
    return rows.expand(-1, -1, size[1]), columns.expand(-1, size[0], -1)
