"""PaliGemma, PaliGemma 2 and Gemma 3 under compression: prefixes, image blocks, windows hold."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from families import gemma
from families.gemma_runs import (
    CLOSE,
    KINDS,
    PICKED,
    STEPS,
    Kind,
    batch,
    by_hand,
    greedy,
    model_of,
)

from targets.caches import cache_name
from targets.compression import FastV, compress
from targets.compression.base import Compressor, Stage


@pytest.fixture(scope="module", params=sorted(KINDS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def kind(name: str) -> Kind:
    return KINDS[name]


@pytest.fixture
def model(name: str) -> Any:
    return model_of(name)


@pytest.fixture(params=sorted(PICKED))
def compressor(request: pytest.FixtureRequest) -> Compressor:
    return PICKED[request.param]


def test_keeping_everything_is_the_identity(model: Any, kind: Kind, compressor: Compressor) -> None:
    inputs = batch(kind, gemma.CASES["mixed"])
    plain = greedy(model, kind, inputs)
    with compress(model, tiny.whole(compressor)) as session:
        kept = greedy(model, kind, inputs)
    assert session.trace.kept is not None
    assert bool(session.trace.kept.all())
    if kind.window is None:
        assert torch.equal(plain, kept)
    else:  # the cache forgets nothing here, so kernels add up in another order
        assert torch.allclose(plain, kept, **CLOSE)


def test_dropped_tokens_equal_masked_ones(model: Any, kind: Kind, compressor: Compressor) -> None:
    inputs = batch(kind, gemma.CASES["mixed"])
    with compress(model, compressor) as hard:
        short = greedy(model, kind, inputs)
    with compress(model, compressor, mode="masked") as masked:
        full = greedy(model, kind, inputs)
    assert torch.equal(hard.trace.kept, masked.trace.kept)
    assert torch.allclose(short, full, **CLOSE)
    assert float((greedy(model, kind, inputs) - short).abs().max()) > 1e-2


def test_padded_batch_equals_single_runs(model: Any, kind: Kind, compressor: Compressor) -> None:
    rows = gemma.CASES["mixed"]
    seeds = tuple(range(3, 3 + len(rows)))
    with compress(model, compressor, seeds=seeds) as batched:
        together = greedy(model, kind, batch(kind, rows))
    kept = []
    for number, row in enumerate(rows):
        with compress(model, compressor, seeds=seeds[number : number + 1]) as single:
            alone = greedy(model, kind, batch(kind, (row,)))
        assert torch.allclose(together[number], alone[0], **CLOSE)
        kept += [] if single.trace.kept is None else [single.trace.kept]
    assert torch.equal(batched.trace.kept, torch.cat(kept))


WITHOUT_MERGING = sorted(name for name, one in PICKED.items() if not one.merges)


@pytest.mark.parametrize("method", WITHOUT_MERGING)
def test_equals_calling_the_layers_by_hand(model: Any, kind: Kind, method: str) -> None:
    """An independent road for masks, windows, rotary tables and position ids."""
    one, inputs = PICKED[method], batch(kind, gemma.CASES["two images"])
    with compress(model, one) as session:
        ours = greedy(model, kind, inputs)
    answer = ours[0, :-1].argmax(-1).tolist()
    truth = by_hand(model, kind, inputs, answer, one, session.trace.kept)
    assert torch.allclose(ours[0], truth[0, -STEPS:], **CLOSE)


def test_generate_equals_decoding_by_hand(model: Any, kind: Kind, compressor: Compressor) -> None:
    inputs = batch(kind, gemma.CASES["padded"])
    with compress(model, compressor):
        truth = greedy(model, kind, inputs).argmax(-1)
    with compress(model, compressor):
        made = model.generate(**inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
    made = made[:, inputs["input_ids"].shape[1] :]
    until = (truth == gemma.END).long().cumsum(1) == 0
    assert bool((made == truth)[until].all())
    assert int(until.sum()) > STEPS


def test_cache_holds_what_the_plan_says(model: Any, kind: Kind, compressor: Compressor) -> None:
    inputs = batch(kind, gemma.CASES["padded"])
    with compress(model, compressor) as session:
        greedy(model, kind, inputs)
    length, layers = inputs["input_ids"].shape[1], len(model.model.language_model.layers)
    start = compressor.prunes_at or 0
    plan = [length] * start + [length - tiny.TOKENS + tiny.QUARTER] * (layers - start)
    assert [session.trace.lengths[layer] for layer in range(layers)] == plan
    held = [model.last_cache.layers[layer].keys.shape[2] for layer in range(layers)]
    assert held == [entries + STEPS - 1 for entries in plan]


def test_hooks_and_answers_are_as_before_after_an_error(model: Any, kind: Kind) -> None:
    inputs = batch(kind, gemma.CASES["one image"])

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before, plain = hooks(), greedy(model, kind, inputs, 3)

    def fail() -> None:
        with compress(model, FastV(keep_tokens=9)):
            assert hooks() > before
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert hooks() == before
    assert torch.equal(greedy(model, kind, inputs, 3), plain)


def test_a_cache_the_model_makes_itself_can_be_decoded_from(model: Any, kind: Kind) -> None:
    inputs = batch(kind, gemma.CASES["one image"])
    with torch.no_grad(), compress(model, FastV(keep_tokens=9)):
        truth = greedy(model, kind, inputs, 2)
        out = model(**inputs, use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
        last = mask.shape[1] - 1 + kind.first
        step = model(
            input_ids=token,
            attention_mask=mask,
            position_ids=torch.tensor([[last]]),
            **{cache_name(): getattr(out, cache_name())},
        )
    assert torch.allclose(out.logits[:, -1], truth[:, 0], **CLOSE)
    assert torch.allclose(step.logits[:, -1], truth[:, 1], **CLOSE)


def test_every_stage_is_met() -> None:
    stages = {one.stage for one in PICKED.values()}
    assert {Stage.VISION, Stage.INPUT, Stage.LAYER} <= stages
