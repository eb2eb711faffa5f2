"""Qwen-VL's packed towers, seen token by token: order, features and attention."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch
from families import qwen, qwen2_5_vl, qwen2_vl, qwen3_vl
from torch import Tensor

from targets.errors import TargetError
from targets.families.base import Family
from targets.families.qwen2_5_vl import Qwen25VL
from targets.families.qwen2_vl import Qwen2VL
from targets.families.qwen3_vl import Qwen3VL
from targets.families.vision import VisionPass

KINDS = {
    "qwen2_vl": (qwen2_vl, Qwen2VL),
    "qwen2_5_vl": (qwen2_5_vl, Qwen25VL),
    "qwen3_vl": (qwen3_vl, Qwen3VL),
}
CLOSE = {"rtol": 0, "atol": 2e-6}


@pytest.fixture(scope="module", params=KINDS)
def family(request: pytest.FixtureRequest) -> Family:
    built, kind = KINDS[request.param]
    return kind(built.build_model("eager"))


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    return qwen.inputs(qwen2_vl.build_processor(), qwen.CASES["mixed"])


def looked(family: Family, batch: dict[str, Any], layers: tuple[int, ...] = ()) -> VisionPass:
    """The tower's pass over the pictures of a batch."""
    image = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
    layouts = family.images(batch["input_ids"] == qwen.IMAGE, image)
    with family.tap(layers) as tap:
        family.run_tower(image)
    return family.arrange(tap.latest, layouts, image)


def features(family: Family, batch: dict[str, Any]) -> Any:
    return family.core.get_image_features(batch["pixel_values"], batch["image_grid_thw"])


def test_layouts_have_the_grids_of_the_pictures(family: Family, batch: dict[str, Any]) -> None:
    layouts = family.images(batch["input_ids"] == qwen.IMAGE, batch)
    assert [one.shapes[0] for one in layouts] == [(3, 5), (5, 4), (6, 2)]
    assert family.images(torch.zeros(1, 9, dtype=torch.bool), {}) == []


def test_wrong_grids_and_videos_are_refused(family: Family, batch: dict[str, Any]) -> None:
    places = batch["input_ids"] == qwen.IMAGE
    with pytest.raises(TargetError, match="without image_grid_thw"):
        family.images(places, {})
    with pytest.raises(TargetError, match=r"asks for 35 image placeholders .* have 47"):
        family.images(places, {"image_grid_thw": batch["image_grid_thw"][:2]})
    with pytest.raises(TargetError, match="videos are not supported"):
        family.images(places, {**batch, "pixel_values_videos": torch.zeros(1)})


def test_tokens_project_to_what_the_language_model_gets(
    family: Family, batch: dict[str, Any]
) -> None:
    vision = looked(family, batch)
    truth = features(family, batch).pooler_output
    assert vision.present.sum(1).tolist() == [len(one) for one in truth] == [15, 20, 12]
    made = family.project_tokens(vision.patches)
    for row, one in enumerate(truth):
        assert torch.allclose(made[row, : len(one)], one, **CLOSE)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_picture_looks_the_same_alone(family: Family, number: int) -> None:
    """Nothing leaks between packed pictures, and every token stays with its picture."""
    processor = qwen2_vl.build_processor()
    batch = qwen.inputs(processor, qwen.CASES["mixed"])
    alone = looked(family, qwen.inputs(processor, (("how many ?", (number,)),)), (0, 1))
    together = looked(family, batch, (0, 1))
    count = int(alone.present.sum())
    for layer in (0, 1, None):
        for name in ("hidden", "keys", "attention"):
            one, many = getattr(alone, name)(layer), getattr(together, name)(layer)
            axis = 1 if name == "hidden" else 2
            assert torch.allclose(one[0], many[number].narrow(axis - 1, 0, count), **CLOSE)


class Weights:
    """Attention weights of a tower, block by block and segment by segment, as it makes them."""

    def __init__(self, family: Family, patch: pytest.MonkeyPatch) -> None:
        module = sys.modules[type(family.core).__module__]
        original = module.eager_attention_forward
        self.seen: list[tuple[object, Tensor]] = []

        def spy(layer: Any, *args: Any, **kwargs: Any) -> Any:
            output, weights = original(layer, *args, **kwargs)
            self.seen.append((layer, weights[0]))
            return output, weights

        patch.setattr(module, "eager_attention_forward", spy)

    def of(self, attention: object) -> Tensor:
        """``[N, S, S]`` of the whole packed sequence, zero between segments."""
        parts = [weights for layer, weights in self.seen if layer is attention]
        size = sum(part.shape[1] for part in parts)
        whole = torch.zeros(parts[0].shape[0], size, size)
        first = 0
        for part in parts:
            here = slice(first, first + part.shape[1])
            whole[:, here, here] = part
            first += part.shape[1]
        return whole


def row_major(family: Family, grids: Tensor) -> Tensor:
    """For each place of the packed sequence inside the tower, its place in the processor's."""
    count = int(grids.prod(1).sum())
    if not isinstance(family, Qwen25VL):
        return torch.arange(count)
    utils = importlib.import_module("transformers.vision_utils")
    vision = family.model.config.vision_config
    index, _ = utils.get_vision_window_index(grids, 2, vision.window_size, vision.patch_size)
    return (index[:, None] * 4 + torch.arange(4)).flatten()


def test_attention_is_what_the_blocks_compute(
    family: Family, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Column means of the tower's own attention, picture by picture and token by token."""
    weights = Weights(family, monkeypatch)
    blocks = range(family.tower_depth)
    vision = looked(family, batch, tuple(blocks))
    order = row_major(family, batch["image_grid_thw"])
    for block in blocks:
        whole = weights.of(family.tower.blocks[block].attn)
        placed = torch.zeros_like(whole)
        placed[:, order[:, None], order[None]] = whole
        ours = vision.attention(block)
        first = 0
        for image, size in enumerate(batch["image_grid_thw"].prod(1).tolist()):
            here = slice(first, first + size)
            received = placed[:, here, here].mean(1)
            assert torch.allclose(received.sum(1), torch.ones(4), **CLOSE)
            truth = received.unflatten(1, (-1, 4)).mean(2)
            assert torch.allclose(ours[image, :, : size // 4], truth, **CLOSE)
            first += size
    flat = vision.attention()[0] * 15 * 4
    assert float(flat.amax()) > 1.5, "the fixture's attention is too flat to test anything"


def test_a_tap_that_stops_gives_the_same(family: Family, batch: dict[str, Any]) -> None:
    image = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
    layouts = family.images(batch["input_ids"] == qwen.IMAGE, image)
    ran = []
    handle = family.projector.register_forward_hook(lambda *_: ran.append(1))
    try:
        stopped = family.encode(image, layouts)
    finally:
        handle.remove()
    assert not ran
    assert torch.equal(stopped.patches, looked(family, batch).patches)
    assert torch.equal(stopped.attention(), looked(family, batch).attention())


def test_gradients_stay_within_a_picture(family: Family, batch: dict[str, Any]) -> None:
    """The attention of one picture's token depends on that picture only."""
    pixels = batch["pixel_values"].clone().requires_grad_()
    vision = looked(family, {**batch, "pixel_values": pixels})
    (gradient,) = torch.autograd.grad(vision.attention()[1, :, 3].sum(), pixels)
    touched = (gradient != 0).any(1)
    sizes = batch["image_grid_thw"].prod(1).tolist()
    assert [bool(part.any()) for part in touched.split(sizes)] == [False, True, False]
    assert bool(touched.split(sizes)[1].all())


def test_nothing_stays_behind(family: Family, batch: dict[str, Any]) -> None:
    def hooks() -> int:
        return sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in family.model.modules()
        )

    features(family, batch)  # transformers installs hooks of its own, once
    before = hooks()
    looked(family, batch, (0,))
    assert hooks() == before


def test_sliding_windows_in_the_text_model_are_refused() -> None:
    model = qwen2_vl.build_model()
    model.config.text_config.layer_types = ["full_attention"] * 4 + ["sliding_attention"]
    with pytest.raises(TargetError, match="sliding attention window"):
        Qwen2VL(model)


def test_a_processor_of_another_patch_size_is_refused(family: Family) -> None:
    processor = qwen2_vl.build_processor()
    family.preprocessing(processor)
    processor.image_processor.patch_size = 14
    with pytest.raises(TargetError, match="patch_size is 14, the vision tower's is 4"):
        family.preprocessing(processor)
