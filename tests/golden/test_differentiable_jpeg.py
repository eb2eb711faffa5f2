"""The JPEG in torch against a JPEG library, and its gradient against finite differences."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from defenses.differentiable_jpeg import CHROMINANCE, LUMINANCE, cosines, cubic, jpeg, scaled

SIZES = [(96, 96), (48, 64), (17, 31), (40, 104), (50, 61)]


def smooth(height: int, width: int, seed: int = 0) -> Tensor:
    """An 8-bit picture ``[1, 3, H, W]`` with large forms and little noise, as photographs have."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    fine = torch.randn(1, 3, height, width, generator=generator)
    wide = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return ((wide + 0.02 * fine).clamp(0, 1) * 255).round() / 255


def by_library(images: Tensor, quality: int) -> Tensor:
    levels = (images[0] * 255).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "JPEG", quality=quality)
    found = np.array(Image.open(file)).astype(np.float32) / 255
    return torch.from_numpy(found).permute(2, 0, 1)[None]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("quality", [10, 50, 75, 95])
def test_hard_rounding_is_what_a_library_gives(size: tuple[int, int], quality: int) -> None:
    """On average within a level; a coefficient on the edge of a step may fall to the other side."""
    images = smooth(*size)
    gap = (jpeg(images, quality, soft=False) - by_library(images, quality)).abs() * 255
    loss = (images - by_library(images, quality)).abs() * 255
    assert float(gap.mean()) < 0.9
    assert float(gap.mean()) < 0.5 * float(loss.mean()), "far nearer than the picture itself"
    assert float(gap.max()) <= 24
    levels = jpeg(images, quality, soft=False) * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("quality", [25, 50, 75])
def test_soft_rounding_stays_near(quality: int) -> None:
    images = smooth(48, 64)
    gap = (jpeg(images, quality) - by_library(images, quality)).abs() * 255
    assert float(gap.mean()) < 3


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 75, 95, 100])
def test_the_tables_are_those_in_a_file(quality: int) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
    tables = Image.open(file).quantization  # type: ignore[attr-defined]
    for mine, theirs in zip(scaled(quality), (tables[0], tables[1]), strict=True):
        assert [one for row in mine for one in row] == list(theirs)
    assert scaled(50) == ([list(row) for row in LUMINANCE], [list(row) for row in CHROMINANCE])


@pytest.mark.parametrize("quality", [0, 101, -5])
def test_a_quality_out_of_range_is_refused(quality: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 100"):
        jpeg(smooth(16, 16), quality)


def test_the_transform_is_the_standards() -> None:
    """``1/4 C(u) C(v) ΣΣ s cos((2x + 1) u π / 16) cos((2y + 1) v π / 16)``, T.81 A.3.3."""
    block = torch.rand(8, 8, generator=torch.Generator().manual_seed(1)).double()
    found = cosines() @ block @ cosines().T
    for v, u in ((0, 0), (0, 3), (5, 2), (7, 7)):
        scale = (2**-0.5 if u == 0 else 1) * (2**-0.5 if v == 0 else 1) / 4
        total = sum(
            float(block[y, x])
            * math.cos((2 * x + 1) * u * math.pi / 16)
            * math.cos((2 * y + 1) * v * math.pi / 16)
            for y in range(8)
            for x in range(8)
        )
        assert float(found[v, u]) == pytest.approx(scale * total)


def test_the_cubic_rounding() -> None:
    values = torch.tensor([-1.4, -0.5, 0.0, 0.2, 1.0, 2.7], dtype=torch.float64, requires_grad=True)
    found = cubic(values)
    wanted = [round(one) + (one - round(one)) ** 3 for one in values.tolist()]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))
    (slope,) = torch.autograd.grad(found.sum(), values)
    slopes = [3 * (one - round(one)) ** 2 for one in values.tolist()]
    torch.testing.assert_close(slope, torch.tensor(slopes, dtype=torch.float64))


@pytest.mark.parametrize("size", [(16, 16), (13, 21)])
def test_the_gradient_is_that_of_finite_differences(size: tuple[int, int]) -> None:
    # Away from black and white, where the result is cut off, and in double precision, where the
    # chance to meet the jump of a rounding within a step is small.
    images = (0.3 + 0.4 * smooth(*size)).double()
    weight = torch.rand(images.shape, generator=torch.Generator().manual_seed(3)).double()

    def value(at: Tensor) -> Tensor:
        return (jpeg(at, 60) * weight).sum()

    live = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(live), live)
    generator = torch.Generator().manual_seed(4)
    for _ in range(6):
        toward = torch.randn(images.shape, generator=generator).double()
        step = 1e-7
        slope = (value(images + step * toward) - value(images - step * toward)) / (2 * step)
        assert float((gradient * toward).sum()) == pytest.approx(float(slope), rel=1e-4, abs=1e-5)
    assert float(gradient.abs().max()) > 0.01


def test_a_picture_does_not_depend_on_its_neighbours() -> None:
    images = torch.cat([smooth(24, 40, seed) for seed in range(3)])
    together = jpeg(images, 30)
    for index in range(3):
        torch.testing.assert_close(together[index : index + 1], jpeg(images[index][None], 30))
