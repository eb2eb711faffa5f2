"""Estimates of memory against what autograd really saves, on every family."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, build
from torch import Tensor

from targets.base import Knowledge
from targets.lvlm import LVLM

QUESTION = ("is there a red ball ?",)


def saved_bytes(target: LVLM) -> int:
    """Bytes of the activations that a gradient of one picture keeps, each storage once."""
    weights = {one.untyped_storage().data_ptr() for one in target.family.model.parameters()}
    weights |= {one.untyped_storage().data_ptr() for one in target.family.model.buffers()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), value  # held, so that no address returns
        return value

    images = torch.rand(1, 3, *target.image_size, requires_grad=True)
    view = target.view(Knowledge.WHITE_BOX)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss = view.answer_nll(images, QUESTION, ("yes",))
    assert loss.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_are_of_the_right_size(family: str) -> None:
    target = LVLM(*build(family))
    estimate = target.footprint(target.image_size)
    ratio = estimate.gradient / saved_bytes(target)
    # The text that is allowed for is long beside so few visual tokens.
    assert 0.9 < ratio < 4, ratio
    assert 0 < estimate.answer < estimate.gradient


def test_a_larger_picture_needs_more() -> None:
    target = LVLM(*build("qwen2_5_vl"))
    high, wide = target.image_size
    small, large = target.footprint((high // 2, wide)), target.footprint((high, wide))
    assert large.gradient > 1.2 * small.gradient
