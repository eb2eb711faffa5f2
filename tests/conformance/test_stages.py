"""Variants of methods with several cuts that keep other counts than the rows of `tiny`."""

from __future__ import annotations

from typing import Any

import pytest
import stages
import tiny
import torch
from torch import Tensor

from targets.compression import (
    DivPrune,
    PyramidDrop,
    SparseVLM,
    TransPrune,
    VASparse,
    VisionDrop,
    compress,
)
from targets.compression.base import Compressor

STEPS = 5
CLOSE = {"rtol": 0, "atol": 5e-5}
VARIANTS: dict[str, Compressor] = {
    "rank": SparseVLM(retention=0.9, variant="rank", rank_scale=2.5),
    "rank, whole budget": SparseVLM(retention=1.0, variant="rank", rank_scale=4.0),
    "rank, no clusters": SparseVLM(retention=0.9, variant="rank", rank_scale=4, recycling=False),
    "plus with clusters": SparseVLM(retention=0.4, variant="v2.0", recycling=True),
    "published list": SparseVLM(keep_tokens=12, budget_is="official"),
    "average": PyramidDrop(keep_tokens=24, budget_is="average"),
    "one stage": SparseVLM(keep_tokens=9, layers=(2,)),
    "two stages": VisionDrop(keep_tokens=9, layers=(2,)),
    "shares": TransPrune(keep_tokens=9, shares=(0.6, 0.5), direction="absolute"),
    "logits": VASparse(keep_tokens=9, score_space="logit", aggregate="sum"),
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Compressor:
    return VARIANTS[request.param]


def decode(model: Any, questions: tuple[str, ...], images: Tensor) -> Tensor:
    ids, mask, positions = tiny.prompt(questions)
    with torch.no_grad():
        return tiny.greedy(model, ids, mask, tiny.normalised(images), STEPS, positions)


def test_variants_mask_what_they_drop(model: Any, variant: Compressor) -> None:
    images = tiny.pictures(3)
    plain = decode(model, tiny.QUESTIONS, images)
    with compress(model, variant) as session:
        hard = decode(model, tiny.QUESTIONS, images)
    with compress(model, variant, mode="masked"):
        masked = decode(model, tiny.QUESTIONS, images)
    assert torch.allclose(hard, masked, **CLOSE)
    assert float((plain - hard).abs().max()) > 1e-2
    counts = [session.trace.tokens[layer] for layer in range(4)]
    most = stages.plan(variant, 4)
    assert all(bool((found <= limit).all()) for found, limit in zip(counts, most, strict=True))
    if getattr(variant, "variant", "") != "rank":
        assert [found.tolist() for found in counts] == [[limit] * 3 for limit in most]


def test_variants_treat_rows_as_if_alone(sdpa: Any, variant: Compressor) -> None:
    images = tiny.pictures(3)
    with compress(sdpa, variant) as batch:
        together = decode(sdpa, tiny.QUESTIONS, images)
    for row, question in enumerate(tiny.QUESTIONS):
        with compress(sdpa, variant) as single:
            alone = decode(sdpa, (question,), images[row : row + 1])
        assert torch.equal(batch.trace.kept[row], single.trace.kept[0])
        assert torch.allclose(together[row], alone[0], **CLOSE)


def test_variants_equal_calling_the_layers_by_hand(sdpa: Any, variant: Compressor) -> None:
    images = tiny.pictures(3)
    with compress(sdpa, variant) as session:
        ours = decode(sdpa, tiny.QUESTIONS, images)
    for row, question in enumerate(tiny.QUESTIONS):
        ids = tiny.rendered(question) + ours[row, :-1].argmax(-1).tolist()
        pixels = tiny.normalised(images[row : row + 1])
        with torch.no_grad():
            truth = stages.by_hand(sdpa, ids, pixels, variant, session.trace, row)
        assert torch.allclose(ours[row], truth[0, -STEPS:], **CLOSE)


def test_the_rank_rule_keeps_different_numbers(sdpa: Any) -> None:
    with compress(sdpa, VARIANTS["rank, no clusters"]) as session:
        decode(sdpa, tiny.QUESTIONS, tiny.pictures(3))
    assert len(set(session.trace.tokens[1].tolist())) > 1


def test_a_stage_before_the_model_and_several_inside(model: Any) -> None:
    """Shares are of the uncompressed image, and a later part never brings tokens back."""
    parts = [DivPrune(keep_tokens=20), PyramidDrop(keep_tokens=6)]
    with compress(model, parts) as session:
        hard = decode(model, tiny.QUESTIONS, tiny.pictures(3))
    with compress(model, parts, mode="masked"):
        masked = decode(model, tiny.QUESTIONS, tiny.pictures(3))
    assert torch.allclose(hard, masked, **CLOSE)
    inside = stages.plan(parts[1], 4)
    counts = [session.trace.tokens[layer].tolist() for layer in range(4)]
    assert counts == [[min(20, count)] * 3 for count in inside]
