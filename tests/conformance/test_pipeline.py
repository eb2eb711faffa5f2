"""Compressors one after the other act as each would on what the one before has left."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from targets.compression import DivPrune, FastV, PyramidDrop, Random, Uniform, VisionZip, compress
from targets.compression.base import Compressor
from targets.compression.pipeline import Pipeline
from targets.errors import CompressionError

CLOSE = {"rtol": 0, "atol": 2e-5}
STEPS = 5
PIPELINES: dict[str, tuple[Compressor, ...]] = {
    "merged, then cut inside": (VisionZip(keep_tokens=18), FastV(layer=2, keep_tokens=9)),
    "merged and kept, then cut": (
        VisionZip(keep_tokens=18, positions="keep"),
        FastV(layer=1, keep_tokens=7, positions="reindex"),
    ),
    "twice before the model": (DivPrune(keep_tokens=24), Uniform(keep_tokens=10)),
    "three times": (
        Uniform(keep_tokens=30, positions="keep"),
        FastV(layer=1, keep_tokens=20),
        Random(layer=3, keep_tokens=6, positions="reindex"),
    ),
    "twice at one layer": (Random(layer=2, keep_tokens=20), FastV(layer=2, keep_tokens=9)),
}


@pytest.fixture(params=list(PIPELINES))
def parts(request: pytest.FixtureRequest) -> tuple[Compressor, ...]:
    return PIPELINES[request.param]


def decode(model: Any, questions: tuple[str, ...], images: Tensor) -> Tensor:
    ids, mask, positions = tiny.prompt(questions)
    with torch.no_grad():
        return tiny.greedy(model, ids, mask, tiny.normalised(images), STEPS, positions)


def test_dropped_tokens_equal_masked_ones(sdpa: Any, parts: tuple[Compressor, ...]) -> None:
    images = tiny.pictures(3)
    with compress(sdpa, parts) as hard:
        short = decode(sdpa, tiny.QUESTIONS, images)
    with compress(sdpa, parts, mode="masked") as masked:
        full = decode(sdpa, tiny.QUESTIONS, images)
    assert torch.equal(hard.trace.kept, masked.trace.kept)
    assert torch.allclose(short, full, **CLOSE)
    with compress(sdpa, parts[:1]):
        once = decode(sdpa, tiny.QUESTIONS, images)
    assert float((once - short).abs().max()) > 1e-2


def test_padded_batch_equals_single_runs(sdpa: Any, parts: tuple[Compressor, ...]) -> None:
    images, seeds = tiny.pictures(3), (3, 4, 5)
    with compress(sdpa, parts, seeds=seeds):
        together = decode(sdpa, tiny.QUESTIONS, images)
    for row, question in enumerate(tiny.QUESTIONS):
        with compress(sdpa, parts, seeds=seeds[row : row + 1]):
            alone = decode(sdpa, (question,), images[row : row + 1])
        assert torch.allclose(together[row], alone[0], **CLOSE)


def test_forced_selections_of_all_cuts_are_obeyed(sdpa: Any, parts: tuple[Compressor, ...]) -> None:
    images, others = tiny.pictures(3), tiny.pictures(3, seed=7)
    with compress(sdpa, parts, seeds=(7, 8, 9)) as there:
        decode(sdpa, tiny.QUESTIONS, others)
    wanted = there.trace.selection
    assert len(wanted.later) == len(parts) - 1
    for forced in (wanted, [wanted.row(i) for i in range(3)]):
        with compress(sdpa, parts, kept=forced) as here:
            decode(sdpa, tiny.QUESTIONS, images)
        assert torch.equal(here.trace.kept, there.trace.kept)
    with (
        compress(sdpa, parts, kept=_uniform(sdpa)),
        pytest.raises(CompressionError, match="knows 1 cuts"),
    ):
        decode(sdpa, tiny.QUESTIONS, images)


def _uniform(model: Any) -> Any:
    with compress(model, Uniform(keep_tokens=30)) as session:
        decode(model, tiny.QUESTIONS, tiny.pictures(3))
    return session.trace.selection


def test_lengths_follow_the_stages(sdpa: Any) -> None:
    length = tiny.prompt(tiny.QUESTIONS)[0].shape[1] - tiny.TOKENS
    with compress(sdpa, PIPELINES["three times"]) as session:
        decode(sdpa, tiny.QUESTIONS, tiny.pictures(3))
    lengths = [session.trace.lengths[layer] - length for layer in range(4)]
    assert lengths == [30, 20, 20, 6]
    assert [session.trace.tokens[layer].tolist() for layer in range(4)] == [
        [kept] * 3 for kept in lengths
    ]
    held = [sdpa.last_cache.get_seq_length(layer) for layer in range(4)]
    assert held == [kept + length + STEPS - 1 for kept in lengths]


def test_a_merging_stage_hands_its_tokens_on(sdpa: Any) -> None:
    """The second stage ranks what the first one made, wherever it stands."""
    images = tiny.pictures(3)
    with compress(sdpa, PIPELINES["merged, then cut inside"]) as session:
        decode(sdpa, tiny.QUESTIONS, images)
    second = session.trace.cuts[1]
    assert second.seen.valid.sum(1).tolist() == [18] * 3
    assert second.selection.kept.sum(1).tolist() == [9] * 3
    assert bool((second.selection.kept <= second.seen.valid).all())
    dominant = session.trace.cuts[0].selection.kept
    assert bool((session.trace.kept <= dominant).all())
    assert int(session.trace.kept.sum()) <= 27


def test_stages_out_of_order_are_refused(sdpa: Any) -> None:
    with pytest.raises(CompressionError, match="not in the order they act"):
        compress(sdpa, (FastV(keep_tokens=9), VisionZip(keep_tokens=9)))
    with pytest.raises(CompressionError, match="at least one"):
        Pipeline(stages=())


def test_methods_with_several_cuts_interleave(sdpa: Any) -> None:
    """A cut in between belongs to the other method; the order of the list decides nothing there."""
    staged, single = PyramidDrop(layers=(1, 3), keep_tokens=6), FastV(layer=2, keep_tokens=10)
    images = tiny.pictures(3)
    found = []
    for parts in ((staged, single), (single, staged)):
        with compress(sdpa, parts) as session:
            found.append(decode(sdpa, tiny.QUESTIONS, images))
        assert [cut.seen.cut.layer for cut in session.trace.cuts] == [1, 2, 3]
        assert [cut.seen.cut.by for cut in session.trace.cuts] == [staged, single, staged]
        assert session.trace.tokens[3].tolist() == [6] * 3
    assert torch.equal(*found)


def test_one_stage_is_that_compressor(sdpa: Any) -> None:
    images = tiny.pictures(3)
    with compress(sdpa, FastV(keep_tokens=9)):
        plain = decode(sdpa, tiny.QUESTIONS, images)
    with compress(sdpa, [FastV(keep_tokens=9)]):
        assert torch.equal(plain, decode(sdpa, tiny.QUESTIONS, images))
