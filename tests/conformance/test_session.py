"""Every compressor, installed in a model, does exactly what it says and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import made
import pytest
import stages
import tiny
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from targets.caches import cache_name
from targets.compression import FastV, Random, VisionZip, compress
from targets.compression.base import Compressor, Stage
from targets.errors import CompressionError

STEPS = 9  # prefill and 8 decode steps
CLOSE = {"rtol": 0, "atol": 5e-5}


def decode(model: Any, questions: tuple[str, ...], images: Tensor) -> Tensor:
    ids, mask, positions = tiny.prompt(questions)
    pixels = tiny.normalised(images)
    with torch.no_grad():
        return tiny.greedy(model, ids, mask, pixels, STEPS, positions)


def hooks(model: Any) -> int:
    modules = list(model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def test_keeping_everything_is_the_identity(model: Any, compressor: Compressor) -> None:
    images = tiny.pictures(3)
    plain = decode(model, tiny.QUESTIONS, images)
    with compress(model, tiny.whole(compressor)) as session:
        kept = decode(model, tiny.QUESTIONS, images)
    assert session.trace.kept is not None
    assert bool(session.trace.kept.all())
    assert torch.equal(plain, kept)


def test_dropped_tokens_equal_masked_ones(model: Any, compressor: Compressor) -> None:
    images = tiny.pictures(3)
    with compress(model, compressor) as hard:
        short = decode(model, tiny.QUESTIONS, images)
    with compress(model, compressor, mode="masked") as masked:
        full = decode(model, tiny.QUESTIONS, images)
    assert torch.equal(hard.trace.kept, masked.trace.kept)
    assert torch.allclose(short, full, **CLOSE)


def test_compression_changes_the_answer(model: Any, compressor: Compressor) -> None:
    """Without this, the tests of equality could pass on a session that does nothing."""
    images = tiny.pictures(3)
    plain = decode(model, tiny.QUESTIONS, images)
    with compress(model, compressor):
        short = decode(model, tiny.QUESTIONS, images)
    assert float((plain - short).abs().max()) > 1e-2


def test_padded_batch_equals_single_runs(model: Any, compressor: Compressor) -> None:
    images = tiny.pictures(3)
    seeds = (3, 4, 5)
    with compress(model, compressor, seeds=seeds) as batched:
        together = decode(model, tiny.QUESTIONS, images)
    for row, question in enumerate(tiny.QUESTIONS):
        with compress(model, compressor, seeds=seeds[row : row + 1]) as single:
            alone = decode(model, (question,), images[row : row + 1])
        assert torch.equal(batched.trace.kept[row], single.trace.kept[0])
        assert torch.allclose(together[row], alone[0], **CLOSE)


def test_generate_equals_decoding_by_hand(model: Any, compressor: Compressor) -> None:
    ids, mask, positions = tiny.prompt(tiny.QUESTIONS)
    pixels = tiny.normalised(tiny.pictures(3))
    with torch.no_grad(), compress(model, compressor):
        by_hand = tiny.greedy(model, ids, mask, pixels, STEPS, positions).argmax(-1)
    with compress(model, compressor):
        generated = model.generate(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=pixels,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
        )[:, ids.shape[1] :]
    end = model.generation_config.eos_token_id
    same = generated == by_hand
    # generate may not emit the end token before the minimum; up to there both agree.
    until = (by_hand == end).long().cumsum(1) == 0
    assert bool(same[until].all())
    assert int(until.sum()) > STEPS


def test_cache_holds_what_the_plan_says(sdpa: Any, compressor: Compressor) -> None:
    images, length = tiny.pictures(3), tiny.prompt(tiny.QUESTIONS)[0].shape[1]
    with compress(sdpa, compressor) as session:
        decode(sdpa, tiny.QUESTIONS, images)
    plan = [length - tiny.TOKENS + count for count in stages.plan(compressor, 4)]
    assert plan[-1] == length - tiny.TOKENS + tiny.QUARTER
    assert [session.trace.lengths[layer] for layer in range(4)] == plan
    held = [sdpa.last_cache.get_seq_length(layer) for layer in range(4)]
    assert held == [entries + STEPS - 1 for entries in plan]


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_fastv_score_is_the_slice_of_eager_attention(layer: int) -> None:
    model = tiny.build_model("eager")
    ids, mask, positions = tiny.prompt(tiny.QUESTIONS)
    pixels = tiny.normalised(tiny.pictures(3))
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        pixel_values=pixels,
        output_attentions=True,
    )
    row = out.attentions[layer - 1].mean(1)[:, -1]
    truth = torch.stack([row[b][ids[b] == 4] for b in range(3)])
    for one in (model, tiny.build_model("sdpa")):
        with compress(one, FastV(layer=layer, keep_tokens=9), mode="observe") as session:
            one(input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values=pixels)
        assert torch.allclose(session.trace.score, truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize("feature_layer", [-1, -2, 1, 3])
def test_visionzip_score_is_the_slice_of_eager_attention(feature_layer: int) -> None:
    model = tiny.build_model("eager", feature_layer=feature_layer)
    pixels = tiny.normalised(tiny.pictures(3))
    attentions = model.model.vision_tower(pixels, output_attentions=True).attentions
    index = feature_layer - 1 if feature_layer > 0 else feature_layer
    # hidden_states[-1] is made by the last layer, whose attention is attentions[-1].
    truth = attentions[index].sum(1)[:, 0, 1:]
    ids, mask, positions = tiny.prompt(tiny.QUESTIONS)
    with compress(model, VisionZip(keep_tokens=9)) as session:
        model(input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values=pixels)
    assert torch.allclose(session.trace.score, truth, rtol=0, atol=1e-6)


def by_hand(model: Any, ids: list[int], pixels: Tensor, one: Compressor, kept: Tensor) -> Tensor:
    """Logits of a whole sequence of one row, without cache, mask or session.

    The layers are called one after the other; at the cut the columns are picked out, and position
    ids written down anew.
    """
    row, text = torch.tensor([ids]), model.model.language_model
    tower = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    features, first = tower[0, 1:], ids.index(4)
    places = (kept.nonzero().flatten() + first).tolist()
    positions = list(range(len(ids)))
    if one.name == "visionzip":
        merged, targets = merged_by_hand(model, pixels, tower[0], kept)
        features = torch.cat([merged, torch.zeros(tiny.TOKENS - len(merged), 32)])
        for slot, place in enumerate([first, *places, *(first + t for t in targets)]):
            positions[first + slot] = place
        places = list(range(first, first + len(merged)))
    hidden = model.get_input_embeddings()(row)
    hidden[0, first : first + tiny.TOKENS] = model.model.multi_modal_projector(features)
    if one.name in made.METHODS:
        side, length = tiny.SIZE // tiny.PATCH, len(ids) - STEPS + 1
        tokens, sources = made.made_by_hand(model, ids, pixels, one, side, length)
        hidden[0, first : first + len(tokens)] = tokens
        positions[first : first + len(tokens)] = [first + source for source in sources]
        places = list(range(first, first + len(tokens)))
    survive = [*range(first), *places, *range(first + tiny.TOKENS, len(ids))]
    for number, layer in enumerate(text.layers):
        if number == (one.prunes_at or 0):
            hidden, positions = hidden[:, survive], [positions[i] for i in survive]
            if one.reindexes:
                positions = list(range(len(survive)))
        rope = text.rotary_emb(hidden, torch.tensor([positions]))
        length = hidden.shape[1]
        causal = torch.full((1, 1, length, length), torch.finfo(hidden.dtype).min).triu(1)
        hidden = layer(hidden, attention_mask=causal, position_embeddings=rope)
    return model.lm_head(text.norm(hidden))


def test_equals_calling_the_layers_by_hand(model: Any, compressor: Compressor) -> None:
    """An independent road for prefill and every decoding step, position ids included."""
    images = tiny.pictures(3)
    with compress(model, compressor, seeds=(3, 4, 5)) as session:
        ours = decode(model, tiny.QUESTIONS, images)
    for row, question in enumerate(tiny.QUESTIONS):
        ids = tiny.rendered(question) + ours[row, :-1].argmax(-1).tolist()
        pixels = tiny.normalised(images[row : row + 1])
        with torch.no_grad():
            if len(session.trace.cuts) > 1:
                truth = stages.by_hand(model, ids, pixels, compressor, session.trace, row)
            else:
                truth = by_hand(model, ids, pixels, compressor, session.trace.kept[row])
        assert torch.allclose(ours[row], truth[0, -STEPS:], **CLOSE)


@pytest.mark.parametrize("name", ["visionzip", "divprune"])
def test_pruning_before_the_model_equals_a_shorter_prompt(sdpa: Any, name: str) -> None:
    """Another road: compressed features behind a shortened run of placeholders."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    compressor, pixels = tiny.COMPRESSORS[name], tiny.normalised(tiny.pictures(2))
    ids, mask, _ = tiny.prompt(tiny.QUESTIONS[:1] * 2)
    with torch.no_grad(), compress(sdpa, compressor) as session:
        ours = sdpa(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    kept = session.trace.kept
    tower = sdpa.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    if name == "divprune":
        features = tower[:, 1:][kept].view(2, tiny.QUARTER, -1)
    else:
        features = torch.stack(
            [merged_by_hand(sdpa, pixels[i : i + 1], tower[i], kept[i])[0] for i in range(2)]
        )
    projected = sdpa.model.multi_modal_projector(features)
    first = int((ids[0] == 4).nonzero()[0])
    cut = [ids[:, : first + tiny.QUARTER], ids[:, first + tiny.TOKENS :]]
    with torch.no_grad():
        truth = sdpa(
            input_ids=torch.cat(cut, 1),  # contiguous positions: the reindexed form
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=list(projected))},
        ).logits
    assert ours.shape == truth.shape
    assert torch.allclose(ours, truth, **CLOSE)


def merged_by_hand(
    model: Any, pixels: Tensor, hidden: Tensor, kept: Tensor
) -> tuple[Tensor, list[int]]:
    """[CLS, dominant, contextual] of one image, token by token, and the targets."""
    attention = model.model.vision_tower.encoder.layers[-1].self_attn
    before = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    normed = model.model.vision_tower.encoder.layers[-1].layer_norm1(before)
    keys = attention.k_proj(normed)[0, 1:].view(tiny.TOKENS, 4, -1).mean(1)
    patches = hidden[1:]
    rest = [i for i in range(tiny.TOKENS) if not kept[i]]
    contextual = round(tiny.QUARTER / 6.4)
    targets = rest[:: len(rest) // contextual][:contextual]
    joined: dict[int, list[Tensor]] = {target: [] for target in targets}
    for i in rest:
        if i not in targets:
            near = [float(torch.cosine_similarity(keys[i], keys[t], dim=0)) for t in targets]
            joined[targets[near.index(max(near))]].append(patches[i])
    made = [patches[t] + (sum(joined[t]) / len(joined[t]) if joined[t] else 0) for t in targets]
    return torch.stack([hidden[0], *patches[kept], *made]), targets


def test_forced_selection_is_obeyed(model: Any, compressor: Compressor) -> None:
    images, others = tiny.pictures(3), tiny.pictures(3, seed=7)
    with compress(model, compressor, seeds=(7, 8, 9)) as there:
        decode(model, tiny.QUESTIONS, others)
    wanted = there.trace.selection
    for forced in (wanted, [wanted.row(i) for i in range(3)]):
        with compress(model, compressor, kept=forced) as here:
            short = decode(model, tiny.QUESTIONS, images)
        assert torch.equal(here.trace.kept, there.trace.kept)
    with compress(model, compressor, kept=wanted, mode="masked"):
        assert torch.allclose(short, decode(model, tiny.QUESTIONS, images), **CLOSE)
    if wanted.assignment is not None:
        assert torch.equal(here.trace.selection.assignment, wanted.assignment)


def test_forced_sets_of_different_sizes(model: Any, compressor: Compressor) -> None:
    images = tiny.pictures(3)
    kept = torch.rand(3, tiny.TOKENS, generator=torch.Generator().manual_seed(1)) < 0.3
    kept[1, ::2] = True
    counts = kept.sum(1).tolist()
    assert len(set(counts)) == 3
    with compress(model, compressor, kept=kept):
        short = decode(model, tiny.QUESTIONS, images)
    with compress(model, compressor, kept=kept, mode="masked"):
        assert torch.allclose(short, decode(model, tiny.QUESTIONS, images), **CLOSE)
    for row, question in enumerate(tiny.QUESTIONS):
        with compress(model, compressor, kept=kept[row : row + 1]):
            alone = decode(model, (question,), images[row : row + 1])
        assert torch.allclose(short[row], alone[0], **CLOSE)


def test_rows_with_two_images_one_and_none(model: Any, compressor: Compressor) -> None:
    rows = [tiny.rendered(tiny.QUESTIONS[0], n) for n in (2, 1, 0)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    pixels = tiny.normalised(tiny.pictures(3))
    with torch.no_grad(), compress(model, compressor, seeds=(5, 6, 7)) as session:
        together = tiny.greedy(model, ids, mask, pixels, STEPS, positions)
    assert session.trace.kept.shape == (3, tiny.TOKENS)
    assert session.trace.rows.tolist() == [0, 0, 1]
    with torch.no_grad(), compress(model, compressor, seeds=(5, 6, 7), mode="masked"):
        masked = tiny.greedy(model, ids, mask, pixels, STEPS, positions)
    assert torch.allclose(together, masked, **CLOSE)
    for row, pictures in enumerate((pixels[:2], pixels[2:], None)):
        alone_ids = torch.tensor([rows[row]])
        ones = torch.ones_like(alone_ids)
        with torch.no_grad(), compress(model, compressor, seeds=(5 + row,)) as single:
            alone = tiny.greedy(model, alone_ids, ones, pictures, STEPS, ones.cumsum(1) - 1)
        assert torch.allclose(together[row], alone[0], **CLOSE)
    assert single.trace.kept is None


def test_gathered_labels_follow_their_columns(sdpa: Any, compressor: Compressor) -> None:
    ids, mask, positions = tiny.prompt(tiny.QUESTIONS)
    with torch.no_grad(), compress(sdpa, compressor) as session:
        logits = sdpa(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            pixel_values=tiny.normalised(tiny.pictures(3)),
        ).logits
        labels = session.gather_labels(ids)
    assert labels.shape == logits.shape[:2]
    text = int((ids[0] == 4).nonzero()[-1]) + 1
    assert torch.equal(labels[:, text - ids.shape[1] :], ids[:, text:])
    live = session._groups[max(session._groups)].mask.bool()
    assert int(((labels == 4) & live).sum()) == 3 * tiny.QUARTER


def test_seeds_decide_per_row(sdpa: Any) -> None:
    images = tiny.pictures(1).expand(3, -1, -1, -1)
    for layer in (None, 2):
        compressor = Random(layer=layer, keep_tokens=9)
        with compress(sdpa, compressor, seeds=(1, 2, 1)) as first:
            decode(sdpa, tiny.QUESTIONS[:1] * 3, images)
        with compress(sdpa, compressor, seeds=(2, 9, 9)) as second:
            decode(sdpa, tiny.QUESTIONS[:1] * 3, images)
        one, two = first.trace.kept, second.trace.kept
        assert torch.equal(one[0], one[2])
        assert torch.equal(one[1], two[0])
        assert not torch.equal(one[0], one[1])


def test_one_session_generates_again_and_again(sdpa: Any, compressor: Compressor) -> None:
    images, others = tiny.pictures(3), tiny.pictures(3, seed=4)
    with compress(sdpa, compressor):
        first = decode(sdpa, tiny.QUESTIONS, images)
        decode(sdpa, tiny.QUESTIONS[::-1], others)
        again = decode(sdpa, tiny.QUESTIONS, images)
    assert torch.equal(first, again)


@pytest.mark.parametrize("mode", ["hard", "masked", "observe"])
def test_nothing_stays_behind(sdpa: Any, compressor: Compressor, mode: Any) -> None:
    decode(sdpa, tiny.QUESTIONS, tiny.pictures(3))  # transformers installs hooks of its own, once
    before, names = hooks(sdpa), set(sdpa.__dict__)
    if mode == "observe" and compressor.stage is Stage.TOWER:
        with pytest.raises(CompressionError, match="use mode rank"):
            compress(sdpa, compressor, mode=mode)
        return
    with compress(sdpa, compressor, mode=mode):
        decode(sdpa, tiny.QUESTIONS, tiny.pictures(3))
        assert hooks(sdpa) > before
    assert (hooks(sdpa), set(sdpa.__dict__)) == (before, names)
    assert "generate" not in sdpa.__dict__


@pytest.mark.parametrize(
    "where",
    [
        "model.vision_tower.encoder.layers.2.mlp",
        "model.multi_modal_projector.linear_2",
        "model.language_model.layers.0.mlp",
        "model.language_model.layers.3.self_attn",
        "lm_head",
    ],
)
def test_hooks_go_when_the_model_fails(sdpa: Any, compressor: Compressor, where: str) -> None:
    decode(sdpa, tiny.QUESTIONS, tiny.pictures(3))
    before, names = hooks(sdpa), set(sdpa.__dict__)
    plain = decode(sdpa, tiny.QUESTIONS, tiny.pictures(3))

    def fail(*_: object) -> None:
        raise RuntimeError("injected")

    handle = sdpa.get_submodule(where).register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="injected"), compress(sdpa, compressor):
            decode(sdpa, tiny.QUESTIONS, tiny.pictures(3))
    finally:
        handle.remove()
    assert (hooks(sdpa), set(sdpa.__dict__)) == (before, names)
    assert "generate" not in sdpa.__dict__
    assert torch.equal(plain, decode(sdpa, tiny.QUESTIONS, tiny.pictures(3)))


def test_hooks_go_when_entering_fails(sdpa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hooks(sdpa)
    session = compress(sdpa, VisionZip(keep_tokens=9))
    monkeypatch.setattr(session, "_layer_hook", lambda layer: 1 / 0)
    with pytest.raises(ZeroDivisionError), session:
        pass
    assert hooks(sdpa) == before
    with compress(sdpa, VisionZip(keep_tokens=9)):
        pass


def test_one_session_at_a_time(sdpa: Any) -> None:
    compressor = FastV(keep_tokens=9)
    with (
        compress(sdpa, compressor),
        pytest.raises(CompressionError, match="already inside"),
        compress(sdpa, compressor),
    ):
        pass
    with compress(sdpa, compressor):
        assert hooks(sdpa) > 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"prompt_lookup_num_tokens": 2}, "assisted decoding"),
    ],
)
def test_unsupported_decoding_is_refused(sdpa: Any, options: dict[str, Any], reason: str) -> None:
    ids, mask, _ = tiny.prompt(tiny.QUESTIONS[:1])
    with (
        compress(sdpa, FastV(keep_tokens=9)),
        pytest.raises(CompressionError, match=reason),
    ):
        sdpa.generate(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=tiny.normalised(tiny.pictures(1)),
            max_new_tokens=2,
            **options,
        )


def test_unsupported_caches_are_refused(sdpa: Any, compressor: Compressor) -> None:
    ids, _, _ = tiny.prompt(tiny.QUESTIONS[:1])
    pixels = tiny.normalised(tiny.pictures(1))
    with compress(sdpa, compressor):
        with pytest.raises(CompressionError, match="StaticCache"):
            sdpa(
                input_ids=ids,
                pixel_values=pixels,
                **{cache_name(): StaticCache(config=sdpa.config, max_cache_len=64)},
            )
        cache = DynamicCache(config=sdpa.config)
        sdpa(input_ids=ids, pixel_values=pixels, **{cache_name(): cache}, use_cache=True)
        cache.crop(-2)
        with pytest.raises(CompressionError, match="cropped"):
            sdpa(input_ids=ids[:, -1:], **{cache_name(): cache}, use_cache=True)


def test_layers_that_do_not_exist_are_refused(sdpa: Any) -> None:
    with pytest.raises(CompressionError, match="layers 0 to 3"):
        compress(sdpa, FastV(layer=4, retention=0.5))
    with pytest.raises(CompressionError, match="36 visual tokens"):
        compress(sdpa, Random(keep_tokens=37))


def test_encoder_outputs_from_outside_are_refused_by_visionzip(sdpa: Any) -> None:
    ids, _, _ = tiny.prompt(tiny.QUESTIONS[:1])
    encoded = sdpa.model.get_image_features(pixel_values=tiny.normalised(tiny.pictures(1)))
    with (
        compress(sdpa, VisionZip(keep_tokens=9)),
        pytest.raises(CompressionError, match="has not run inside this session"),
    ):
        sdpa(input_ids=ids, mm_encoder_outputs={"image": encoded})


@pytest.mark.parametrize("count", [1, 5])
def test_bfloat16_runs(compressor: Compressor, count: int) -> None:
    model = tiny.build_model("sdpa").to(torch.bfloat16)
    ids, mask, _ = tiny.prompt(tiny.texts(count))
    pixels = tiny.normalised(tiny.pictures(count)).to(torch.bfloat16)
    with compress(model, compressor) as session:
        made = model.generate(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=4
        )
    assert made.shape[0] == count
    assert session.trace.score.dtype == torch.float32
    assert bool(session.trace.score.isfinite().all())
    assert session.trace.tokens[3].tolist() == [tiny.QUARTER] * count


def test_scores_do_not_depend_on_grouped_keys() -> None:
    """Grouped-query attention and one key per head go through the same formula."""
    for kv_heads in (1, 2, 4):
        model = tiny.build_model("eager", kv_heads=kv_heads)
        ids, mask, positions = tiny.prompt(tiny.QUESTIONS)
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "pixel_values": tiny.normalised(tiny.pictures(3)),
        }
        truth = model(**inputs, output_attentions=True).attentions[1].mean(1)[:, -1]
        with compress(model, FastV(keep_tokens=9), mode="observe") as session:
            model(**inputs)
        ours = session.trace.score
        assert torch.allclose(ours, truth[ids == 4].view(3, -1), rtol=0, atol=1e-6)


def test_the_last_prompt_token_asks_even_before_an_answer(sdpa: Any) -> None:
    """Teacher forcing must rank like generation does, whatever the answer is."""
    ids, mask, positions = tiny.prompt(tiny.QUESTIONS)
    pixels = tiny.normalised(tiny.pictures(3))
    compressor = FastV(keep_tokens=9)
    with compress(sdpa, compressor) as prompt_only:
        sdpa(input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values=pixels)
    longer = torch.cat([ids, torch.tensor([[18, 20], [9, 0], [21, 22]])], 1)
    more = torch.cat([mask, torch.tensor([[1, 1], [1, 0], [1, 1]])], 1)
    with compress(sdpa, compressor, answer_columns=2) as forced:
        sdpa(
            input_ids=longer,
            attention_mask=more,
            position_ids=(more.cumsum(1) - 1).clamp_min(0),
            pixel_values=pixels,
        )
    assert torch.allclose(prompt_only.trace.score, forced.trace.score, rtol=0, atol=1e-6)
    assert torch.equal(prompt_only.trace.kept, forced.trace.kept)


def test_stages_are_where_they_say() -> None:
    stages = {name: one.stage for name, one in tiny.COMPRESSORS.items()}
    assert stages["fastv"] is stages["random inside"] is Stage.LAYER
    assert stages["divprune"] is stages["uniform"] is stages["random"] is Stage.INPUT
    assert stages["visionzip"] is Stage.VISION
    assert replace(tiny.COMPRESSORS["random"], layer=0).stage is Stage.LAYER


def test_layers_never_see_position_ids(sdpa: Any, compressor: Compressor) -> None:
    """FlashAttention would take position ids with gaps for packed sequences."""
    seen = []

    def spy(_: object, args: object, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"])

    layers = sdpa.model.language_model.layers
    handles = [one.self_attn.register_forward_pre_hook(spy, with_kwargs=True) for one in layers]
    try:
        with compress(sdpa, compressor):
            decode(sdpa, tiny.QUESTIONS, tiny.pictures(3))
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == 4 * STEPS
    assert set(seen) == {None}
