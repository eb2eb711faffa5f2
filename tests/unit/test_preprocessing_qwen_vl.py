"""Qwen-VL's differentiable preprocessing against the real image processor, patch by patch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from targets.errors import TargetError
from targets.preprocessing import Preprocessing
from targets.preprocessing.qwen_vl import QwenPreprocessor

LEVEL = 1 / 255
"""One level of an 8-bit picture; agreement is asked for to a thousandth of it."""
SIZES = [(56, 84), (57, 83), (300, 211), (97, 640), (640, 97), (9, 15), (28, 28), (43, 1201)]
PROCESSORS: dict[str, dict[str, Any]] = {
    "qwen2": {"size": {"shortest_edge": 56 * 56, "longest_edge": 200_000}},
    "qwen2.5": {"size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 60_000}},
    "qwen3": {
        "size": {"shortest_edge": 65_536, "longest_edge": 150_000},
        "patch_size": 16,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    },
    "small": {"size": {"shortest_edge": 16, "longest_edge": 4096}, "patch_size": 4},
    "three frames of merge 3": {
        "size": {"shortest_edge": 16, "longest_edge": 9000},
        "patch_size": 4,
        "merge_size": 3,
        "temporal_patch_size": 3,
    },
    "unscaled, bilinear": {
        "size": {"shortest_edge": 3136, "longest_edge": 60_000},
        "do_rescale": False,
        "do_normalize": False,
        "resample": 2,
    },
}


def real(name: str = "small", **options: Any) -> Any:
    return Qwen2VLImageProcessorPil(**{**PROCESSORS[name], **options})


def picture(size: tuple[int, int], seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Noise on a smooth ground, so that both smooth and sharp parts are resampled."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    ground = np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))
    noise = rng.integers(-60, 60, ground.shape)
    return np.clip(ground.astype(int) + noise, 0, 255).astype(np.uint8)


def tensor(*levels: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    return torch.stack([torch.from_numpy(each.copy()).permute(2, 0, 1) for each in levels]) / 255


def truth(processor: Any, *levels: np.ndarray[Any, np.dtype[np.uint8]]) -> Any:
    return processor(images=[Image.fromarray(each) for each in levels], return_tensors="pt")


def agree(processor: Any, *levels: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    ours = QwenPreprocessor.of(processor)
    made, wanted = ours.inputs(tensor(*levels)), truth(processor, *levels)
    assert torch.equal(made["image_grid_thw"], wanted["image_grid_thw"])
    assert made["pixel_values"].shape == wanted["pixel_values"].shape
    # A level is this much in the tower's input.
    unit = ours.scale * 255 / max(ours.std) * LEVEL
    apart = float((made["pixel_values"] - wanted["pixel_values"]).abs().max())
    assert apart < 1e-3 * unit


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PROCESSORS)
def test_equals_the_real_processor(name: str, size: tuple[int, int]) -> None:
    agree(real(name), picture(size))


def test_equals_the_real_processor_on_random_sizes() -> None:
    rng = np.random.default_rng(5)
    for seed in range(12):
        high, wide = rng.integers(6, 260, 2).tolist()
        agree(real("qwen2.5" if seed % 2 else "small"), picture((high, wide), seed))


def test_several_pictures_follow_one_another() -> None:
    levels = [picture((70, 45), seed) for seed in range(3)]
    agree(real(), *levels)


def test_without_resizing_whole_blocks_are_asked_for() -> None:
    processor = real(do_resize=False)
    agree(processor, picture((24, 40)))
    with pytest.raises(TargetError, match="24 × 41 picture is not made of whole blocks of 8 × 8"):
        QwenPreprocessor.of(processor).inputs(tensor(picture((24, 41))))


@pytest.mark.parametrize("name", PROCESSORS)
def test_smart_resize_is_the_real_one_for_many_sizes(name: str) -> None:
    processor = real(name)
    ours = QwenPreprocessor.of(processor)
    rng = np.random.default_rng(0)
    for high, wide in rng.integers(5, 900, (300, 2)).tolist():
        if max(high, wide) > 200 * min(high, wide):
            continue
        rows, columns = ours.patch_grid((high, wide))
        assert rows * columns == processor.get_number_of_image_patches(high, wide, {})
        assert rows * ours.patch == ours.resized((high, wide))[0]


def test_a_ribbon_is_refused() -> None:
    ours = QwenPreprocessor.of(real())
    ours.resized((4, 800))
    with pytest.raises(TargetError, match="4 × 801 picture is more than 200 times"):
        ours.resized((4, 801))


def test_other_shapes_are_refused() -> None:
    ours = QwenPreprocessor.of(real())
    for shape in ((3, 32, 32), (1, 1, 32, 32)):
        with pytest.raises(TargetError, match=r"expected \[B, 3, H, W\]"):
            ours.inputs(torch.zeros(shape))


def test_a_processor_without_bounds_is_refused() -> None:
    processor = real()
    processor.size = {"height": 32, "width": 32}
    with pytest.raises(TargetError, match="shortest_edge and a longest_edge"):
        QwenPreprocessor.of(processor)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("patch_size", 14),
        ("temporal_patch_size", 1),
        ("spatial_merge_size", 1),
        ("in_channels", 1),
    ],
)
def test_a_tower_of_other_patches_is_refused(field: str, value: int) -> None:
    fields = {
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "in_channels": 3,
    }
    QwenPreprocessor.of(real(), SimpleNamespace(**fields))
    with pytest.raises(TargetError, match=f"vision tower's is {value}"):
        QwenPreprocessor.of(real(), SimpleNamespace(**{**fields, field: value}))


def test_layout_counts_what_the_real_processor_would_put_into_the_prompt() -> None:
    ours = QwenPreprocessor.of(real())
    assert isinstance(ours, Preprocessing)
    for size in SIZES[:6]:
        layout = ours.layout(size)
        grid = truth(real(), picture(size))["image_grid_thw"][0]
        assert layout.placeholders == layout.tokens == int(grid.prod()) // 4
        assert layout.shapes == ((int(grid[1]) // 2, int(grid[2]) // 2),)
        assert layout.separators.numel() == 0
        edges = layout.boxes
        assert edges[0, :2].tolist() == [0.0, 0.0]
        assert torch.allclose(edges[-1, 2:], torch.tensor(size).double())


def test_pixels_of_a_box_reach_the_patches_of_its_token_and_no_others() -> None:
    size = (24, 40)
    ours = QwenPreprocessor.of(real())
    layout = ours.layout(size)
    plain = ours.inputs(torch.full((1, 3, *size), 0.5))["pixel_values"]
    for token, box in enumerate(layout.boxes.long().tolist()):
        top, left, bottom, right = box
        images = torch.full((1, 3, *size), 0.5)
        images[..., top:bottom, left:right] = 1.0
        changed = (ours.inputs(images)["pixel_values"] != plain).any(1).nonzero().flatten()
        # A token is the mean of four patches that follow one another.
        assert changed.tolist() == list(range(4 * token, 4 * token + 4))


@pytest.mark.parametrize("size", [(24, 40), (61, 90)])
def test_gradient_of_a_token_lives_in_its_box(size: tuple[int, int]) -> None:
    ours = QwenPreprocessor.of(real())
    layout = ours.layout(size)
    images = tensor(picture(size)).requires_grad_()
    made = ours.inputs(images)["pixel_values"]
    token = layout.tokens // 2
    (gradient,) = torch.autograd.grad(made[4 * token : 4 * token + 4].sum(), images)
    inside = layout.pixels(torch.eye(layout.tokens)[[token]], size)[0, 0] > 0
    assert bool((gradient[0, :, inside] > 0).all())
    # Bicubic resampling reaches two blown-up pixels beyond the box, and no further.
    scale = max(1.0, *(a / b for a, b in zip(size, ours.resized(size), strict=True)))
    reach = 0 if ours.resized(size) == size else int(2 * scale + 1)
    near = torch.nn.functional.max_pool2d(inside[None].float(), 2 * reach + 1, 1, reach)[0] > 0
    assert float(gradient[0, :, ~near].abs().max()) == 0


def test_gradient_is_the_slope_of_the_unrounded_resampling() -> None:
    ours = QwenPreprocessor.of(real(), rounded=False)
    images = (tensor(picture((25, 30))) * 0.5 + 0.25).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ours.inputs(x)["pixel_values"][::7, ::11], (images,))


def test_every_pixel_has_a_gradient_through_the_rounding() -> None:
    ours = QwenPreprocessor.of(real())
    images = tensor(picture((70, 45)), picture((70, 45), 1)).requires_grad_()
    (gradient,) = torch.autograd.grad(ours.inputs(images)["pixel_values"].sum(), images)
    assert bool((gradient > 0).all())
