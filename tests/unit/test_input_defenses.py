"""Input defences: what they promise, and that ART's and their torch twins agree."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from defenses.art_preprocessors import (
    FeatureSqueezing,
    JpegCompression,
    SpatialSmoothing,
    median,
    squeezed,
)
from defenses.base import AdaptiveRoute, DefenseError, InputDefense
from defenses.resize_pad import ResizePad

DEFENSES = [ResizePad(), JpegCompression(), FeatureSqueezing(), SpatialSmoothing()]
art = pytest.mark.skipif(importlib.util.find_spec("art") is None, reason="ART is not installed")


@pytest.fixture(scope="module")
def images() -> Tensor:
    levels = torch.randint(0, 256, (3, 3, 20, 24), generator=torch.Generator().manual_seed(1))
    return levels.float() / 255


@art
@pytest.mark.parametrize("defense", DEFENSES, ids=lambda one: one.name)
def test_a_sample_does_not_depend_on_its_neighbours(defense: InputDefense, images: Tensor) -> None:
    together, alone = defense(images, [5, 6, 7]), defense(images[1:2], [6])
    assert torch.equal(together[1:2], alone)
    assert torch.equal(together, defense(images, [5, 6, 7]))
    assert not torch.equal(together, images)


@art
@pytest.mark.parametrize("defense", DEFENSES, ids=lambda one: one.name)
def test_a_gradient_reaches_the_image(defense: InputDefense, images: Tensor) -> None:
    live = images.clone().requires_grad_()
    weight = torch.rand(images.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((defense(live, [1, 2, 3]) * weight).sum(), live)
    assert bool((gradient.flatten(1).abs().amax(1) > 0).all())


@art
@pytest.mark.parametrize("bits", [1, 3, 5, 7])
def test_bit_depth_equals_art(bits: int, images: Tensor) -> None:
    found = FeatureSqueezing(bit_depth=bits)(images, [0] * 3)
    torch.testing.assert_close(found, squeezed(images, bits), rtol=0, atol=1e-6)
    live = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(squeezed(live, bits).sum(), live)
    assert torch.equal(gradient, torch.ones_like(images)), "straight-through"


@art
@pytest.mark.parametrize("window", [3, 5, 7])
def test_the_median_equals_art(window: int, images: Tensor) -> None:
    found = SpatialSmoothing(window_size=window)(images, [0] * 3)  # type: ignore[arg-type]
    torch.testing.assert_close(found, median(images, window), rtol=0, atol=1e-6)


def test_the_median_of_an_edge_mirrors_the_picture() -> None:
    row = torch.tensor([0.1, 0.5, 0.9, 0.3]).view(1, 1, 1, 4).expand(1, 3, 4, 4)
    wanted = [0.1, 0.5, 0.5, 0.3]  # of (1 1 5), (1 5 9), (5 9 3), (9 3 3)
    torch.testing.assert_close(median(row, 3)[0, 0, 0], torch.tensor(wanted))


@art
def test_jpeg_equals_pil_on_whole_levels(images: Tensor) -> None:
    import io

    import numpy as np
    from PIL import Image

    found = JpegCompression(quality=40)(images, [0] * 3)
    for image, one in zip(images, found, strict=True):
        levels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(levels).save(file, "JPEG", quality=40)
        wanted = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 255
        torch.testing.assert_close(one, wanted, rtol=0, atol=1e-6)


def test_without_art_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "art" else real(name)
    )
    with pytest.raises(DefenseError, match=r"pip install 'redteam\[art\]'"):
        FeatureSqueezing()


def test_resizing_by_nothing_is_no_defence(images: Tensor) -> None:
    assert torch.equal(ResizePad(smallest=1)(images, [1, 2, 3]), images)
    assert ResizePad().draws
    assert ResizePad().route is AdaptiveRoute.EOT


def test_the_border_has_the_mean_colour_and_the_picture_its_place(images: Tensor) -> None:
    shrunk = ResizePad(smallest=0.5)(images[:1], [3])[0]
    mean = images[0].mean((1, 2), keepdim=True).expand_as(shrunk)
    inside = ~torch.isclose(shrunk, mean).all(0)
    rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    high, wide = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
    assert 10 <= high < 20
    assert wide == round(high * 24 / 20)
    again = torch.nn.functional.interpolate(
        images[:1], (high, wide), mode="bilinear", antialias=True
    )[0]
    place = shrunk[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    torch.testing.assert_close(place, again)
