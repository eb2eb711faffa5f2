"""LLaVA-NeXT and OneVision: tiles, tokens and boxes against the real processors and models."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from targets.errors import TargetError
from targets.preprocessing import Preprocessing
from targets.preprocessing.anyres import Packing
from targets.preprocessing.llava_next import LlavaNextPreprocessor
from targets.preprocessing.llava_onevision import LlavaOnevisionPreprocessor

TILE, PATCH = 32, 8
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
WIDE = [[32 * rows, 32 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
SIZES = [(32, 32), (40, 40), (64, 100), (100, 64), (301, 97), (31, 200), (7, 5), (1, 1), (3, 170)]
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


def config(kind: str, *, tile: int = TILE, patch: int = PATCH, **options: Any) -> Any:
    """What the preprocessors read of a model's configuration."""
    vision = SimpleNamespace(image_size=tile, patch_size=patch)
    points: dict[str, Any] = {"image_grid_pinpoints": PINPOINTS if kind == "next" else WIDE}
    if kind == "onevision":
        points["vision_aspect_ratio"] = "anyres_max_2"  # so that some sizes are interpolated
    name = {"next": "llava_next", "onevision": "llava_onevision"}[kind]
    return SimpleNamespace(model_type=name, vision_config=vision, **{**points, **options})


def processor(kind: str, *, tile: int = TILE, **options: Any) -> Any:
    """A real image processor."""
    if kind == "next":
        defaults = {
            "size": {"shortest_edge": tile},
            "crop_size": {"height": tile, "width": tile},
            "image_grid_pinpoints": PINPOINTS,
        }
        return LlavaNextImageProcessorPil(**{**defaults, **options})
    defaults = {"size": {"height": tile, "width": tile}, "image_grid_pinpoints": WIDE}
    return LlavaOnevisionImageProcessorPil(**{**defaults, **options})


def preprocessor(kind: str, **options: Any) -> Any:
    cls = LlavaNextPreprocessor if kind == "next" else LlavaOnevisionPreprocessor
    return cls.of(processor(kind), config(kind), **options)


def placeholders(kind: str, size: tuple[int, int], side: int = TILE // PATCH) -> int:
    """How many placeholders the real processor writes for a picture that is alone."""
    whole: Any
    if kind == "next":
        whole = LlavaNextProcessor.__new__(LlavaNextProcessor)
        whole.patch_size, whole.num_additional_image_tokens = PATCH, 1
        whole.vision_feature_select_strategy = "default"
    else:
        whole = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
        whole.num_image_tokens, whole.vision_aspect_ratio = side**2, "anyres_max_2"
        whole.vision_feature_select_strategy = "full"
    whole.image_processor, whole.image_token = processor(kind), "x"
    made = processor(kind)(images=Image.fromarray(picture(size)), return_tensors="pt")
    return len(whole.replace_image_token(dict(made), 0))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["next", "onevision"])
@pytest.mark.parametrize(
    "options",
    [{}, {"resample": 2}, {"do_normalize": False}, {"image_mean": [0.5] * 3, "do_rescale": False}],
)
def test_equals_the_real_processor(
    kind: str, size: tuple[int, int], options: dict[str, Any]
) -> None:
    real = processor(kind, **options)
    cls = LlavaNextPreprocessor if kind == "next" else LlavaOnevisionPreprocessor
    ours = cls.of(real, config(kind))
    made = ours.inputs(tensor(picture(size)))
    truth = real(images=Image.fromarray(picture(size)), return_tensors="pt")
    assert set(made) == set(truth)
    assert made["pixel_values"].shape == truth["pixel_values"].shape
    std = torch.tensor(ours.std)[:, None, None]
    apart = ((made["pixel_values"] - truth["pixel_values"]) * std / ours.scale / 255).abs().max()
    assert float(apart) < 1e-3 * LEVEL
    for name in set(truth) - {"pixel_values"}:
        assert torch.equal(made[name], torch.as_tensor(truth[name])), name
    assert isinstance(ours, Preprocessing)


@pytest.mark.parametrize("size", SIZES)
def test_onevision_squares_pictures_that_share_a_prompt(size: tuple[int, int]) -> None:
    ours = replace(preprocessor("onevision"), alone=False)
    levels = [picture(size, seed) for seed in range(2)]
    made = ours.inputs(torch.cat([tensor(each) for each in levels]))
    truth = processor("onevision")(
        images=[[Image.fromarray(each) for each in levels]], return_tensors="pt"
    )
    std = torch.tensor(ours.std)[:, None, None]
    apart = ((made["pixel_values"] - truth["pixel_values"]) * std).abs().max()
    assert float(apart) < 1e-3 * LEVEL
    assert torch.equal(made["batch_num_images"], torch.as_tensor(truth["batch_num_images"]))
    layout = ours.layout(size)
    assert (layout.tokens, layout.placeholders) == (16, 17)
    assert layout.separators.tolist() == [16]
    height, width = size
    assert torch.allclose(
        layout.boxes[-1, 2:] + layout.boxes[0, :2],
        torch.tensor([height, width]).double(),
        atol=1.0,  # the padding below and right is a pixel more where it cannot be halved
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_tiling_is_that_of_transformers(kind: str, seed: int) -> None:
    packing = Packing.of(config(kind))
    rng = np.random.default_rng(seed)
    for height, width in rng.integers(1, 400, (200, 2)).tolist():
        best = select_best_resolution((height, width), [list(p) for p in packing.pinpoints])
        how = packing.tiling((height, width))
        assert (how.shape[0] * TILE, how.shape[1] * TILE) == tuple(best)
        empty = np.zeros((3, height, width), np.uint8)
        assert how.resized == get_patch_output_size(empty, best, "channels_first")


class Packer:
    """The packing of the real models, without their weights."""

    def __init__(self, kind: str, given: Any) -> None:
        self.config, self.kind = given, kind

    def __call__(self, features: Tensor, size: tuple[int, int], newline: Tensor) -> Tensor:
        images, sizes = [features], [torch.tensor(size)]
        if self.kind == "next":
            packed, _ = LlavaNextModel.pack_image_features(self, images, sizes, "default", newline)
        else:
            packed, _ = LlavaOnevisionModel.pack_image_features(
                self, images, sizes, newline, self.config.vision_aspect_ratio
            )
        found: Tensor = packed[0]
        return found


@pytest.mark.parametrize("patch", [PATCH, 7])
@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_layout_is_the_packing_of_the_model(kind: str, patch: int) -> None:
    given = config(kind, patch=patch)
    packing, real = Packing.of(given), Packer(kind, given)
    side, seen = packing.side, set()
    rng = np.random.default_rng(1)
    for size in [*SIZES, *map(tuple, rng.integers(1, 300, (40, 2)).tolist())]:
        layout = packing.layout(size)
        shape = (len(layout.shapes), side * side, 5)
        features = torch.rand(shape, generator=torch.Generator().manual_seed(0)).double()
        packed = real(features, size, torch.full((5,), -1.0).double())
        assert layout.placeholders == len(packed)
        assert bool((packed[layout.separators] == -1).all())
        assert layout.shapes == ((side, side),) * len(features)
        seen.add(layout.weights.shape[1])
        own = (layout.tile * side + layout.row) * side + layout.column
        if layout.weights.shape[1] == 1:
            assert torch.equal(layout.patches[:, 0], own)
        weights = layout.weights[..., None]
        mixed = (features.flatten(0, 1)[layout.patches] * weights).sum(1)
        assert torch.allclose(mixed, packed[layout.columns], atol=1e-5)
        assert torch.allclose(layout.weights.sum(1), torch.ones(1).double())
        # The patch that a token lies in is the one it takes most from, up to halves.
        most = (layout.weights * (layout.patches == own[:, None])).sum(1)
        assert bool((most > layout.weights.amax(1) - 1e-6).all())
    assert seen == ({1, 4} if kind == "onevision" else {1})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_as_many_placeholders_as_the_real_processor_writes(
    kind: str, size: tuple[int, int]
) -> None:
    assert preprocessor(kind).layout(size).placeholders == placeholders(kind, size)


def patches(views: Tensor, patch: int = PATCH) -> Tensor:
    """How much each patch of the tower's input holds, ``[tiles, rows, columns]``."""
    return torch.nn.functional.avg_pool2d(views.sum(1), patch) * patch**2


@pytest.mark.parametrize("size", [(32, 32), (64, 100), (150, 60), (31, 200), (90, 97)])
@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_boxes_are_what_patches_see(kind: str, size: tuple[int, int]) -> None:
    """Brightening the box of a token changes its own patch most, in each of the tiles."""
    ours = preprocessor(kind, rounded=False)
    layout, checked = ours.layout(size), 0
    images = torch.full((1, 3, *size), 0.5)
    before = ours.inputs(images)["pixel_values"][0]
    for token in range(0, layout.tokens, 3):
        only = torch.zeros(1, layout.tokens)
        only[0, token] = 1
        alone = replace_boxes(layout, token).pixels(only, size)
        height, width = (layout.boxes[token, 2:] - layout.boxes[token, :2]).tolist()
        if float(alone.sum()) < 0.9 * height * width or min(height, width) < 1.5:
            continue  # at the border of the padding, or less than pixels can show
        change = (ours.inputs(images + 0.4 * alone)["pixel_values"][0] - before).abs()
        cells = patches(change)[layout.tile[token]]
        here = (int(layout.row[token]), int(layout.column[token]))
        # A cell of an interpolated grid lies on several patches, on its own at least half.
        share = 0.8 if layout.weights.shape[1] > 1 and token >= 16 else 0.95
        assert float(cells[here]) > share * float(cells.max()), (token, cells)
        checked += 1
    assert checked > 4


def replace_boxes(layout: Any, token: int) -> Any:
    """The layout with all boxes but one empty, so that `pixels` paints one token."""
    boxes = torch.zeros_like(layout.boxes)
    boxes[token] = layout.boxes[token]
    return replace(layout, boxes=boxes)


def test_boxes_cover_what_is_not_cut_off_exactly_once() -> None:
    for kind in ("next", "onevision"):
        for size in SIZES:
            layout, bound = preprocessor(kind).layout(size), torch.tensor([*size, *size])
            for here in (layout.tile == 0, layout.tile > 0):
                boxes = layout.boxes[here]
                if len(boxes) == 0:
                    assert min(size) == 3  # thinner than a patch: the model cuts all of it off
                    continue
                clipped = boxes.clamp(min=0).minimum(bound)
                area = ((clipped[:, 2:] - clipped[:, :2]).prod(1)).sum()
                outer = torch.cat([clipped[:, :2].amin(0), clipped[:, 2:].amax(0)])
                assert float(area) == pytest.approx(float((outer[2:] - outer[:2]).prod()))
                # Cut in whole patches, it may lose up to one of the picture at each side.
                patch = (boxes[:, 2:] - boxes[:, :2]).amax(0).repeat(2)
                assert bool(((outer - torch.tensor([0, 0, *size])).abs() < patch + 1e-6).all())


def test_pixels_behind_the_last_whole_patch_are_in_no_box() -> None:
    """384-pixel tiles of 14-pixel patches leave 6 pixels out, in the base and in every tile."""
    packing = Packing(384, 14, ((384, 768),), 9)
    layout = packing.layout((384, 768))
    assert packing.side == 27
    base, tiles = layout.boxes[: 27 * 27], layout.boxes[27 * 27 :]
    assert base[0].tolist() == [0, 0, 14, 28]
    assert base[-1].tolist() == [364, 728, 378, 756]
    assert tiles[26].tolist() == [0, 364, 14, 378]
    assert tiles[27].tolist() == [0, 384, 14, 398]
    assert layout.tile[27 * 27 + 26 :][:2].tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_gradient_reaches_the_pixels_of_a_token_only(kind: str) -> None:
    ours, size = preprocessor(kind), (60, 26)
    layout = ours.layout(size)
    assert layout.weights.shape[1] == 1
    for token in (5, 16 + 7, layout.tokens - 9):
        images = tensor(picture(size)).requires_grad_()
        tile, row, column = (int(part[token]) for part in (layout.tile, layout.row, layout.column))
        rows = slice(row * PATCH, (row + 1) * PATCH)
        columns = slice(column * PATCH, (column + 1) * PATCH)
        seen = ours.inputs(images)["pixel_values"][0, tile, :, rows, columns]
        (gradient,) = torch.autograd.grad(seen.square().sum(), images)
        touched = gradient[0].abs().sum(0) > 0
        top, left, bottom, right = layout.boxes[token].tolist()
        reach = 2 * 60 / TILE + 1  # two source pixels of bicubic at the coarsest scale
        down, across = (torch.arange(n) + 0.5 for n in size)
        inside = ((down > top) & (down < bottom))[:, None] & ((across > left) & (across < right))
        near = ((down > top - reach) & (down < bottom + reach))[:, None] & (
            (across > left - reach) & (across < right + reach)
        )
        assert bool(touched[inside].all())
        assert not bool(touched[~near].any())


@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_gradient_agrees_with_finite_differences(kind: str) -> None:
    ours = preprocessor(kind, rounded=False)
    images = tensor(picture((20, 33))).double().requires_grad_()
    pick = [(0, 3, 9), (1, 17, 5), (1, 30, 30)]

    def made(x: Tensor) -> Tensor:
        views = ours.inputs(x)["pixel_values"]
        return torch.stack([views[0, t, :, r, c] for t, r, c in pick])

    assert torch.autograd.gradcheck(made, images, atol=1e-4)


@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_batches_are_treated_alike(kind: str) -> None:
    ours = preprocessor(kind)
    images = torch.cat([tensor(picture((64, 100), seed)) for seed in range(3)])
    together = ours.inputs(images)["pixel_values"]
    for row in range(3):
        single = ours.inputs(images[row : row + 1])["pixel_values"][0]
        assert torch.allclose(together[row], single, atol=1e-6)


def test_settings_without_a_meaning_are_refused() -> None:
    with pytest.raises(TargetError, match="are not the model's"):
        LlavaNextPreprocessor.of(processor("next"), config("next", image_grid_pinpoints=WIDE))
    with pytest.raises(TargetError, match=r"size.*does not give tiles of 64"):
        LlavaNextPreprocessor.of(
            processor("next", image_grid_pinpoints=[[64, 64]]),
            config("next", tile=64, image_grid_pinpoints=[[64, 64]]),
        )
    odd = processor("next", crop_size={"height": 24, "width": 24})
    with pytest.raises(TargetError, match="crop_size"):
        LlavaNextPreprocessor.of(odd, config("next"))
    with pytest.raises(TargetError, match="multiples of the vision tower's 32"):
        Packing.of(config("next", image_grid_pinpoints=[[32, 40]]))
    for aspect in ("anyres", "anyres_max_", "pad", "anyres_max_0"):
        with pytest.raises(TargetError, match="anyres_max_N"):
            Packing.of(config("onevision", vision_aspect_ratio=aspect))


@pytest.mark.parametrize("shape", [(3, 96, 96), (1, 1, 96, 96), (1, 96, 96, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TargetError, match=r"expected \[B, 3, H, W\]"):
        preprocessor("onevision").inputs(torch.zeros(shape))
