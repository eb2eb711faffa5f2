"""Input transformations of transfer attacks, per sample and differentiable.

A perturbation that survives them depends less on the model it was made on. Masks go through the
geometric ones with the picture they belong to. Boxes are int64 ``[B, 4]``: top, left, bottom,
right, ends exclusive, in pixels.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from attacks.seeds import SeedBank

Size = tuple[int, int]


def place(images: Tensor, source: Tensor, target: Tensor, size: Size | None = None) -> Tensor:
    """Cut one box out of each picture, resize it bilinearly, and put it into a box of zeros.

    Inside the box it is `torch.nn.functional.interpolate` (``bilinear``, ``align_corners=False``)
    of the cut-out, for a whole batch of different boxes at once.

    Args:
        images: ``[B, C, H, W]``.
        source: what is cut out.
        target: where it goes; may not be empty.
        size: height and width of the result; None is that of `images`.
    """
    height, breadth = images.shape[-2:]
    out = (height, breadth) if size is None else size
    places, insides = [], []
    for axis, (length, whole) in enumerate(zip((height, breadth), out, strict=True)):
        low, high = (source[:, axis + end, None].to(images) for end in (0, 2))
        start, stop = (target[:, axis + end, None].to(images) for end in (0, 2))
        at = torch.arange(whole, device=images.device, dtype=images.dtype)
        pixel = (at + 0.5 - start) * (high - low) / (stop - start) - 0.5  # of the cut-out
        pixel = torch.minimum(pixel.clamp_min(0), high - low - 1) + low
        places.append((2 * pixel + 1) / length - 1)
        insides.append((at >= start) & (at < stop))
    grid = torch.stack(
        [
            places[1][:, None, :].expand(-1, out[0], -1),
            places[0][:, :, None].expand(-1, -1, out[1]),
        ],
        -1,
    )
    moved = grid_sample(images, grid, "bilinear", "border", align_corners=False)
    inside = insides[0][:, :, None] & insides[1][:, None, :]
    return moved * inside[:, None]


def whole(count: int, size: Size) -> Tensor:
    """The box around everything, for each of `count` samples."""
    return torch.tensor([[0, 0, *size]]).expand(count, -1)


def diverse_box(rng: SeedBank, size: Size, rate: float, probability: float) -> Tensor:
    """Where a picture lands under input diversity (DI², Xie et al., arXiv 1803.06978).

    With probability p the picture is shrunk to a random share in [1/rate, 1) of its side and put
    at a random place on zeros; otherwise it stays. Use it as the `target` of `place`.

    Args:
        rng: one stream per sample.
        size: height and width.
        rate: largest enlargement of the canvas, > 1; 1.1 as in the published code.
        probability: p in [0, 1].

    *Differs from the paper in …*: it resizes to [299, 330), pads to 330 and leaves the size to the
    model; here the padded picture is resized back, in the same single interpolation.
    """
    draw = rng.uniform((4,)).cpu()
    share = 1 / rate + (1 - 1 / rate) * draw[:, 0]
    keep = draw[:, 3] >= probability
    edges = []
    for axis, length in enumerate(size):
        side = (share * length).floor().clamp(1, length)
        side = torch.where(keep, torch.full_like(side, length), side)
        start = (draw[:, 1 + axis] * (length - side + 1)).floor().clamp_max(length - side)
        edges.append((start, start + side))
    (top, bottom), (left, right) = edges
    return torch.stack([top, left, bottom, right], 1).long()


def crop_box(rng: SeedBank, region: tuple[int, int, int, int], scale: float) -> Tensor:
    """A random part of a region, of its shape: the local view of self-universality.

    Wei et al., "Enhancing the Self-Universality for Transferable Targeted Attacks" (arXiv
    2209.03716): the perturbation of the whole picture must also work on local crops. Use it as the
    `source` of `place`.

    Args:
        rng: one stream per sample.
        region: top, left, bottom, right of what may be cropped.
        scale: least share of the region's area in (0, 1]; drawn uniformly from [scale, 1].
    """
    top, left, bottom, right = region
    draw = rng.uniform((3,)).cpu()
    side = (scale + (1 - scale) * draw[:, 0]).sqrt()
    edges = []
    for axis, (start, length) in enumerate(((top, bottom - top), (left, right - left))):
        part = (side * length).round().clamp(1, length)
        begin = (draw[:, 1 + axis] * (length - part + 1)).floor().clamp_max(length - part)
        edges.append((start + begin, start + begin + part))
    return torch.stack([edges[0][0], edges[1][0], edges[0][1], edges[1][1]], 1).long()


def scale_copy(images: Tensor, number: int) -> Tensor:
    """Copy i of scale invariance: ``x / 2^i`` (SI, Lin et al., arXiv 1908.06281).

    The gradient is the mean over i = 0 … m − 1.
    """
    return images / float(2**number)


def spectrum(images: Tensor, rng: SeedBank, sigma: float, rho: float) -> Tensor:
    """A copy with a disturbed spectrum (SSA, Long et al., arXiv 2207.05382).

    ``IDCT(DCT(x + xi) ⊙ M)``, xi normal with deviation sigma, M uniform in [1 − rho, 1 + rho].
    The gradient is the mean over several such copies.

    Args:
        images: ``[B, 3, H, W]``.
        rng: one stream per sample.
        sigma: of the noise in [0, 1] pixel units; the paper's is epsilon.
        rho: of the mask, in [0, 1]; the paper's is 0.5.
    """
    shape = images.shape[1:]
    noisy = images + sigma * rng.child("noise").normal(shape).to(images)
    mask = rng.child("mask").uniform(shape, 1 - rho, 1 + rho).to(images)
    return idct(dct(noisy) * mask)


def dct(images: Tensor) -> Tensor:
    """Orthonormal two-dimensional DCT-II of ``[..., H, W]``."""
    rows, columns = (cosines(length).to(images) for length in images.shape[-2:])
    return rows @ images @ columns.T


def idct(spectra: Tensor) -> Tensor:
    """The inverse of `dct`."""
    rows, columns = (cosines(length).to(spectra) for length in spectra.shape[-2:])
    return rows.T @ spectra @ columns


@lru_cache(maxsize=8)
def cosines(length: int) -> Tensor:
    """The orthonormal DCT-II matrix: ``C[k, n] = sqrt(2/N) cos(π (2n + 1) k / 2N)``, row 0 / √2."""
    at = torch.arange(length, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * at[None] + 1) * at[:, None] / (2 * length))
    matrix *= math.sqrt(2 / length)
    matrix[0] /= math.sqrt(2)
    return matrix


@lru_cache(maxsize=8)
def gaussian(size: int, sigma: float) -> Tensor:
    """A Gaussian kernel of sum 1, ``[size, size]``."""
    at = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = line[:, None] * line[None]
    return kernel / kernel.sum()


def smooth(gradient: Tensor, size: int, sigma: float) -> Tensor:
    """Translation-invariant gradient: ``W * g`` (TI, Dong et al., arXiv 1904.02884).

    Args:
        gradient: ``[B, C, H, W]``.
        size: side of the Gaussian kernel W in pixels, odd; 1 changes nothing.
        sigma: its deviation in pixels, > 0.
    """
    channels = gradient.shape[1]
    kernel = gaussian(size, sigma).to(gradient).expand(channels, 1, -1, -1)
    return torch.nn.functional.conv2d(gradient, kernel, padding=size // 2, groups=channels)
