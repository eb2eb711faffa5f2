"""Compression of Qwen2-VL, Qwen2.5-VL and Qwen3-VL does exactly what it says and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import qwen, qwen2_5_vl, qwen2_vl, qwen3_vl
from families.qwen_runs import (
    STEPS,
    by_hand,
    decode,
    merged_by_hand,
    positions_of,
    single,
    with_tokens,
)

from targets.compression import DivPrune, FastV, Random, Uniform, VisionZip, compress
from targets.compression.base import Compressor

CLOSE = {"rtol": 0, "atol": 4e-5}
BUILT = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}
COMPRESSORS: dict[str, Compressor] = {
    "random at the first layer": Random(layer=0, retention=0.3, positions="reindex"),
    "fastv": FastV(layer=2, retention=0.3),
    "fastv reindexed": FastV(layer=1, retention=0.3, positions="reindex"),
    "visionzip": VisionZip(retention=0.5),
    "visionzip kept": VisionZip(retention=0.5, positions="keep"),
    "divprune": DivPrune(retention=0.3),
    "divprune kept": DivPrune(keep_tokens=5, positions="keep"),
    "random inside": Random(layer=3, retention=0.3),
    "uniform": Uniform(retention=0.3),
}
PLAIN = sorted(name for name, one in COMPRESSORS.items() if not one.merges)
BATCHES = {name: qwen.inputs(qwen2_vl.build_processor(), rows) for name, rows in qwen.CASES.items()}


EACH = [("qwen2_vl", "sdpa"), ("qwen2_5_vl", "eager"), ("qwen3_vl", "sdpa"), ("qwen3_vl", "eager")]


@pytest.fixture(scope="module", params=EACH, ids="-".join)
def model(request: pytest.FixtureRequest) -> Any:
    name, attention = request.param
    return BUILT[name].build_model(attention)


@pytest.fixture(scope="module", params=BUILT)
def sdpa(request: pytest.FixtureRequest) -> Any:
    return BUILT[request.param].build_model("sdpa")


@pytest.fixture(params=sorted(COMPRESSORS))
def compressor(request: pytest.FixtureRequest) -> Compressor:
    return COMPRESSORS[request.param]


def hooks(model: Any) -> int:
    modules = list(model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", BUILT)
def test_keeping_everything_is_the_identity(name: str, attention: str) -> None:
    """Position ids are left as they are; consecutive ones are others than those of a grid."""
    model = BUILT[name].build_model(attention)
    plain = decode(model, BATCHES["mixed"])
    for one in COMPRESSORS.values():
        everything = replace(one, keep_tokens=None, retention=1.0, positions="keep")
        with compress(model, everything) as session:
            kept = decode(model, BATCHES["mixed"])
        assert session.trace.kept is not None
        assert torch.equal(plain, kept)


def test_text_alone_is_left_alone(sdpa: Any, compressor: Compressor) -> None:
    plain = decode(sdpa, BATCHES["text only"])
    with compress(sdpa, compressor):
        assert torch.equal(plain, decode(sdpa, BATCHES["text only"]))


@pytest.mark.parametrize("case", ["padded", "mixed"])
def test_dropped_tokens_equal_masked_ones(model: Any, compressor: Compressor, case: str) -> None:
    plain = decode(model, BATCHES[case])
    with compress(model, compressor, seeds=(3, 4, 5)) as hard:
        short = decode(model, BATCHES[case])
    with compress(model, compressor, seeds=(3, 4, 5), mode="masked") as masked:
        full = decode(model, BATCHES[case])
    assert torch.equal(hard.trace.kept, masked.trace.kept)
    assert torch.allclose(short, full, **CLOSE)
    # Otherwise a session that does nothing would pass.
    assert float((plain - short).abs().max()) > 1e-2


@pytest.mark.parametrize("case", ["padded", "mixed"])
def test_padded_batch_equals_single_runs(sdpa: Any, compressor: Compressor, case: str) -> None:
    """Rows with pictures of other sizes, two pictures, or none do not disturb each other."""
    batch, seeds = BATCHES[case], (3, 4, 5)
    with compress(sdpa, compressor, seeds=seeds) as batched:
        together = decode(sdpa, batch)
    image = 0
    for row in range(3):
        with compress(sdpa, compressor, seeds=seeds[row : row + 1]) as alone:
            assert torch.allclose(together[row], decode(sdpa, single(batch, row))[0], **CLOSE)
        for kept in alone.trace.kept if alone.trace.kept is not None else ():
            assert torch.equal(batched.trace.kept[image, : len(kept)], kept)
            assert not bool(batched.trace.kept[image, len(kept) :].any())
            image += 1
    assert image == len(batched.trace.kept)


@pytest.mark.parametrize("one", [DivPrune(keep_tokens=12), VisionZip(keep_tokens=12)])
def test_a_row_kept_whole_does_not_depend_on_its_batch(sdpa: Any, one: Compressor) -> None:
    """Its picture has 12 tokens, all of which stay; those of the others do not."""
    with compress(sdpa, one):
        together = decode(sdpa, BATCHES["padded"])
        alone = decode(sdpa, single(BATCHES["padded"], 2))
    assert torch.allclose(together[2], alone[0], **CLOSE)


@pytest.mark.parametrize("name", PLAIN)
def test_equals_calling_the_layers_by_hand(model: Any, name: str) -> None:
    """An independent road for prefill and every decoding step, position ids included."""
    compressor, batch = COMPRESSORS[name], BATCHES["two images"]
    with compress(model, compressor, seeds=(3,)) as session:
        ours = decode(model, batch)
    longer = with_tokens(batch, ours[:, :-1].argmax(-1))
    truth = by_hand(model, longer, compressor, session.trace)
    assert torch.allclose(ours[0], truth[0, -STEPS:], **CLOSE)


@pytest.mark.parametrize("name", ["visionzip", "visionzip kept"])
def test_merging_equals_calling_the_layers_by_hand(model: Any, name: str) -> None:
    """A merged token has the position and the DeepStack features of the one it was made around."""
    compressor, batch = COMPRESSORS[name], BATCHES["one image"]
    with compress(model, compressor) as session:
        ours = decode(model, batch)
    assert int((session.trace.selection.targets >= 0).sum()) > 0
    longer = with_tokens(batch, ours[:, :-1].argmax(-1))
    truth = merged_by_hand(model, longer, compressor, session.trace)
    assert torch.allclose(ours[0], truth[0, -STEPS:], **CLOSE)


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
@pytest.mark.parametrize("positions", ["keep", "reindex"])
def test_deepstack_follows_a_cut_at_any_layer(layer: int, positions: Any) -> None:
    """For K = 1 and 2 features are added to what is left; the rows differ in what that is."""
    model = qwen3_vl.build_model("eager")
    compressor = FastV(layer=layer, retention=0.3, positions=positions)
    for name in ("padded", "mixed"):
        with compress(model, compressor):
            short = decode(model, BATCHES[name])
        with compress(model, compressor, mode="masked"):
            assert torch.allclose(short, decode(model, BATCHES[name]), **CLOSE)
    with compress(model, compressor) as session:
        out = model(**BATCHES["two images"]).logits
    assert session.trace.lengths[layer] < session.trace.lengths[layer - 1]
    truth = by_hand(model, BATCHES["two images"], compressor, session.trace)
    assert torch.allclose(out[:, -1], truth[:, -1], **CLOSE)


def test_deepstack_matters_in_the_fixture() -> None:
    """Without its features the answer is another, so the tests above would see them missing."""
    model = qwen3_vl.build_model()
    plain = model(**BATCHES["one image"]).logits
    model.model.language_model._deepstack_process = lambda hidden, *_: hidden
    assert float((model(**BATCHES["one image"]).logits - plain).abs().max()) > 0.1


def test_generate_equals_decoding_by_hand(model: Any, compressor: Compressor) -> None:
    """`generate` counts four rows of position ids and remembers where text goes on."""
    batch = BATCHES["mixed"]
    with compress(model, compressor, seeds=(3, 4, 5)):
        logits = decode(model, batch)
    with compress(model, compressor, seeds=(3, 4, 5)):
        out = model.generate(
            **batch,
            max_new_tokens=STEPS,
            do_sample=False,
            eos_token_id=-1,
            output_logits=True,
            return_dict_in_generate=True,
        )
    made = out.sequences[:, batch["input_ids"].shape[1] :]
    assert torch.equal(made, logits.argmax(-1))
    assert torch.allclose(torch.stack(out.logits, 1), logits, **CLOSE)


def test_the_model_counts_positions_itself(sdpa: Any, compressor: Compressor) -> None:
    batch = BATCHES["padded"]
    with torch.no_grad(), compress(sdpa, compressor):
        given = sdpa(**batch, position_ids=positions_of(sdpa, batch)).logits
        assert torch.equal(given, sdpa(**batch).logits)


def test_cache_holds_what_the_plan_says(sdpa: Any, compressor: Compressor) -> None:
    batch = BATCHES["one image"]
    with compress(sdpa, compressor) as session:
        decode(sdpa, batch)
    length = batch["input_ids"].shape[1]
    short = length - 15 + compressor.budget(15)
    start = compressor.prunes_at or 0
    plan = [length] * start + [short] * (5 - start)
    assert [session.trace.lengths[layer] for layer in range(5)] == plan
    held = [sdpa.last_cache.get_seq_length(layer) for layer in range(5)]
    assert held == [entries + STEPS - 1 for entries in plan]


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("name", BUILT)
def test_fastv_score_is_the_slice_of_eager_attention(name: str, layer: int) -> None:
    eager, batch = BUILT[name].build_model("eager"), BATCHES["padded"]
    out = eager(**batch, output_attentions=True)
    row = out.attentions[layer - 1].mean(1)[:, -1]
    for model in (eager, BUILT[name].build_model("sdpa")):
        with compress(model, FastV(layer=layer, retention=0.3), mode="observe") as session:
            model(**batch)
        for image in range(3):
            truth = row[image][batch["input_ids"][image] == qwen.IMAGE]
            ours = session.trace.score[image, : len(truth)]
            assert torch.allclose(ours, truth, rtol=0, atol=1e-6)
            assert float(truth.amax() / truth.mean()) > 1.5, "too flat to test anything"


def test_nothing_stays_behind(sdpa: Any, compressor: Compressor) -> None:
    batch, text = BATCHES["padded"], sdpa.model.language_model
    decode(sdpa, batch, 2)  # transformers installs hooks of its own, once
    before, names = hooks(sdpa), (set(sdpa.__dict__), set(text.__dict__))
    with compress(sdpa, compressor):
        decode(sdpa, batch, 2)
        assert hooks(sdpa) > before
    assert (hooks(sdpa), (set(sdpa.__dict__), set(text.__dict__))) == (before, names)


@pytest.mark.parametrize(
    "where", ["model.visual.merger", "model.language_model.layers.1.mlp", "lm_head"]
)
@pytest.mark.parametrize("name", ["fastv", "visionzip"])
def test_hooks_go_when_the_model_fails(sdpa: Any, name: str, where: str) -> None:
    compressor = COMPRESSORS[name]
    batch, text = BATCHES["padded"], sdpa.model.language_model
    plain = decode(sdpa, batch, 2)
    before, names = hooks(sdpa), set(text.__dict__)

    def fail(*_: object) -> None:
        raise RuntimeError("injected")

    handle = sdpa.get_submodule(where).register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="injected"), compress(sdpa, compressor):
            decode(sdpa, batch, 2)
    finally:
        handle.remove()
    assert (hooks(sdpa), set(text.__dict__)) == (before, names)
    assert torch.equal(plain, decode(sdpa, batch, 2))


@pytest.mark.parametrize("name", BUILT)
def test_bfloat16_runs(name: str) -> None:
    model = BUILT[name].build_model().to(torch.bfloat16)
    batch = {**BATCHES["mixed"]}
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    for compressor in COMPRESSORS.values():
        with compress(model, compressor) as session:
            made = model.generate(**batch, max_new_tokens=4, do_sample=False)
        assert made.shape[0] == 3
        assert session.trace.score.dtype == torch.float32
        assert bool(session.trace.score.isfinite().all())
