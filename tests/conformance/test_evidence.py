"""Evidence maps, the horizon and the measured pace on the tiny LLaVA."""

from __future__ import annotations

import pytest
import tiny
import torch

from targets.compression import DropAll, FastV, VisionZip, compress
from targets.compression.pipeline import Pipeline
from targets.costs import Dimensions, prefill_macs
from targets.evidence import evidence_map, find_horizon
from targets.lvlm import LVLM


@pytest.fixture(scope="module")
def target() -> LVLM:
    return LVLM(tiny.build_model(), tiny.build_processor())


def by_hand(target: LVLM, kept: list[int], layer: int) -> float:
    """Probability of the answer when the layers from `layer` on see only some image tokens."""
    model = target.family.model
    image = tiny.WORDS.index("<image>")
    prompt = [1, *[image] * tiny.TOKENS, *map(tiny.WORDS.index, tiny.QUESTIONS[0].split())]
    reply = [tiny.WORDS.index("yes"), 2]
    row = torch.tensor([prompt + reply[:-1]])
    hidden = model.get_input_embeddings()(row)
    tower = model.model.vision_tower(
        tiny.normalised(tiny.pictures(1)), output_hidden_states=True
    ).hidden_states[-1]
    hidden[0, 1 : 1 + tiny.TOKENS] = model.model.multi_modal_projector(tower[0, 1:])
    positions = torch.arange(row.shape[1])
    text = model.model.language_model
    for number, block in enumerate(text.layers):
        if number == layer:
            stay = [0, *(1 + k for k in kept), *range(1 + tiny.TOKENS, row.shape[1])]
            hidden, positions = hidden[:, stay], positions[stay]
        rope = text.rotary_emb(hidden, positions[None])
        length = hidden.shape[1]
        causal = torch.full((1, 1, length, length), torch.finfo(hidden.dtype).min).triu(1)
        hidden = block(hidden, attention_mask=causal, position_embeddings=rope)
    logprobs = model.lm_head(text.norm(hidden))[0, -len(reply) :].log_softmax(-1)
    return float(sum(logprobs[i, token] for i, token in enumerate(reply)).exp())


@pytest.mark.parametrize("layer", [0, 2])
def test_the_map_is_what_hand_made_removal_gives(target: LVLM, layer: int) -> None:
    image = tiny.pictures(1)
    with torch.no_grad():
        found = evidence_map(target, image, tiny.QUESTIONS[0], "yes", layer=layer, batch=7)
        full = by_hand(target, list(range(tiny.TOKENS)), layer)
        none = by_hand(target, [], layer)
        assert (found.full, found.none) == (
            pytest.approx(full, abs=1e-5),
            pytest.approx(none, abs=1e-5),
        )
        for token in (0, 13, 35):
            only = by_hand(target, [token], layer)
            rest = by_hand(target, [k for k in range(tiny.TOKENS) if k != token], layer)
            assert float(found.only[token]) == pytest.approx(only - none, abs=1e-5)
            assert float(found.without[token]) == pytest.approx(full - rest, abs=1e-5)
    assert found.only.shape == found.without.shape == (tiny.TOKENS,)


def test_the_horizon_follows_the_losses(target: LVLM) -> None:
    images = tiny.pictures(3)
    batches = [
        (images[:2], tiny.QUESTIONS[:2], tiny.ANSWERS[:2]),
        (images[2:], tiny.QUESTIONS[2:], tiny.ANSWERS[2:]),
    ]
    found = find_horizon(target, batches, tolerance=0.01)
    full = target.answer_logprob(images, tiny.QUESTIONS, tiny.ANSWERS)
    for layer in range(4):
        blind = target.answer_logprob(
            images, tiny.QUESTIONS, tiny.ANSWERS, compressor=DropAll(layer=layer)
        )
        assert found.loss[layer] == pytest.approx(float((full - blind).mean()), abs=1e-5)
    assert found.samples == 3
    everything = find_horizon(target, batches, tolerance=1e9)
    assert everything.layer == 0
    nothing = find_horizon(target, batches, tolerance=-1e9)
    assert nothing.layer == 4


def test_all_tokens_are_gone_behind_the_layer(target: LVLM) -> None:
    ids, mask, positions = tiny.prompt(tiny.QUESTIONS)
    model, pixels = target.family.model, tiny.normalised(tiny.pictures(3))
    with torch.no_grad(), compress(model, DropAll(layer=1)) as session:
        model(input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values=pixels)
    text = ids.shape[1] - tiny.TOKENS
    assert [session.trace.lengths[i] for i in range(4)] == [ids.shape[1], text, text, text]
    assert not bool(session.trace.kept.any())


@pytest.mark.parametrize(
    "compressor",
    [
        None,
        FastV(layer=2, keep_tokens=9),
        Pipeline(stages=(VisionZip(keep_tokens=18), FastV(layer=3, keep_tokens=5))),
    ],
)
def test_pace_counts_what_ran(target: LVLM, compressor: object) -> None:
    found = target.measure(tiny.pictures(3), tiny.QUESTIONS, compressor=compressor, steps=2)
    length = tiny.prompt(tiny.QUESTIONS)[0].shape[1]
    visual = [36, 36, 36, 36]
    if isinstance(compressor, FastV):
        visual = [36, 36, 9, 9]
    elif compressor is not None:
        visual = [18, 18, 18, 5]
    assert found.visual == tuple(visual)
    assert found.lengths == tuple(length - 36 + kept for kept in visual)
    size = Dimensions.of(target.family.text.config)
    assert found.macs == 3 * prefill_macs(found.lengths, size)
    # Keys and values, 2 heads of 8 numbers of 4 bytes, 3 rows.
    assert found.cache_bytes == sum(found.lengths) * 2 * 16 * 4 * 3
    assert found.prefill_seconds > found.ranking_seconds >= 0
    assert found.decode_seconds > 0
