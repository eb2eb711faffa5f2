"""Which compressors let the picture decide how many tokens they keep, and what relaxes that."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from redteam.catalog import BUILTIN, find, load
from targets.base import Knowledge
from targets.compression import (
    FastV,
    PruMerge,
    SparseVLM,
    TokenSparseAttention,
    VisionZip,
)
from targets.compression.base import Compressor
from targets.compression.pipeline import Pipeline
from targets.lvlm import LVLM
from targets.scenes import load_scenes, world

VARYING: list[Compressor] = [
    PruMerge(),
    PruMerge(plus=True),
    SparseVLM(variant="rank", retention=1.0),
    TokenSparseAttention(coverage=0.3),
]
SAMPLES = 12
PLAIN = {"drop_all": {"layer": 2}, "downsample": None, "pipeline": None}


@pytest.fixture(scope="module")
def target() -> LVLM:
    return load_scenes("scenes-a")


@pytest.fixture(scope="module")
def images() -> Tensor:
    drawn = world.samples("validation", SAMPLES)
    return torch.stack([torch.from_numpy(one.image).permute(2, 0, 1) for one in drawn]) / 255


QUESTIONS = tuple(one.question for one in world.samples("validation", SAMPLES))


def ranked(target: LVLM, compressor: Compressor, images: Tensor) -> Any:
    view: Any = target.view(Knowledge.COMPRESSED, compressor)
    return view.rank(images, QUESTIONS[: len(images)])


@pytest.mark.parametrize(
    "name", [one for one in BUILTIN["compressors"] if PLAIN.get(one, {}) is not None]
)
def test_a_fixed_budget_is_one_number_for_all_pictures(
    target: LVLM, images: Tensor, name: str
) -> None:
    options = PLAIN.get(name) or {"retention": 0.25}
    compressor = load(find("compressors", name))(**options)
    if name == "sparsevlm":
        compressor = SparseVLM(retention=0.25)
    answered = target.answer(images, QUESTIONS, compressor=compressor, max_new_tokens=1)
    assert answered.left is not None
    assert not compressor.count_varies
    assert len(set(answered.left.tolist())) == 1
    with torch.no_grad():
        assert ranked(target, compressor, images[:2]).soft_count is None


@pytest.mark.parametrize("compressor", VARYING, ids=repr)
def test_where_the_picture_decides_the_numbers_differ_and_have_a_gradient(
    target: LVLM, images: Tensor, compressor: Compressor
) -> None:
    assert compressor.count_varies
    live = images.clone().requires_grad_()
    found = ranked(target, compressor, live)
    hard = found.kept.sum(1)
    assert len(set(hard.tolist())) > 1
    assert found.soft_count.shape == hard.shape
    (gradient,) = torch.autograd.grad(found.soft_count.sum(), live)
    assert float(gradient.abs().amax((1, 2, 3)).min()) > 0


@pytest.mark.parametrize(
    "compressor", [one for one in VARYING if one.name != "sparsevlm"], ids=repr
)
def test_the_relaxation_rises_and_falls_with_the_number(
    target: LVLM, images: Tensor, compressor: Compressor
) -> None:
    with torch.no_grad():
        found = ranked(target, compressor, images)
    both = torch.stack([found.soft_count.double(), found.kept.sum(1).double()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.9


@pytest.mark.parametrize("compressor", VARYING, ids=repr)
def test_a_sharp_relaxation_is_the_number_itself(
    target: LVLM, images: Tensor, compressor: Compressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module(type(compressor).__module__), "_WIDTH", 1e-7)
    with torch.no_grad():
        found = ranked(target, compressor, images)
        soft, hard = found.soft_count, found.kept.sum(1)
    if isinstance(compressor, TokenSparseAttention):
        # One more than those below the coverage goes.
        assert torch.allclose(soft, hard + 1.0, atol=1e-2)
    elif isinstance(compressor, SparseVLM):
        # As many tokens as ranks allow: 13.5 for each rater, cut off to a whole number.
        assert bool((soft.long() == hard).all())
    elif compressor.plus:  # type: ignore[attr-defined]
        outliers = ranked(target, PruMerge(), images).kept.sum(1)
        assert torch.allclose(soft, 4.0 * outliers, atol=1e-2)
    else:
        assert torch.allclose(soft, hard.float(), atol=1e-2)


def test_a_pipeline_varies_if_a_part_does() -> None:
    fixed = Pipeline(stages=(VisionZip(retention=0.5), FastV(layer=2, retention=0.25)))
    assert not fixed.count_varies
    assert Pipeline(stages=(PruMerge(), FastV(layer=2, retention=0.25))).count_varies
    assert not PruMerge(retention=0.25).count_varies
    assert not TokenSparseAttention(retention=0.25).count_varies
    assert not TokenSparseAttention(coverage=0.0).count_varies
