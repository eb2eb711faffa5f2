"""Input defences: what they promise, and that ART's and their torch twins agree."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from defenses.art_preprocessors import (
    FeatureSqueezing,
    GaussianAugmentation,
    JpegCompression,
    SpatialSmoothing,
    TotalVarMin,
    median,
    squeezed,
)
from defenses.base import AdaptiveRoute, DefenseError, InputDefense
from defenses.differentiable_jpeg import jpeg
from defenses.gaussian_vote import GaussianVote
from defenses.resize_pad import ResizePad
from defenses.voting import majority

DEFENSES = [
    ResizePad(),
    GaussianVote(),
    JpegCompression(),
    FeatureSqueezing(),
    SpatialSmoothing(),
    TotalVarMin(),
    GaussianAugmentation(),
]
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


@art
def test_jpeg_goes_backward_through_the_one_in_torch(images: Tensor) -> None:
    defense, weight = JpegCompression(quality=40), torch.rand(images.shape)
    live = images.clone().requires_grad_()
    (found,) = torch.autograd.grad((defense(live, [0] * 3) * weight).sum(), live)
    (wanted,) = torch.autograd.grad((jpeg(live, 40) * weight).sum(), live)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, weight, atol=0.1), "not the identity"


@art
@pytest.mark.parametrize("defense", [TotalVarMin(), GaussianAugmentation()])
def test_what_art_draws_follows_our_seeds_alone(defense: InputDefense, images: Tensor) -> None:
    import numpy as np

    np.random.seed(3)
    first = defense(images, [5, 6, 7])
    after = np.random.rand()
    np.random.seed(3)
    assert after == np.random.rand(), "and leaves the global stream as it was"
    assert torch.equal(first, defense(images, [5, 6, 7]))
    other = defense(images, [5, 6, 8])
    assert torch.equal(first[:2], other[:2])
    assert not torch.equal(first[2], other[2])
    assert defense.draws
    assert defense.route is AdaptiveRoute.EOT


@art
def test_total_variation_falls(images: Tensor) -> None:
    def variation(pictures: Tensor) -> float:
        return float(pictures.diff(dim=2).abs().mean() + pictures.diff(dim=3).abs().mean())

    some, more = (TotalVarMin(max_iter=n)(images, [1, 2, 3]) for n in (2, 10))
    assert variation(more) < variation(some) < variation(images)
    kept = TotalVarMin(lamb=1e-6, prob=1.0)(images, [1, 2, 3])
    torch.testing.assert_close(kept, images, rtol=0, atol=0.02)


@art
def test_noise_has_the_deviation_asked_for() -> None:
    grey = torch.full((2, 3, 64, 64), 0.5)
    for defense in (GaussianVote(sigma=0.1), GaussianAugmentation(sigma=0.1)):
        noise = defense(grey, [1, 2]) - grey
        assert float(noise.std()) == pytest.approx(0.1, rel=0.02)
        assert float(noise.mean()) == pytest.approx(0, abs=0.003)
        assert float((noise[0] * noise[1]).mean()) == pytest.approx(0, abs=0.001)


def test_a_vote_without_noise_is_one_answer(images: Tensor) -> None:
    still = GaussianVote(sigma=0, copies=7)
    assert torch.equal(still(images, [1, 2, 3]), images)
    assert (still.votes, still.draws, still.route) == (1, False, AdaptiveRoute.DIFFERENTIABLE)
    noisy = GaussianVote(copies=7)
    assert (noisy.votes, noisy.draws, noisy.route) == (7, True, AdaptiveRoute.EOT)
    assert ResizePad().votes == 1


@pytest.mark.parametrize(
    ("texts", "winner"),
    [
        (["yes"], 0),
        (["no", "yes", "Yes.", "yes"], 1),
        (["red", "blue", "blue", "red"], 0),  # a tie goes to the earliest
        (["a  cat", "dog", "A cat!"], 0),
        (["", "?", "?"], 1),  # nothing but punctuation is compared as it is
        (["", "no", ""], 0),
    ],
)
def test_the_majority_is_the_first_of_the_most_frequent(texts: list[str], winner: int) -> None:
    assert majority(texts) == winner


def test_a_vote_needs_a_voter() -> None:
    with pytest.raises(DefenseError, match="no answers"):
        majority([])
