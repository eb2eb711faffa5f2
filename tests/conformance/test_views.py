"""Views grant what a threat model grants, agree with one another, and run no more than needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from targets.base import (
    CompressedView,
    EncoderView,
    ImageView,
    Knowledge,
    WhiteBoxView,
)
from targets.compression import AttentiveRemoval, FastV, VisionZip, ZooPrune
from targets.compression.base import Compressor, Stage
from targets.errors import KnowledgeError, TargetError
from targets.lvlm import LVLM

CALLS = {
    "encode": Knowledge.ENCODER,
    "rank": Knowledge.COMPRESSED,
    "answer_nll": Knowledge.WHITE_BOX,
    "answer_logprobs": Knowledge.WHITE_BOX,
    "full_and_rank": Knowledge.WHITE_BOX,
    "path_margins": Knowledge.WHITE_BOX,
}
ORDER = [Knowledge.NONE, Knowledge.ENCODER, Knowledge.COMPRESSED, Knowledge.WHITE_BOX]


@pytest.fixture(scope="module")
def target() -> LVLM:
    return LVLM(tiny.build_model(), tiny.build_processor())


@contextmanager
def calls_of(modules: dict[str, nn.Module]) -> Iterator[dict[str, int]]:
    counts = dict.fromkeys(modules, 0)

    def counter(name: str) -> Any:
        def hook(*_: object) -> None:
            counts[name] += 1

        return hook

    handles = [m.register_forward_hook(counter(name)) for name, m in modules.items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def parts(model: Any) -> dict[str, nn.Module]:
    core = model.model
    found = {"patches": core.vision_tower.embeddings.patch_embedding}
    found |= {f"vision {i}": m.mlp for i, m in enumerate(core.vision_tower.encoder.layers)}
    found |= {"projector": core.multi_modal_projector, "head": model.lm_head}
    found |= {f"text {i}": m.mlp for i, m in enumerate(core.language_model.layers)}
    return found


@pytest.mark.parametrize("knowledge", ORDER)
@pytest.mark.parametrize("call", sorted(CALLS))
def test_views_deny_what_they_must(target: LVLM, knowledge: Knowledge, call: str) -> None:
    view: Any = target.view(knowledge, FastV(keep_tokens=9))
    assert view.knowledge is knowledge
    if ORDER.index(knowledge) >= ORDER.index(CALLS[call]):
        assert callable(getattr(view, call))
        return
    with pytest.raises(KnowledgeError, match=CALLS[call].value) as caught:
        getattr(view, call)
    assert knowledge.value in str(caught.value)
    assert not hasattr(view, call)


def test_views_are_the_protocols(target: LVLM) -> None:
    protocols = [ImageView, EncoderView, CompressedView, WhiteBoxView]
    for place, knowledge in enumerate(ORDER):
        view = target.view(knowledge, FastV(keep_tokens=9))
        assert [isinstance(view, one) for one in protocols] == [i <= place for i in range(4)]


@pytest.mark.parametrize("knowledge", ORDER)
def test_the_model_is_out_of_reach(target: LVLM, knowledge: Knowledge) -> None:
    view: Any = target.view(knowledge, FastV(keep_tokens=9))
    for name in ("model", "target", "_model", "_passes", "_target", "family", "tokenizer"):
        with pytest.raises(KnowledgeError, match="no knowledge grants it"):
            getattr(view, name)
    seen = [getattr(view, name) for name in dir(view) if not name.startswith("__")]
    assert not any(isinstance(value, nn.Module | LVLM) for value in seen)
    owners = [getattr(value, "__self__", view) for value in seen]
    assert all(owner is view for owner in owners)


def test_white_box_without_the_compressor(target: LVLM) -> None:
    view: Any = target.view(Knowledge.WHITE_BOX)
    images = tiny.pictures(3)
    assert view.answer_nll(images, tiny.QUESTIONS, tiny.ANSWERS).shape == (3,)
    for call in (
        lambda: view.rank(images, tiny.QUESTIONS),
        lambda: view.full_and_rank(images, tiny.QUESTIONS, tiny.ANSWERS),
        lambda: view.path_margins(images, tiny.QUESTIONS, tiny.ANSWERS),
        lambda: view.answer_nll(images, tiny.QUESTIONS, tiny.ANSWERS, path="compressed"),
        lambda: view.answer_logprobs(images, tiny.QUESTIONS, tiny.ANSWERS, path="compressed"),
    ):
        with pytest.raises(KnowledgeError, match="does not know the compression"):
            call()
    with pytest.raises(KnowledgeError, match="compressor"):
        target.view(Knowledge.COMPRESSED)


def test_knowledge_of_other_models_grants_no_view(target: LVLM) -> None:
    with pytest.raises(KnowledgeError, match="no view of the target"):
        target.view(Knowledge.SURROGATE, FastV(keep_tokens=9))


def test_rank_agrees_with_answering(model: Any, compressor: Compressor) -> None:
    target = LVLM(model, tiny.build_processor())
    view: Any = target.view(Knowledge.WHITE_BOX, compressor)
    images = tiny.pictures(3)
    ranking = view.rank(images, tiny.QUESTIONS)
    answered = target.answer(images, tiny.QUESTIONS, compressor=compressor)
    first = torch.cat([selection.kept for selection in answered.selection])
    assert torch.equal(ranking.kept, first)
    assert torch.allclose(ranking.score, answered.score, rtol=0, atol=1e-6)
    logprobs, real, shared = view.full_and_rank(images, tiny.QUESTIONS, tiny.ANSWERS)
    plain, mask = view.answer_logprobs(images, tiny.QUESTIONS, tiny.ANSWERS)
    assert torch.allclose(logprobs, plain, rtol=0, atol=1e-6)
    assert torch.equal(real, mask)
    for name in ("score", "log_score", "features", "query", "keys", "kept"):
        one, two = getattr(ranking, name), getattr(shared, name)
        assert (one is None) == (two is None)
        if one is not None:
            assert torch.allclose(one.float(), two.float(), rtol=0, atol=1e-5), name


def test_queries_and_keys_explain_the_score(target: LVLM) -> None:
    """Softmax over the visual tokens of q·k is the score, up to one factor per head and row."""
    images = tiny.pictures(3)
    for compressor in (FastV(keep_tokens=9), VisionZip(keep_tokens=9)):
        view: Any = target.view(Knowledge.COMPRESSED, compressor)
        ranking = view.rank(images, tiny.QUESTIONS)
        width = ranking.query.shape[-1]
        logits = (ranking.keys * ranking.query[:, :, None]).sum(-1) / width**0.5
        assert logits.shape == (3, 4, tiny.TOKENS)
        shares = logits.softmax(-1)
        spread = [float((shares[:, :, i] / shares[:, :, 0]).std()) for i in (1, 2)]
        assert min(spread) > 0
        low, high = shares.amin(1), shares.amax(1)
        total = ranking.score / ranking.score.sum(1, keepdim=True)
        assert bool(((total >= low - 1e-6) & (total <= high + 1e-6)).all())


def probes(compressor: Compressor) -> int:
    """How often a compressor runs the projector to find out about it."""
    if not isinstance(compressor, ZooPrune):
        return 0
    return compressor.directions * (2 if compressor.estimate == "difference" else 1)


def looks(compressor: Compressor) -> int:
    """How often a compressor runs the whole tower's perceptrons before the pass that counts."""
    return int(isinstance(compressor, AttentiveRemoval))


@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_rank_runs_nothing_behind_the_ranking_point(
    compressor: Compressor, feature_layer: int
) -> None:
    model = tiny.build_model(feature_layer=feature_layer)
    view: Any = LVLM(model, tiny.build_processor()).view(Knowledge.COMPRESSED, compressor)
    images = tiny.pictures(3)
    with calls_of(parts(model)) as counts:
        view.rank(images, tiny.QUESTIONS)
    reached = next(cut for cut in compressor.cuts(4) if cut.drops).reads or 0
    expected = {"patches": 1, "projector": 1 + probes(compressor), "head": 0}
    deepest = max((3 + feature_layer, *compressor.tower_layers(3, 3 + feature_layer)))
    expected |= {f"vision {i}": int(i <= deepest) + looks(compressor) for i in range(3)}
    expected |= {f"text {i}": int(i < reached) for i in range(4)}
    assert counts == expected
    with calls_of(parts(model)) as counts:
        view.encode(images)
    expected |= {f"text {i}": 0 for i in range(4)} | {"projector": 0}
    expected |= {f"vision {i}": int(i < 4 + feature_layer) for i in range(3)}
    assert counts == expected


def test_everything_runs_once_in_a_shared_pass(compressor: Compressor) -> None:
    model = tiny.build_model()
    view: Any = LVLM(model, tiny.build_processor()).view(Knowledge.WHITE_BOX, compressor)
    with calls_of(parts(model)) as counts:
        view.full_and_rank(tiny.pictures(3), tiny.QUESTIONS, tiny.ANSWERS)
    # Where the tower is shortened inside, another one ranks than the one that answers.
    towers = 1 + int(compressor.stage is Stage.TOWER)
    seen = {name: counts.pop(name) for name in [*counts] if name.startswith("vision")}
    assert set(seen.values()) == {towers + looks(compressor)}
    assert counts.pop("patches") == towers
    assert counts.pop("projector") == towers + probes(compressor)
    assert set(counts.values()) == {1}
    with calls_of(parts(model)) as counts:
        view.answer_nll(
            tiny.pictures(3),
            tiny.QUESTIONS,
            tiny.ANSWERS,
            path="compressed",
            straight_through=True,
        )
    # New tokens that were made in front of the projector go through it as well.
    again = int(compressor.merges and compressor.stage is Stage.VISION)
    assert counts.pop("projector") - probes(compressor) in {1, 1 + again}
    seen = {name: counts.pop(name) for name in [*counts] if name.startswith("vision")}
    assert set(seen.values()) == {1 + looks(compressor)}
    assert set(counts.values()) == {1}


def test_encode_is_the_tower(target: LVLM) -> None:
    view: Any = target.view(Knowledge.ENCODER)
    images = tiny.pictures(3)
    seen = view.encode(images)
    tower = tiny.build_model("eager").model.vision_tower
    out = tower(tiny.normalised(images), output_hidden_states=True, output_attentions=True)
    assert torch.allclose(seen.features, out.hidden_states[-1][:, 1:], rtol=0, atol=1e-5)
    truth = out.attentions[-1].mean(1)[:, 0, 1:]
    assert torch.allclose(seen.score, truth, rtol=0, atol=1e-6)


def test_nll_is_the_mean_over_real_tokens(model: Any, compressor: Compressor) -> None:
    view: Any = LVLM(model, tiny.build_processor()).view(Knowledge.WHITE_BOX, compressor)
    images = tiny.pictures(3)
    for path in ("full", "compressed"):
        logprobs, real = view.answer_logprobs(images, tiny.QUESTIONS, tiny.ANSWERS, path=path)
        assert logprobs.shape == (3, 3, len(tiny.WORDS))
        assert real.tolist() == [[True, True, False], [True, True, False], [True, True, True]]
        assert torch.allclose(logprobs.exp().sum(-1), torch.ones(3, 3), atol=1e-5)
        nll = view.answer_nll(images, tiny.QUESTIONS, tiny.ANSWERS, path=path)
        for row, answer in enumerate(tiny.ANSWERS):
            words = [tiny.WORDS.index(word) for word in answer.split()] + [2]
            truth = -sum(float(logprobs[row, i, word]) for i, word in enumerate(words)) / len(words)
            assert float(nll[row]) == pytest.approx(truth, abs=1e-5)
            alone = view.answer_nll(
                images[row : row + 1], tiny.QUESTIONS[row : row + 1], (answer,), path=path
            )
            assert float(alone) == pytest.approx(float(nll[row]), abs=1e-4)


def test_nll_is_that_of_the_model_itself(target: LVLM) -> None:
    """Against a plain forward of the library, one unpadded row at a time."""
    view: Any = target.view(Knowledge.WHITE_BOX)
    images = tiny.pictures(3)
    nll = view.answer_nll(images, tiny.QUESTIONS, tiny.ANSWERS)
    model = tiny.build_model("eager")
    for row, (question, answer) in enumerate(zip(tiny.QUESTIONS, tiny.ANSWERS, strict=True)):
        prompt = tiny.rendered(question)
        words = [tiny.WORDS.index(word) for word in answer.split()] + [2]
        ids = torch.tensor([prompt + words])
        logits = model(input_ids=ids, pixel_values=tiny.normalised(images[row : row + 1])).logits
        logprobs = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        truth = -sum(float(logprobs[i, word]) for i, word in enumerate(words)) / len(words)
        assert float(nll[row]) == pytest.approx(truth, abs=1e-4)


def test_mismatched_batches_are_refused(target: LVLM) -> None:
    view: Any = target.view(Knowledge.WHITE_BOX, FastV(keep_tokens=9))
    with pytest.raises(TargetError, match="3 images with 2 questions"):
        view.rank(tiny.pictures(3), tiny.QUESTIONS[:2])
    with pytest.raises(TargetError, match="1 answers"):
        view.answer_nll(tiny.pictures(3), tiny.QUESTIONS, ("yes",))


@pytest.mark.parametrize("size", [(48, 48), (60, 90), (33, 48), (96, 24)])
def test_tokens_cover_pixels(target: LVLM, size: tuple[int, int]) -> None:
    view = target.view(Knowledge.NONE)
    tokens = torch.zeros(2, tiny.TOKENS, dtype=torch.bool)
    tokens[0, 7] = True
    tokens[1] = True
    pixels = view.token_mask_to_pixels(tokens, size)
    assert pixels.shape == (2, 1, *size)
    assert set(pixels.unique().tolist()) <= {0.0, 1.0}
    if size == (48, 48):
        rows, columns = pixels[0, 0].nonzero().unbind(1)
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 15, 8, 15)
        assert bool((pixels[1] == 1).all())
    # A pixel belongs to a token if brightening it changes that token's part of the input.
    preprocess = target._passes.preprocess
    images = torch.full((1, 3, *size), 0.5)
    moved = (images + 0.4 * pixels[:1]).clamp(0, 1)
    change = (preprocess(moved) - preprocess(images)).abs().sum(1)[0]
    inside = change[8:16, 8:16].sum()
    assert float(inside / change.sum()) > 0.75
