"""Compression of LLaVA-NeXT and OneVision does exactly what it says and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import llava_onevision
from families.anyres_runs import (
    BATCHES,
    BUILT,
    CLOSE,
    COMPRESSORS,
    IMAGE,
    PLAIN,
    ROWS,
    STEPS,
    batch_of,
    by_hand,
    decode,
    single,
    suited,
)
from torch import Tensor

from targets.compression import FastV, compress
from targets.compression.base import Compressor
from targets.errors import CompressionError
from targets.families import family_of
from targets.preprocessing import Layout


@pytest.fixture(scope="module", params=[(n, a) for n in BUILT for a in ("sdpa", "eager")])
def model(request: pytest.FixtureRequest) -> Any:
    name, attention = request.param
    return BUILT[name].build_model(attention)


@pytest.fixture(scope="module", params=BUILT)
def sdpa(request: pytest.FixtureRequest) -> Any:
    return BUILT[request.param].build_model("sdpa")


@pytest.fixture(params=sorted(COMPRESSORS))
def compressor(request: pytest.FixtureRequest) -> Compressor:
    return COMPRESSORS[request.param]


def whole(one: Compressor) -> Compressor:
    return replace(one, keep_tokens=None, retention=1.0)  # type: ignore[type-var]


def hooks(model: Any) -> int:
    modules = list(model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def test_keeping_everything_is_the_identity(model: Any, compressor: Compressor) -> None:
    for case in ("one image", "mixed", "padded"):
        batch = batch_of(model, case)
        plain = decode(model, batch)
        with compress(model, whole(compressor)) as session:
            kept = decode(model, batch)
        assert session.trace.kept is not None
        assert torch.equal(plain, kept)


def test_text_alone_is_left_alone(sdpa: Any, compressor: Compressor) -> None:
    plain = decode(sdpa, batch_of(sdpa, "text only"))
    with compress(sdpa, compressor):
        assert torch.equal(plain, decode(sdpa, batch_of(sdpa, "text only")))


def test_dropped_tokens_equal_masked_ones(model: Any, compressor: Compressor) -> None:
    for case in suited(model, compressor, ("padded", "two images", "mixed")):
        plain = decode(model, batch_of(model, case))
        with compress(model, compressor, seeds=(3, 4, 5)) as hard:
            short = decode(model, batch_of(model, case))
        with compress(model, compressor, seeds=(3, 4, 5), mode="masked") as masked:
            full = decode(model, batch_of(model, case))
        assert torch.equal(hard.trace.kept, masked.trace.kept)
        assert torch.allclose(short, full, **CLOSE)
        # Otherwise a session that does nothing would pass.
        assert float((plain - short).abs().max()) > 1e-2


def test_padded_batch_equals_single_runs(sdpa: Any, compressor: Compressor) -> None:
    """Rows with pictures of other sizes, two pictures, or none do not disturb each other."""
    seeds = (3, 4, 5)
    for case in suited(sdpa, compressor, ("padded", "mixed")):
        batch, rows = batch_of(sdpa, case), ROWS[case]
        with compress(sdpa, compressor, seeds=seeds) as batched:
            together = decode(sdpa, batch)
        image = 0
        for row in range(len(rows)):
            with compress(sdpa, compressor, seeds=seeds[row : row + 1]) as alone:
                made = decode(sdpa, single(batch, rows, row))
            assert torch.allclose(together[row], made[0], **CLOSE)
            for kept in alone.trace.kept if alone.trace.kept is not None else ():
                width = min(len(kept), batched.trace.kept.shape[1])
                assert torch.equal(batched.trace.kept[image, :width], kept[:width])
                assert not bool(batched.trace.kept[image, width:].any())
                image += 1
        assert image == len(batched.trace.kept)


def layouts_of(model: Any, batch: dict[str, Any]) -> list[Layout]:
    return list(family_of(model).images(batch["input_ids"] == IMAGE, batch))


def columns_dropped(model: Any, batch: dict[str, Any], kept: Tensor) -> list[int]:
    """Columns of one row's image tokens that are not kept; newlines never go."""
    places, dropped = (batch["input_ids"][0] == IMAGE).nonzero().flatten(), []
    for number, one in enumerate(layouts_of(model, batch)):
        here, places = places[: one.placeholders], places[one.placeholders :]
        dropped += here[one.columns][~kept[number, : one.tokens]].tolist()
    return dropped


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("case", ["one image", "two images"])
def test_equals_calling_the_layers_by_hand(model: Any, name: str, case: str) -> None:
    """An independent road for prefill and every decoding step, position ids included."""
    compressor, batch = COMPRESSORS[name], batch_of(model, case)
    with compress(model, compressor, seeds=(3,)) as session:
        ours = decode(model, batch)
    longer = torch.cat([batch["input_ids"], ours[:, :-1].argmax(-1)], 1)
    dropped = columns_dropped(model, batch, session.trace.kept)
    truth = by_hand(model, batch, longer, compressor, dropped)
    assert len(dropped) >= 8
    assert torch.allclose(ours[0], truth[0, -STEPS:], **CLOSE)


def test_generate_equals_decoding_by_hand(model: Any, compressor: Compressor) -> None:
    """`generate` encodes pictures before the first forward and forgets their sizes."""
    for case in suited(model, compressor, ("padded", "mixed")):
        batch = batch_of(model, case)
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


def test_cache_holds_what_the_plan_says(sdpa: Any, compressor: Compressor) -> None:
    batch = batch_of(sdpa, "one image")
    with compress(sdpa, compressor) as session:
        decode(sdpa, batch)
    length = batch["input_ids"].shape[1]
    # The base and two tiles have 27 tokens, and there are three newlines.
    short = length - 27 + compressor.budget(27) - 3 * compressor.drops_separators
    start = compressor.prunes_at or 0
    plan = [length] * start + [short] * (5 - start)
    assert [session.trace.lengths[layer] for layer in range(5)] == plan
    held = [sdpa.last_cache.get_seq_length(layer) for layer in range(5)]
    assert held == [entries + STEPS - 1 for entries in plan]


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("name", BUILT)
def test_fastv_score_is_the_slice_of_eager_attention(name: str, layer: int) -> None:
    eager, batch = BUILT[name].build_model("eager"), BATCHES[name, "padded"]
    image = batch["input_ids"] == IMAGE
    layouts = layouts_of(eager, batch)
    mask = batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out = eager(**batch, position_ids=positions, output_attentions=True)
    row = out.attentions[layer - 1].mean(1)[:, -1]
    for model in (eager, BUILT[name].build_model("sdpa")):
        with compress(model, FastV(layer=layer, retention=0.3), mode="observe") as session:
            model(**batch, position_ids=positions)
        for number, one in enumerate(layouts):
            truth = row[number][image[number]][one.columns]
            ours = session.trace.score[number, : one.tokens]
            assert torch.allclose(ours, truth, rtol=0, atol=1e-6)
            assert float(truth.amax() / truth.mean()) > 1.5, "too flat to test anything"


def test_merging_is_refused_where_tokens_are_interpolated() -> None:
    """Only there: a picture over the limit is mixed behind the projector."""
    model = llava_onevision.build_model()
    for mode in ("hard", "masked"):
        with (
            pytest.raises(CompressionError, match="interpolates them behind the projector"),
            compress(model, COMPRESSORS["visionzip"], mode=mode),
        ):
            decode(model, BATCHES["llava_onevision", "padded"], 2)
    with compress(model, COMPRESSORS["visionzip"]):  # and the next picture is taken again
        decode(model, BATCHES["llava_onevision", "one image"], 2)


def test_nothing_stays_behind(sdpa: Any, compressor: Compressor) -> None:
    batch, core = batch_of(sdpa, "one image"), sdpa.model
    decode(sdpa, batch, 2)  # transformers installs hooks of its own, once
    before, names = hooks(sdpa), (set(sdpa.__dict__), set(core.__dict__))
    with compress(sdpa, compressor):
        decode(sdpa, batch, 2)
        assert hooks(sdpa) > before
    assert (hooks(sdpa), (set(sdpa.__dict__), set(core.__dict__))) == (before, names)


@pytest.mark.parametrize(
    "where", ["model.multi_modal_projector", "model.language_model.layers.1.mlp", "lm_head"]
)
def test_hooks_go_when_the_model_fails(sdpa: Any, compressor: Compressor, where: str) -> None:
    batch, core = batch_of(sdpa, "one image"), sdpa.model
    plain = decode(sdpa, batch, 2)
    before, names = hooks(sdpa), set(core.__dict__)

    def fail(*_: object) -> None:
        raise RuntimeError("injected")

    handle = sdpa.get_submodule(where).register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="injected"), compress(sdpa, compressor):
            decode(sdpa, batch, 2)
    finally:
        handle.remove()
    assert (hooks(sdpa), set(core.__dict__)) == (before, names)
    assert torch.equal(plain, decode(sdpa, batch, 2))


@pytest.mark.parametrize("name", BUILT)
def test_bfloat16_runs(name: str, compressor: Compressor) -> None:
    model = BUILT[name].build_model().to(torch.bfloat16)
    (case,) = suited(model, compressor, ("mixed",))[:1]
    batch = dict(batch_of(model, case))
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    with compress(model, compressor) as session:
        made = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert made.shape[0] == len(ROWS[case])
    assert session.trace.score.dtype == torch.float32
    assert bool(session.trace.score.isfinite().all())
