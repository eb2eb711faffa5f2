"""PaliGemma's and Gemma 3's preprocessing against their real image processors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from targets.errors import TargetError
from targets.preprocessing import Preprocessing
from targets.preprocessing.gemma import GemmaPreprocessing, PanAndScan

SIZES = [(56, 56), (20, 20), (64, 100), (100, 64), (300, 41), (31, 200), (3, 7), (57, 56), (1, 1)]
SIDE, PATCH = 56, 14
LEVEL = 1 / 255
"""One level of an 8-bit picture; agreement is asked for to a thousandth of it."""
SCAN = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 10,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}


def picture(size: tuple[int, int], seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    ground = np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))
    noise = rng.integers(-60, 60, ground.shape)
    return np.clip(ground.astype(int) + noise, 0, 255).astype(np.uint8)


def tensor(levels: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    return torch.from_numpy(levels.copy()).permute(2, 0, 1)[None].float() / 255


def config(kind: str, **options: Any) -> Any:
    vision = SimpleNamespace(image_size=SIDE, patch_size=PATCH)
    return SimpleNamespace(
        **{"model_type": kind, "vision_config": vision, "mm_tokens_per_image": 4, **options}
    )


def siglip(**options: Any) -> Any:
    return SiglipImageProcessorPil(**{"size": {"height": SIDE, "width": SIDE}, **options})


def gemma3(**options: Any) -> Any:
    return Gemma3ImageProcessorPil(**{"size": {"height": SIDE, "width": SIDE}, **options})


def make(processor: Any, **options: Any) -> GemmaPreprocessing:
    kind = "gemma3" if isinstance(processor, Gemma3ImageProcessorPil) else "paligemma"
    return GemmaPreprocessing.of(processor, config(kind), **options)


def real(processor: Any, levels: Any) -> Tensor:
    out: Tensor = processor(images=Image.fromarray(levels), return_tensors="pt")["pixel_values"]
    return out


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "processor",
    [
        siglip(),
        siglip(resample=2),
        siglip(image_mean=[0.2, 0.4, 0.6], image_std=[0.3, 0.25, 0.5]),
        siglip(do_normalize=False),
        siglip(do_rescale=False, do_normalize=False),
        gemma3(),
        gemma3(resample=3),
    ],
    ids=["siglip", "bilinear", "colours", "unnormalised", "levels", "gemma3", "bicubic"],
)
def test_equals_the_real_processor(size: tuple[int, int], processor: Any) -> None:
    preprocess = make(processor)
    ours = preprocess.inputs(tensor(picture(size)))["pixel_values"]
    truth = real(processor, picture(size))
    assert ours.shape == truth.shape == (1, 3, SIDE, SIDE)
    std = torch.tensor(preprocess.tile.std)[:, None, None] / (255 * preprocess.tile.scale)
    assert float(((ours - truth) * std).abs().max()) < 1e-3 * LEVEL


@pytest.mark.parametrize("seed", range(12))
def test_pan_and_scan_equals_the_real_one_on_random_sizes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(8, 160)), int(rng.integers(8, 160)))
    options = {
        **SCAN,
        "pan_and_scan_min_crop_size": int(rng.integers(8, 40)),
        "pan_and_scan_max_num_crops": int(rng.integers(1, 6)),
        "pan_and_scan_min_ratio_to_activate": float(rng.uniform(1, 2)),
    }
    processor = gemma3(**options)
    made = processor(images=Image.fromarray(picture(size)), return_tensors="pt")
    preprocess = make(processor)
    ours = preprocess.inputs(tensor(picture(size)))["pixel_values"]
    assert ours.shape == made["pixel_values"].shape
    assert len(ours) == 1 + int(made["num_crops"][0])
    assert float((ours - made["pixel_values"]).abs().max()) * 0.5 < 1e-3 * LEVEL


@pytest.mark.parametrize("size", [(40, 130), (130, 40), (20, 97), (100, 10), (50, 59), (50, 60)])
def test_pan_and_scan_cuts_the_same_crops(size: tuple[int, int]) -> None:
    processor = gemma3(**SCAN)
    levels = picture(size)
    crops = processor.pan_and_scan(
        levels.transpose(2, 0, 1),
        *(SCAN[f"pan_and_scan_{name}"] for name in ("min_crop_size", "max_num_crops")),
        SCAN["pan_and_scan_min_ratio_to_activate"],
    )
    regions = make(processor).regions(size)
    assert regions[0] == (0, 0, *size)
    assert len(regions) == 1 + len(crops)
    for (top, left, bottom, right), crop in zip(regions[1:], crops, strict=True):
        assert np.array_equal(levels.transpose(2, 0, 1)[:, top:bottom, left:right], crop)


def test_pan_and_scan_is_exercised() -> None:
    """The sizes above cover no crop, two and four, in both directions."""
    scan = make(gemma3(**SCAN))
    counts = {size: len(scan.regions(size)) - 1 for size in ((40, 130), (130, 40), (50, 59))}
    assert counts == {(40, 130): 3, (130, 40): 3, (50, 59): 0}
    assert len(scan.regions((20, 97))) == 5


def test_the_whole_processor_has_precedence_over_its_image_processor() -> None:
    """Gemma3Processor's own image options win over the image processor's, as in its call."""
    whole = SimpleNamespace(
        image_processor=gemma3(**SCAN), images_kwargs={"do_pan_and_scan": False}
    )
    assert GemmaPreprocessing.of(whole, config("gemma3")).scan is None
    whole = SimpleNamespace(image_processor=gemma3(), images_kwargs=SCAN)
    assert GemmaPreprocessing.of(whole, config("gemma3")).scan == PanAndScan(10, 4, 1.2)


@pytest.mark.parametrize("processor", [siglip(), gemma3(**SCAN)], ids=["paligemma", "gemma3"])
def test_batches_are_treated_alike(processor: Any) -> None:
    preprocess = make(processor)
    images = torch.cat([tensor(picture((40, 100), seed)) for seed in range(3)])
    together = preprocess.inputs(images)["pixel_values"].reshape(3, -1, 3, SIDE, SIDE)
    for row in range(3):
        alone = preprocess.inputs(images[row : row + 1])["pixel_values"]
        assert torch.allclose(together[row], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("processor", [siglip(), gemma3(**SCAN)], ids=["paligemma", "gemma3"])
@pytest.mark.parametrize("size", [(40, 130), (101, 64), (20, 20), (56, 56)])
def test_the_gradient_of_a_token_lies_in_its_box(processor: Any, size: tuple[int, int]) -> None:
    preprocess = make(processor)
    assert isinstance(preprocess, Preprocessing)
    layout = preprocess.layout(size)
    images = tensor(picture(size)).requires_grad_()
    made = preprocess.inputs(images)["pixel_values"]
    high, wide = SIDE // preprocess.tokens[0], SIDE // preprocess.tokens[1]
    for token in range(0, layout.tokens, 3):
        tile, row, column = (int(part[token]) for part in (layout.tile, layout.row, layout.column))
        top, left = row * high, column * wide
        cell = made[tile, :, top : top + high, left : left + wide]
        (gradient,) = torch.autograd.grad(cell.sum(), images, retain_graph=True)
        touched = gradient[0].abs().sum(0)
        one = torch.zeros(1, layout.tokens)
        one[0, token] = 1
        inside = layout.pixels(one, size)[0, 0] > 0
        assert bool((touched[inside] > 0).all())
        # The resampling kernel reaches a few pixels over the edge of the box, not further.
        box = layout.boxes[token]
        reach = 2 * max(1, *(s / SIDE for s in size)) + 1
        rows, columns = (torch.arange(length) + 0.5 for length in size)
        near = ((rows > box[0] - reach) & (rows < box[2] + reach))[:, None] & (
            (columns > box[1] - reach) & (columns < box[3] + reach)
        )
        assert not bool((touched[~near] > 0).any())


@pytest.mark.parametrize("processor", [siglip(), gemma3(**SCAN)], ids=["paligemma", "gemma3"])
@pytest.mark.parametrize("size", [(64, 200), (200, 64), (70, 72)])
def test_painting_a_box_changes_its_patch_most(processor: Any, size: tuple[int, int]) -> None:
    preprocess = make(processor)
    layout = preprocess.layout(size)
    images = torch.full((1, 3, *size), 0.4)
    side = preprocess.tokens[0]
    for token in range(0, layout.tokens, 2):
        one = torch.zeros(1, layout.tokens)
        one[0, token] = 1
        painted = preprocess.inputs(images + 0.4 * layout.pixels(one, size))["pixel_values"]
        change = (painted - preprocess.inputs(images)["pixel_values"]).abs().sum(1)
        cells = torch.nn.functional.avg_pool2d(change, SIDE // side)[int(layout.tile[token])]
        best = int(cells.flatten().argmax())
        assert best == int(layout.row[token]) * side + int(layout.column[token])


def test_layout_counts_what_the_processor_counts() -> None:
    assert make(siglip()).layout((30, 90)).placeholders == (SIDE // PATCH) ** 2
    layout = make(gemma3(**SCAN)).layout((30, 90))
    assert layout.placeholders == layout.tokens == 4 * 4  # the whole and three crops, four each
    assert layout.shapes == ((2, 2),) * 4
    assert layout.base == 0
    assert not len(layout.separators)
    assert layout.tile.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert layout.boxes[:4, 2:].amax(0).tolist() == [30, 90]
    assert layout.boxes[4:8].tolist()[0] == [0, 0, 15, 15]
    assert layout.boxes[12:].tolist()[-1] == [15, 75, 30, 90]


@pytest.mark.parametrize(
    ("processor", "match"),
    [
        (siglip(do_resize=False), "do_resize"),
        (siglip(do_center_crop=True, crop_size={"height": 56, "width": 56}), "do_center_crop"),
        (siglip(do_pad=True), "do_pad"),
        (siglip(size={"height": 48, "width": 48}), "vision tower takes 56"),
        (siglip(size={"shortest_edge": 56}), "varying size"),
        (siglip(image_seq_length=9), "writes 9 placeholders"),
        (gemma3(do_pan_and_scan=True), "pan_and_scan"),
        (gemma3(**{**SCAN, "pan_and_scan_min_crop_size": 0}), "at least 1"),
    ],
)
def test_settings_without_a_meaning_are_refused(processor: Any, match: str) -> None:
    with pytest.raises(TargetError, match=match):
        make(processor)


def test_patches_that_do_not_pool_are_refused() -> None:
    with pytest.raises(TargetError, match="do not pool"):
        GemmaPreprocessing.of(gemma3(), config("gemma3", mm_tokens_per_image=9))


def test_an_empty_crop_is_refused() -> None:
    """The real processor fails on it as well, with a message about zero pixels."""
    scan = PanAndScan(min_crop_size=1, max_crops=4, min_elongation=1.2)
    with pytest.raises(TargetError, match="last of which is empty"):
        scan.regions((1, 5))


@pytest.mark.parametrize("shape", [(3, 56, 56), (1, 1, 56, 56)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TargetError, match=r"expected \[B, 3, H, W\]"):
        make(siglip()).inputs(torch.zeros(shape))
