"""LLaVA-OneVision: what it has beyond LLaVA-NeXT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import llava_next, llava_onevision

from targets.errors import TargetError
from targets.families.llava_next import MixedPass
from targets.families.llava_onevision import LlavaOnevision


@pytest.fixture(scope="module")
def family() -> LlavaOnevision:
    return LlavaOnevision(llava_onevision.build_model())


@pytest.fixture(scope="module")
def processor() -> Any:
    return llava_onevision.build_processor()


def test_videos_are_refused(family: LlavaOnevision, processor: Any) -> None:
    made = llava_next.inputs(processor, llava_next.CASES["one image"])
    placeholders = made["input_ids"] == family.image_token_id
    for film in (
        {"pixel_values_videos": torch.zeros(1)},
        {"mm_encoder_outputs": {"video": torch.zeros(1)}},
    ):
        with pytest.raises(TargetError, match="videos are not supported"):
            family.images(placeholders, {**made, **film})


def test_only_grids_over_the_limit_are_mixed(family: LlavaOnevision, processor: Any) -> None:
    mixed = []
    for number in range(3):
        made = llava_next.inputs(processor, (("how many ?", (number,)),))
        layouts = family.images(made["input_ids"] == family.image_token_id, made)
        images = {k: v for k, v in made.items() if k not in ("input_ids", "attention_mask")}
        vision = family.encode(images, layouts)
        mixed.append(isinstance(vision, MixedPass))
        assert mixed[-1] == (layouts[0].weights.shape[1] == 4)  # type: ignore[attr-defined]
    assert mixed == [False, True, False]
