"""Tiles of Idefics3 and SmolVLM against the real image processors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import Idefics3Config, SmolVLMConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from targets.errors import TargetError
from targets.preprocessing.idefics3 import Idefics3Preprocessor
from targets.preprocessing.layout import Preprocessing

TILE, PATCH, SHRINK = 32, 8, 2
SIZES = [(32, 32), (20, 20), (64, 100), (100, 64), (301, 97), (31, 200), (97, 96), (3, 50), (99, 2)]
LEVEL = 1 / 255


def config(kind: type[Any] = Idefics3Config, shrink: int = SHRINK, **vision: Any) -> Any:
    size = {"image_size": TILE, "patch_size": PATCH, **vision}
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return kind(vision_config={**small, **size}, scale_factor=shrink)


def processor(kind: type[Any] = Idefics3ImageProcessorPil, **options: Any) -> Any:
    settings = {"size": {"longest_edge": 4 * TILE}, "max_image_size": {"longest_edge": TILE}}
    return kind(**{**settings, **options})


def picture(size: tuple[int, int], seed: int = 0) -> Any:
    """Noise on a smooth ground, so that both smooth and sharp parts are resampled."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    ground = np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
    return np.clip(ground + rng.integers(-60, 60, ground.shape), 0, 255).astype(np.uint8)


def tensor(levels: Any) -> Tensor:
    return torch.from_numpy(levels.copy()).permute(2, 0, 1)[None].float() / 255


def real(image_processor: Any, *pictures: Any, **options: Any) -> Any:
    batch = [[Image.fromarray(one)] for one in pictures]
    return image_processor(images=batch, return_tensors="pt", **options)


def levels_of(ours: Idefics3Preprocessor, values: Tensor) -> Tensor:
    """Differences of inputs in units of the picture."""
    return values * torch.tensor(ours.colours.std)[:, None, None] / (255 * ours.colours.scale)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": {"longest_edge": 2 * TILE}},
        {"size": {"longest_edge": 75}},
        {"size": {"longest_edge": TILE}},
        {"size": {"longest_edge": 2 * TILE - 1}},
        {"size": {"height": 50, "width": 70}},
        {"do_image_splitting": False},
        {"do_resize": False},
        {"do_resize": False, "do_image_splitting": False},
        {"resample": 3, "image_mean": [0.4] * 3, "image_std": [0.3] * 3},
        {"do_normalize": False},
        {"do_pad": False},
    ],
)
def test_equals_the_image_processor(size: tuple[int, int], options: dict[str, Any]) -> None:
    image_processor = processor(**options)
    ours = Idefics3Preprocessor.of(image_processor, config())
    made = ours.inputs(tensor(picture(size)))
    truth = real(image_processor, picture(size))
    assert set(made) == set(truth)
    assert made["pixel_values"].shape == truth["pixel_values"].shape
    apart = levels_of(ours, made["pixel_values"] - truth["pixel_values"])
    assert float(apart.abs().max()) < 1e-3 * LEVEL
    if "pixel_attention_mask" in truth:
        assert torch.equal(made["pixel_attention_mask"], truth["pixel_attention_mask"])


@pytest.mark.parametrize("size", SIZES[:5])
def test_equals_the_image_processor_of_smolvlm(size: tuple[int, int]) -> None:
    image_processor = processor(SmolVLMImageProcessorPil)
    ours = Idefics3Preprocessor.of(image_processor, config(SmolVLMConfig, shrink=4))
    assert ours.tokens == (1, 1)
    made = ours.inputs(tensor(picture(size)))["pixel_values"]
    truth = real(image_processor, picture(size))["pixel_values"]
    assert made.shape == truth.shape
    assert float(levels_of(ours, made - truth).abs().max()) < 1e-3 * LEVEL


def test_canvases_equal_those_of_the_image_processor() -> None:
    """Over many sizes, edges that become even by one pixel among them."""
    rng = np.random.default_rng(0)
    sizes = [(int(h), int(w)) for h, w in rng.integers(2, 150, (60, 2))]
    sizes += [(n, n + d) for n in (9, 31, 33, 64, 65) for d in (-1, 0, 1)]
    found = set()
    for longest in (4 * TILE, 2 * TILE - 1, 77):
        image_processor = processor(size={"longest_edge": longest})
        ours = Idefics3Preprocessor.of(image_processor, config())
        for size in sizes:
            truth = real(image_processor, picture(size), return_row_col_info=True)
            rows, columns = truth["rows"][0][0], truth["cols"][0][0]
            assert ours.canvas(size) == (max(rows, 1), max(columns, 1)), (size, longest)
            assert len(ours.layout(size).shapes) == truth["pixel_values"].shape[1]
            found.add((rows, columns))
    assert len(found) > 8


@pytest.mark.parametrize("longest", [4098, 4097, 5000])
@pytest.mark.parametrize("size", [(3, 4), (4, 3), (5, 5), (9, 700), (700, 9)])
def test_first_size_is_bounded_as_in_the_image_processor(
    longest: int, size: tuple[int, int]
) -> None:
    image_processor = processor(size={"longest_edge": longest})
    ours = Idefics3Preprocessor.of(image_processor, config())
    small = np.zeros((3, *size), dtype=np.uint8)
    truth = image_processor.resize(small, image_processor.size, resample=0)
    assert ours.resized(size) == truth.shape[1:]


@pytest.mark.parametrize(
    ("tile", "patch", "shrink", "longest", "tokens"),
    [(364, 14, 2, 4 * 364, (4 * 3 + 1) * 169), (512, 16, 4, 2048, (4 * 3 + 1) * 64)],
)
def test_counts_of_published_sizes(
    tile: int, patch: int, shrink: int, longest: int, tokens: int
) -> None:
    """Idefics3-8B and SmolVLM: 169 and 64 tokens a tile."""
    image_processor = processor(
        size={"longest_edge": longest}, max_image_size={"longest_edge": tile}
    )
    geometry = config(shrink=shrink, image_size=tile, patch_size=patch)
    assert Idefics3Preprocessor.of(image_processor, geometry).layout((480, 640)).tokens == tokens


def test_pictures_of_a_batch_are_rows() -> None:
    pictures = [picture((64, 100), seed) for seed in range(3)]
    ours = Idefics3Preprocessor.of(processor(), config())
    made = ours.inputs(torch.cat([tensor(one) for one in pictures]))["pixel_values"]
    truth = real(processor(), *pictures)["pixel_values"]
    assert made.shape == truth.shape
    assert torch.allclose(made, truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 100), (150, 100), (32, 32), (40, 160)])
def test_tokens_lie_where_the_layout_says(size: tuple[int, int]) -> None:
    """Brightening a token's box changes, of its tile's input, that token's cell most."""
    ours = Idefics3Preprocessor.of(processor(size={"longest_edge": 2 * TILE}), config())
    layout = ours.layout(size)
    images = torch.full((1, 3, *size), 0.4)
    before = ours.inputs(images)["pixel_values"][0]
    assert len(before) * ours.tokens[0] * ours.tokens[1] == layout.tokens == layout.placeholders
    for token in range(layout.tokens):
        only = torch.zeros(1, layout.tokens)
        only[0, token] = 1
        after = ours.inputs(images + 0.4 * layout.pixels(only, size))["pixel_values"][0]
        change = (after - before).abs().sum(1)[layout.tile[token]]
        cells = torch.nn.functional.avg_pool2d(change[None], TILE // ours.tokens[0])[0]
        assert cells.argmax() == layout.row[token] * ours.tokens[1] + layout.column[token]


def test_the_tile_of_the_whole_picture_is_the_base() -> None:
    ours = Idefics3Preprocessor.of(processor(), config())
    layout = ours.layout((60, 80))
    assert ours.canvas((60, 80)) == (3, 4)
    assert layout.base == 12
    assert layout.boxes[layout.tile == 12][-1].tolist() == [30.0, 40.0, 60.0, 80.0]
    assert layout.boxes[layout.tile == 5][0].tolist() == [20.0, 20.0, 30.0, 30.0]
    whole = Idefics3Preprocessor.of(processor(do_image_splitting=False), config())
    assert whole.layout((60, 80)).base == 0


@pytest.mark.parametrize("token", [0, 9, 15, 18])
def test_gradients_reach_the_pixels_of_the_token_and_no_others(token: int) -> None:
    size = (160, 200)
    ours = Idefics3Preprocessor.of(processor(size={"longest_edge": 2 * TILE}), config())
    layout = ours.layout(size)
    images = tensor(picture(size)).requires_grad_()
    tiles = ours.inputs(images)["pixel_values"][0]
    edge = TILE // ours.tokens[0]
    row, column = int(layout.row[token]) * edge, int(layout.column[token]) * edge
    patch = tiles[layout.tile[token], :, row : row + edge, column : column + edge]
    (gradient,) = torch.autograd.grad(patch.sum(), images)
    top, left, bottom, right = layout.boxes[token].tolist()
    inside = gradient[0, :, int(top) + 1 : int(bottom), int(left) + 1 : int(right)]
    assert float((inside.abs() > 1e-5).float().mean()) > 0.9
    assert float(inside.sum() / gradient.sum()) > 0.8
    # Lanczos reaches three pixels of the input further, at each of up to three resamplings.
    reach = 10 * max(bottom - top, right - left) / edge
    rows = torch.arange(size[0]).sub((top + bottom) / 2).abs() > (bottom - top) / 2 + reach
    columns = torch.arange(size[1]).sub((left + right) / 2).abs() > (right - left) / 2 + reach
    assert bool(rows.any() and columns.any()) or int(layout.tile[token]) == layout.base
    assert bool((gradient[:, :, rows] == 0).all())
    assert bool((gradient[..., columns] == 0).all())


def test_gradient_agrees_with_finite_differences() -> None:
    ours = Idefics3Preprocessor.of(
        processor(size={"longest_edge": 2 * TILE}), config(), rounded=False
    )
    images = tensor(picture((20, 33))).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ours.inputs(x)["pixel_values"][..., ::9, ::9], images, atol=1e-4
    )


def test_a_tile_of_zeros_is_not_taken_for_padding() -> None:
    """The model drops tiles that are zero all over, as its padding is."""
    ours = Idefics3Preprocessor.of(processor(), config())
    tiles = ours.inputs(torch.full((1, 3, TILE, TILE), 0.5))["pixel_values"]
    assert bool((tiles != 0).flatten(2).any(2).all())
    half = ours.inputs(torch.full((1, 3, TILE, TILE), 0.5).to(torch.float16))["pixel_values"]
    assert bool((half.to(torch.float16) != 0).flatten(2).any(2).all())
    black = Idefics3Preprocessor.of(processor(do_normalize=False), config())
    tiles = black.inputs(torch.zeros(1, 3, 20, 30))["pixel_values"]
    assert bool((tiles != 0).flatten(2).any(2).all())
    assert float(tiles.abs().max()) < 1e-3 * LEVEL


def test_it_is_a_preprocessing() -> None:
    assert isinstance(Idefics3Preprocessor.of(processor(), config()), Preprocessing)


@pytest.mark.parametrize(
    ("options", "vision", "message"),
    [
        ({"size": {"shortest_edge": 32}}, {}, "longest_edge, or height and width"),
        ({"max_image_size": {"height": 32}}, {}, "has no longest_edge"),
        ({}, {"image_size": 48}, "vision tower takes 48"),
        ({}, {"patch_size": 32}, "without a remainder"),
    ],
)
def test_settings_without_a_meaning_are_refused(
    options: dict[str, Any], vision: dict[str, Any], message: str
) -> None:
    with pytest.raises(TargetError, match=message):
        Idefics3Preprocessor.of(processor(**options), config(**vision))


def test_wrong_counts_and_shapes_are_refused() -> None:
    class Whole:
        image_processor = processor()
        image_seq_len = 169

    with pytest.raises(TargetError, match="idefics3: the processor writes 169"):
        Idefics3Preprocessor.of(Whole(), config())
    with pytest.raises(TargetError, match=r"expected \[B, 3, H, W\]"):
        Idefics3Preprocessor.of(processor(), config()).inputs(torch.zeros(3, 32, 32))


def test_a_picture_without_a_tile_is_refused() -> None:
    """49 · (1 ÷ 49) is less than 1, so its width is cut to nothing; the real one fails too."""
    image_processor = processor(do_resize=False, max_image_size={"longest_edge": 49})
    ours = Idefics3Preprocessor.of(image_processor, config(image_size=49, patch_size=7, shrink=1))
    with pytest.raises(TargetError, match="too narrow for tiles of 49"):
        ours.inputs(torch.zeros(1, 3, 49, 1))
    with pytest.raises(ValueError, match="size must be a dictionary"):
        real(image_processor, picture((49, 1)))
