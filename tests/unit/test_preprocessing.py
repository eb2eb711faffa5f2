"""The differentiable preprocessor against the real image processors, picture by picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from targets.errors import TargetError
from targets.preprocessing import Preprocessor, resampling_matrix, resize

SIZES = [(96, 96), (40, 40), (64, 100), (100, 64), (301, 97), (31, 200), (96, 97)]
LEVEL = 1 / 255
"""One level of an 8-bit picture; agreement is asked for to a thousandth of it."""


def picture(size: tuple[int, int], seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Noise on a smooth ground, so that both smooth and sharp parts are resampled."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    ground = np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))
    noise = rng.integers(-60, 60, ground.shape)
    return np.clip(ground.astype(int) + noise, 0, 255).astype(np.uint8)


def tensor(levels: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    return torch.from_numpy(levels.copy()).permute(2, 0, 1)[None].float() / 255


def pair(processor: Any, levels: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """What the preprocessor makes, and what the real one makes, in levels of the input."""
    ours = Preprocessor.of(processor, **options)
    truth = processor(images=Image.fromarray(levels), return_tensors="pt")["pixel_values"]
    std = torch.tensor(ours.std)[:, None, None]
    return ours(tensor(levels)) * std, truth * std


def clip(**options: Any) -> Any:
    return CLIPImageProcessor(
        **{
            "size": {"shortest_edge": 96},
            "crop_size": {"height": 96, "width": 96},
            **options,
        }
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": {"height": 96, "width": 96}, "do_center_crop": False},
        {"size": {"shortest_edge": 110}},
        {"size": {"shortest_edge": 70}},
        {"do_normalize": False},
        {"resample": 2},
        {"resample": 1},
        {"image_mean": [0.5] * 3, "image_std": [0.25] * 3},
    ],
)
def test_equals_clip_to_the_bit(size: tuple[int, int], options: dict[str, Any]) -> None:
    ours, truth = pair(clip(**options), picture(size))
    assert ours.shape == truth.shape
    assert float((ours - truth).abs().max()) < 1e-3 * LEVEL


@pytest.mark.parametrize("size", SIZES)
def test_equals_llava_with_padding_to_a_square(size: tuple[int, int]) -> None:
    processor = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96}
    )
    ours, truth = pair(processor, picture(size))
    assert float((ours - truth).abs().max()) < 1e-3 * LEVEL


def test_pictures_of_the_right_size_are_only_normalised() -> None:
    ours, truth = pair(clip(), picture((96, 96)))
    assert torch.allclose(ours, truth, rtol=0, atol=1e-6)
    images = tensor(picture((96, 96))).requires_grad_()
    made = Preprocessor.of(clip())(images)
    (gradient,) = torch.autograd.grad(made.sum(), images)
    std = torch.tensor(Preprocessor.of(clip()).std)
    assert torch.allclose(gradient[0, :, 0, 0], 1 / std)
    assert made.grad_fn is not None
    assert "Div" in made.grad_fn.name()


def test_unrounded_equals_torch_interpolation() -> None:
    """A second opinion on the kernel: torch's own antialiased bicubic."""
    images = tensor(picture((80, 120))) * 255
    ours = resize(images, (48, 60), 3, rounded=False)
    truth = torch.nn.functional.interpolate(images, (48, 60), mode="bicubic", antialias=True)
    assert torch.allclose(ours, truth, rtol=0, atol=0.01)


def test_rounding_passes_the_gradient_straight_through() -> None:
    levels = picture((60, 100))
    gradients = []
    for rounded in (True, False):
        images = tensor(levels).requires_grad_()
        made = Preprocessor.of(clip(), rounded=rounded)(images)
        weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(0))
        gradients.append(torch.autograd.grad((made * weights).sum(), images)[0])
    assert torch.allclose(gradients[0], gradients[1], rtol=0, atol=1e-5)
    assert float(gradients[0].abs().max()) > 0.1


def test_gradient_agrees_with_finite_differences() -> None:
    processor = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}
    )
    preprocess = Preprocessor.of(processor, rounded=False)
    images = tensor(picture((20, 33))).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: preprocess(x)[:, :, ::7, ::7], images, atol=1e-4)


def test_batches_are_treated_alike() -> None:
    preprocess = Preprocessor.of(clip())
    images = torch.cat([tensor(picture((64, 100), seed)) for seed in range(3)])
    together = preprocess(images)
    for row in range(3):
        assert torch.allclose(together[row], preprocess(images[row : row + 1])[0], atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_source_pixels_follow_the_geometry(size: tuple[int, int]) -> None:
    """Painting the pixels of one token changes that token's cell most."""
    for processor in (
        clip(),
        LlavaImageProcessorPil(
            do_pad=True, size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96}
        ),
    ):
        preprocess = Preprocessor.of(processor, tokens=(6, 6))
        for token in (0, 17, 35):
            tokens = torch.zeros(1, 36)
            tokens[0, token] = 1
            pixels = preprocess.layout(size).pixels(tokens, size)
            if not bool(pixels.any()):
                assert isinstance(processor, LlavaImageProcessorPil)  # a cell of padding
                continue
            images = torch.full((1, 3, *size), 0.5)
            change = (preprocess(images + 0.4 * pixels) - preprocess(images)).abs().sum(1)
            cells = torch.nn.functional.avg_pool2d(change, 16).flatten()
            assert int(cells.argmax()) == token


def test_resampling_weights_are_a_partition() -> None:
    for code in (1, 2, 3, 4, 5):
        for size, wanted in ((100, 33), (33, 100), (7, 7)):
            weights = resampling_matrix(size, wanted, code)
            assert torch.allclose(weights.sum(1), torch.ones(wanted).double(), atol=1e-5)
    with pytest.raises(TargetError, match="code 0"):
        resampling_matrix(10, 5, 0)


@pytest.mark.parametrize("shape", [(3, 96, 96), (1, 1, 96, 96), (1, 96, 96, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TargetError, match=r"expected \[B, 3, H, W\]"):
        Preprocessor.of(clip())(torch.zeros(shape))


def test_pictures_of_varying_size_are_refused() -> None:
    with pytest.raises(TargetError, match="varying size"):
        Preprocessor.of(clip(do_center_crop=False))
