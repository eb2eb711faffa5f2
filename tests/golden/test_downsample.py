"""Downsampling: the picture PIL would make, and who refuses it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from targets.compression.downsample import Downsample
from targets.errors import CompressionError


@pytest.mark.parametrize(
    ("retention", "size"), [(0.25, (20, 31)), (0.5, (28, 44)), (1.0, (40, 62)), (1e-6, (1, 1))]
)
def test_it_is_pils_bicubic_of_the_right_size(retention: float, size: tuple[int, int]) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (40, 62, 3), dtype=np.uint8)
    image = torch.from_numpy(levels).permute(2, 0, 1)[None].float() / 255
    small = Downsample(retention=retention).shrink(image)
    assert small.shape == (1, 3, *size)
    truth = np.asarray(Image.fromarray(levels).resize(size[::-1], Image.Resampling.BICUBIC))
    assert np.array_equal((small[0].permute(1, 2, 0) * 255).round().numpy(), truth)


def test_gradients_reach_the_original_picture() -> None:
    image = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    image.requires_grad_()
    (gradient,) = torch.autograd.grad(Downsample(retention=0.25).shrink(image).sum(), image)
    # Every pixel counts, and together they weigh as much as the small picture has pixels.
    assert bool((gradient != 0).any(1).all())
    assert float(gradient.sum()) == pytest.approx(3 * 36, rel=1e-4)


def test_it_cuts_nothing_and_takes_a_share_only() -> None:
    assert Downsample(retention=0.5).cuts(32) == ()
    for options in ({"keep_tokens": 5}, {}, {"retention": 0.5, "keep_tokens": 5}, {"retention": 2}):
        with pytest.raises(CompressionError, match="downsample"):
            Downsample(**options)  # type: ignore[arg-type]


def test_models_of_set_sizes_refuse_it() -> None:
    fixed: Any = SimpleNamespace(any_size=False)
    native: Any = SimpleNamespace(any_size=True)
    assert "set sizes" in str(Downsample(retention=0.5).refuses(fixed))
    assert Downsample(retention=0.5).refuses(native) is None
