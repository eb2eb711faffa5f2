"""InternVL's tiles, thumbnail and tokens against the real image processor."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import InternVLConfig, InternVLVisionConfig
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from targets.errors import TargetError
from targets.preprocessing.internvl import InternVLPreprocessor
from targets.preprocessing.layout import Preprocessing

TILE, PATCH = 32, 8
SIZES = [(32, 32), (20, 20), (64, 100), (100, 64), (301, 97), (31, 200), (97, 96), (3, 50), (1, 1)]
LEVEL = 1 / 255


def config(**vision: Any) -> Any:
    size = {"image_size": TILE, "patch_size": PATCH, **vision}
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return InternVLConfig(vision_config=InternVLVisionConfig(**small, **size))


def processor(**options: Any) -> Any:
    settings = {"size": {"height": TILE, "width": TILE}, "crop_to_patches": True, **options}
    return GotOcr2ImageProcessorPil(**settings)


def picture(size: tuple[int, int], seed: int = 0) -> Any:
    """Noise on a smooth ground, so that both smooth and sharp parts are resampled."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    ground = np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
    return np.clip(ground + rng.integers(-60, 60, ground.shape), 0, 255).astype(np.uint8)


def tensor(levels: Any) -> Tensor:
    return torch.from_numpy(levels.copy()).permute(2, 0, 1)[None].float() / 255


def real(image_processor: Any, *pictures: Any) -> Any:
    return image_processor(images=[Image.fromarray(one) for one in pictures], return_tensors="pt")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_patches": 4},
        {"min_patches": 3, "max_patches": 6},
        {"min_patches": 13},
        {"crop_to_patches": False},
        {"max_patches": 1},
        {"resample": 2, "image_mean": [0.5] * 3, "image_std": [0.25] * 3},
        {"do_normalize": False},
        {"do_rescale": False},
    ],
)
def test_equals_the_image_processor(size: tuple[int, int], options: dict[str, Any]) -> None:
    image_processor = processor(**options)
    ours = InternVLPreprocessor.of(image_processor, config())
    made = ours.inputs(tensor(picture(size)))["pixel_values"]
    truth = real(image_processor, picture(size))["pixel_values"]
    assert made.shape == truth.shape
    std = torch.tensor(ours.colours.std)[:, None, None] / (255 * ours.colours.scale)
    assert float(((made - truth) * std).abs().max()) < 1e-3 * LEVEL


def test_canvases_equal_those_of_the_image_processor() -> None:
    """Ties between equal aspects, and every number of tiles, over many sizes."""
    rng = np.random.default_rng(0)
    sizes = [(int(h), int(w)) for h, w in rng.integers(1, 400, (300, 2))]
    sizes += [(s * h, s * w) for s in (8, 30, 45, 64, 100, 200) for h in (1, 2, 3) for w in (1, 2)]
    for options in ({}, {"max_patches": 6}, {"min_patches": 2, "max_patches": 5}):
        image_processor = processor(**options)
        ours = InternVLPreprocessor.of(image_processor, config())
        for size in sizes:
            tiles = image_processor.get_number_of_image_patches(*size)
            assert len(ours.layout(size).shapes) == tiles, (size, options)
    assert len({ours.canvas(size) for size in sizes}) > 4


def test_pictures_of_a_batch_follow_one_another() -> None:
    pictures = [picture((64, 100), seed) for seed in range(3)]
    ours = InternVLPreprocessor.of(processor(), config())
    made = ours.inputs(torch.cat([tensor(one) for one in pictures]))["pixel_values"]
    truth = real(processor(), *pictures)["pixel_values"]
    assert made.shape == truth.shape
    assert torch.allclose(made, truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 100), (90, 50), (32, 32), (20, 90)])
def test_tokens_lie_where_the_layout_says(size: tuple[int, int]) -> None:
    """Brightening a token's box changes, of its tile's input, that token's cell most."""
    ours = InternVLPreprocessor.of(processor(), config())
    layout = ours.layout(size)
    images = torch.full((1, 3, *size), 0.5)
    before = ours.inputs(images)["pixel_values"]
    assert len(before) * ours.tokens[0] * ours.tokens[1] == layout.tokens == layout.placeholders
    for token in range(layout.tokens):
        only = torch.zeros(1, layout.tokens)
        only[0, token] = 1
        after = ours.inputs(images + 0.4 * layout.pixels(only, size))["pixel_values"]
        change = (after - before).abs().sum(1)[layout.tile[token]]
        cells = torch.nn.functional.avg_pool2d(change[None], TILE // ours.tokens[0])[0]
        assert cells.argmax() == layout.row[token] * ours.tokens[1] + layout.column[token]


def test_counts_of_a_published_size() -> None:
    """InternVL3: tiles of 448 pixels, 256 tokens each."""
    image_processor = processor(size={"height": 448, "width": 448})
    ours = InternVLPreprocessor.of(image_processor, config(image_size=448, patch_size=14))
    assert ours.layout((480, 640)).tokens == (4 * 3 + 1) * 256
    assert ours.layout((448, 448)).tokens == 256


def test_the_thumbnail_is_the_base() -> None:
    ours = InternVLPreprocessor.of(processor(), config())
    layout = ours.layout((64, 96))
    assert ours.canvas((64, 96)) == (2, 3)
    assert layout.base == 6
    corner = layout.boxes[layout.tile == 6][0]
    assert corner.tolist() == [0.0, 0.0, 32.0, 48.0]
    assert layout.boxes[layout.tile == 4][-1].tolist() == [48.0, 48.0, 64.0, 64.0]
    one = ours.layout((30, 30))
    assert (one.base, one.shapes) == (0, ((2, 2),))


@pytest.mark.parametrize("token", [0, 5, 10, 27])
def test_gradients_reach_the_pixels_of_the_token_and_no_others(token: int) -> None:
    size = (70, 100)
    ours = InternVLPreprocessor.of(processor(), config())
    layout = ours.layout(size)
    images = tensor(picture(size)).requires_grad_()
    tiles = ours.inputs(images)["pixel_values"]
    edge = TILE // ours.tokens[0]
    row, column = int(layout.row[token]) * edge, int(layout.column[token]) * edge
    patch = tiles[layout.tile[token], :, row : row + edge, column : column + edge]
    (gradient,) = torch.autograd.grad(patch.sum(), images)
    top, left, bottom, right = layout.boxes[token].tolist()
    inside = gradient[0, :, int(top) + 1 : int(bottom), int(left) + 1 : int(right)]
    assert bool((inside.abs() > 1e-4).all())
    # Bicubic reaches two pixels of the input further, each so many of the picture.
    reach = 2 * (bottom - top) / edge + 2, 2 * (right - left) / edge + 2
    rows = torch.arange(size[0]).sub((top + bottom) / 2).abs() > (bottom - top) / 2 + reach[0]
    columns = torch.arange(size[1]).sub((left + right) / 2).abs() > (right - left) / 2 + reach[1]
    assert bool(rows.any() or columns.any())
    assert bool((gradient[:, :, rows] == 0).all())
    assert bool((gradient[..., columns] == 0).all())


def test_gradient_agrees_with_finite_differences() -> None:
    ours = InternVLPreprocessor.of(processor(), config(), rounded=False)
    images = tensor(picture((20, 33))).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ours.inputs(x)["pixel_values"][:, :, ::9, ::9], images, atol=1e-4
    )


def test_a_whole_processor_turns_tiles_on() -> None:
    """`InternVLProcessor` overrides the image processor's own setting."""

    class Whole:
        images_kwargs: ClassVar[dict[str, Any]] = {"crop_to_patches": True}

        def __init__(self, tokens: int) -> None:
            self.image_processor = processor(crop_to_patches=False)
            self.image_seq_length = tokens

    assert InternVLPreprocessor.of(Whole(4), config()).max_tiles == 12
    with pytest.raises(TargetError, match="writes 16 placeholders"):
        InternVLPreprocessor.of(Whole(16), config())


def test_it_is_a_preprocessing() -> None:
    assert isinstance(InternVLPreprocessor.of(processor(), config()), Preprocessing)


@pytest.mark.parametrize(
    ("options", "vision", "message"),
    [
        ({"size": {"height": 32, "width": 48}}, {}, "square tiles"),
        ({"crop_to_patches": False, "do_resize": False}, {}, "square tiles"),
        ({}, {"image_size": 48}, "vision tower takes 48"),
        ({}, {"image_size": [32, 48]}, "squares only"),
        ({}, {"patch_size": 32}, "without a remainder"),
    ],
)
def test_settings_without_a_meaning_are_refused(
    options: dict[str, Any], vision: dict[str, Any], message: str
) -> None:
    with pytest.raises(TargetError, match=message):
        InternVLPreprocessor.of(processor(**options), config(**vision))


def test_other_factors_and_processors_are_refused() -> None:
    odd = config()
    odd.downsample_ratio = 0.4
    with pytest.raises(TargetError, match=r"downsample_ratio is 0\.4"):
        InternVLPreprocessor.of(processor(), odd)
    with pytest.raises(TargetError, match="no setting crop_to_patches"):
        InternVLPreprocessor.of(object(), config())
    with pytest.raises(TargetError, match=r"expected \[B, 3, H, W\]"):
        InternVLPreprocessor.of(processor(), config()).inputs(torch.zeros(3, 32, 32))
