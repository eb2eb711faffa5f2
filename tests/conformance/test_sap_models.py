"""Safety-aware pruning inside real models: both parts know the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from decoded import (
    COMPRESSORS,
    FAMILIES,
    asked,
    check_forced,
    check_gradient,
    check_rows,
    pictures,
    plain_ids,
    spoken,
    target,
)
from torch import Tensor

from defenses import sap
from defenses.base import DefenseError
from defenses.sap import SAP, AttentionReallocation, Reallocated, safe_states
from targets.compression import FasterVLM, FastV, Random, VisionZip
from targets.compression.base import Compressor
from targets.decoding.run import DecodingRun
from targets.lvlm import LVLM

ONE_CUT: dict[str, Compressor] = {
    "fastv": FastV(layer=2, retention=0.4),
    "random": Random(retention=0.4),
}


@pytest.fixture(scope="module", params=FAMILIES)
def lvlm(request: pytest.FixtureRequest) -> LVLM:
    return target(request.param)


def begun(lvlm: LVLM, method: AttentionReallocation, one: Any) -> tuple[DecodingRun, Any]:
    run = lvlm._passes.decoder(method, one)
    with torch.no_grad():
        run._start()
    return run, run.branches[0]._attending


@pytest.mark.parametrize("compression", ["none", *ONE_CUT])
def test_at_nothing_it_is_the_compressor_alone(lvlm: LVLM, compression: str) -> None:
    restore, reallocate = SAP(rho=0, strength=0).parts()
    plain = ONE_CUT.get(compression)
    one = None if plain is None else restore.protect(plain, 7)
    assert torch.equal(spoken(lvlm, reallocate, asked(lvlm, one)), plain_ids(lvlm, plain))
    args = (pictures(lvlm), tiny.QUESTIONS, tiny.ANSWERS)
    with torch.no_grad():
        wanted, _ = lvlm._passes.answer_logprobs(*args, plain)
        found, _ = lvlm._passes.answer_logprobs(*args, one, decoding=reallocate)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", ONE_CUT)
@pytest.mark.parametrize("anchors", ["safety", "utility"])
def test_both_parts_together(lvlm: LVLM, kind: str, anchors: Any) -> None:
    restore, reallocate = SAP(rho=0.3, number=3, strength=0.9, anchors=anchors).parts()
    one = restore.protect(ONE_CUT[kind], 7)
    check_forced(lvlm, reallocate, one)
    check_rows(lvlm, reallocate, one)
    check_gradient(lvlm, reallocate, one)


@pytest.mark.parametrize("kind", ONE_CUT)
def test_the_decoding_part_knows_what_was_restored(lvlm: LVLM, kind: str) -> None:
    """The columns that get attention hold the tokens kept now that were not kept before."""
    restore, reallocate = SAP(rho=0.3, number=3).parts()
    plain, one = ONE_CUT[kind], restore.protect(ONE_CUT[kind], 7)
    how = {"seeds": (10, 11, 12), "max_new_tokens": 1}
    base = lvlm.answer(pictures(lvlm), tiny.QUESTIONS, compressor=plain, **how)
    found = lvlm.answer(pictures(lvlm), tiny.QUESTIONS, compressor=one, **how)
    assert base.kept is not None
    assert found.kept is not None
    run, attending = begun(lvlm, reallocate, asked(lvlm, one))
    for layer, columns in attending.known.items():
        if kind == "fastv" and layer < 2:
            continue
        for row in range(3):
            here = columns.restored[row][columns.visual[row]]
            kept = found.kept[row]
            assert torch.equal(here, ~base.kept[row][kept])
            assert int(here.sum()) == round(0.3 * int(kept.sum())) > 0
    if kind == "fastv":
        assert attending.known[0].restored is None
        assert set(run.branches[0].rule.anchors) == set(range(1, len(attending.known)))  # type: ignore[union-attr]
    for layer, anchors in run.branches[0].rule.anchors.items():  # type: ignore[union-attr]
        assert anchors.sum(1).tolist() == [3, 3, 3]
        assert not bool((anchors & ~attending.known[layer].visual).any())


@pytest.mark.parametrize("plain", [FasterVLM(keep_tokens=9), VisionZip(keep_tokens=12)])
def test_in_front_of_the_projector_too(plain: Compressor) -> None:
    lvlm = target("llava")
    restore, reallocate = SAP(rho=0.5, number=2).parts()
    one = restore.protect(plain, 3)
    check_forced(lvlm, reallocate, one)
    check_rows(lvlm, reallocate, one)
    base = lvlm.answer(pictures(lvlm), tiny.QUESTIONS, compressor=plain, max_new_tokens=1)
    found = lvlm.answer(
        pictures(lvlm), tiny.QUESTIONS, compressor=one, seeds=(10, 11, 12), max_new_tokens=1
    )
    fresh = (found.kept & ~base.kept).sum(1)  # type: ignore[operator]
    _, attending = begun(lvlm, reallocate, asked(lvlm, one))
    assert bool((fresh > 0).all())
    for columns in attending.known.values():
        assert torch.equal(columns.restored.sum(1), fresh)


def test_an_imposed_selection_says_itself_what_is_restored() -> None:
    """The swap test: of another picture's set, what this one's ranking would not keep."""
    lvlm = target("llava")
    restore, reallocate = SAP(rho=0.3, number=3).parts()
    plain = FastV(layer=2, keep_tokens=10)
    one = restore.protect(plain, 7)
    images = pictures(lvlm)
    first = lvlm.answer(images, tiny.QUESTIONS, compressor=one, decoding=reallocate)
    own = lvlm.answer(images.flip(0), tiny.QUESTIONS, compressor=plain, max_new_tokens=1)
    asking = asked(lvlm, one)
    imposed = type(asking)(
        images.flip(0), tiny.QUESTIONS, compressor=one, kept=first.selection, seeds=(10, 11, 12)
    )
    _, attending = begun(lvlm, reallocate, imposed)
    wanted = (first.kept & ~own.kept).sum(1)  # type: ignore[operator]
    assert torch.equal(attending.known[3].restored.sum(1), wanted)


@pytest.mark.parametrize("anchors", ["safety", "utility"])
def test_anchors_against_the_attention_of_transformers(anchors: Any) -> None:
    """MSA from the attention and hidden states that the model gives out; all layers."""
    lvlm = target("llava")
    model, family = lvlm.family.model, lvlm.family
    model.set_attn_implementation("eager")
    one = asked(lvlm, None, slice(0, 1))
    # So little strength that a layer's input is that of the model.
    method = AttentionReallocation(number=5, strength=1e-7, anchors=anchors)
    run, _ = begun(lvlm, method, one)
    prompt = run.branches[0].prompt
    inputs, _, _ = lvlm._passes.inputs(one.images)
    words = lvlm._passes.prompts.alone(method.instruction)
    with torch.no_grad():
        seen = model(
            input_ids=prompt.ids, output_attentions=True, output_hidden_states=True, **inputs
        )
        told = model(input_ids=words.ids, output_hidden_states=True)
    visual = [i for i, t in enumerate(prompt.ids[0].tolist()) if t == family.image_token_id]
    text = [i for i in range(prompt.ids.shape[1]) if i not in visual]
    for layer in range(len(family.layers)):
        score = {}
        for i in visual:
            heads = seen.attentions[layer][0, :, text, i]
            score[i] = float(heads.mean())
            if anchors == "safety":
                v, safe = seen.hidden_states[layer][0, i], told.hidden_states[layer][0, -1]
                score[i] *= 1 - float(torch.cosine_similarity(v, safe, dim=0))
        best = sorted(visual, key=lambda i: -score[i])[:5]
        found = run.branches[0].rule.anchors[layer][0]  # type: ignore[union-attr]
        assert found.nonzero().flatten().tolist() == sorted(best)
    assert torch.allclose(
        safe_states(lvlm._passes, method.instruction)[2], told.hidden_states[2][0, -1], atol=1e-5
    )


def test_every_row_of_attention_keeps_its_mass(lvlm: LVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[Tensor] = []
    moved: list[float] = []
    real = sap.reallocated

    def spy(weights: Tensor, anchors: Tensor, to: Tensor, strength: float) -> Tensor:
        found = real(weights, anchors, to, strength)
        sums.append(found.sum(-1).flatten())
        moved.append(float((found - weights).abs().amax()))
        return found

    monkeypatch.setattr(sap, "reallocated", spy)
    restore, reallocate = SAP(rho=0.3, number=3).parts()
    one = restore.protect(ONE_CUT["fastv"], 7)
    for compressor in (None, one):
        spoken(lvlm, reallocate, asked(lvlm, compressor), 4)
    whole = torch.cat(sums)
    torch.testing.assert_close(whole, torch.ones_like(whole))
    assert min(moved) > 0


def test_more_anchors_than_tokens_are_all_tokens() -> None:
    lvlm = target("llava")
    restore, reallocate = SAP(rho=0.2, number=1000).parts()
    one = restore.protect(FastV(layer=2, keep_tokens=5), 7)
    run, attending = begun(lvlm, reallocate, asked(lvlm, one))
    rule = run.branches[0].rule
    assert isinstance(rule, Reallocated)
    assert torch.equal(rule.anchors[4], attending.known[4].visual)
    check_forced(lvlm, reallocate, one)
    # Without restored tokens nobody is left who could be given anything.
    found = spoken(lvlm, reallocate, asked(lvlm, None))
    assert torch.equal(found, plain_ids(lvlm, None))


def test_the_safety_instruction_runs_once_for_a_model() -> None:
    lvlm = target("llava")
    runs: list[int] = []
    handle = lvlm.family.layers[0].register_forward_hook(lambda *_: runs.append(1))
    method = AttentionReallocation()
    for _ in range(3):
        lvlm._passes.decoder(method, asked(lvlm, None))
    handle.remove()
    assert len(runs) == 1
    lvlm._passes.decoder(AttentionReallocation(anchors="utility"), asked(lvlm, None))
    assert len(runs) == 1


def test_a_run_of_ones_own_says_what_is_missing() -> None:
    lvlm = target("llava")
    method = AttentionReallocation()
    run = lvlm._passes.decoder(method, asked(lvlm, None))
    run.branches[0]._attending.rule = method.attention()  # type: ignore[union-attr, assignment]
    with pytest.raises(DefenseError, match=r"begins with method\.foresee"), torch.no_grad():
        run._start()


def test_it_goes_with_pyramids_only_unprotected() -> None:
    lvlm = target("llava")
    restore, reallocate = SAP(number=3).parts()
    with pytest.raises(DefenseError, match="drops tokens at"):
        restore.protect(COMPRESSORS["pyramiddrop"])  # type: ignore[arg-type]
    check_rows(lvlm, reallocate, COMPRESSORS["pyramiddrop"])
