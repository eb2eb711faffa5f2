"""Every decoding method on every family: off is plain decoding, scored is answered, gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

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

from defenses.beam import BeamSearch
from defenses.decoding import DecodingDefense
from defenses.dola import DoLa
from defenses.icd import ICD
from defenses.m3id import M3ID
from defenses.opera import OPERA
from defenses.pai import PAI
from defenses.sap import AttentionReallocation
from defenses.sid import SID
from defenses.vasparse import VASparse
from defenses.vcd import VCD
from targets.compression import TokenSparseAttention
from targets.errors import TargetError
from targets.passes import answer_margin

ON: dict[str, DecodingDefense] = {
    "beam": BeamSearch(beams=1),
    "vcd": VCD(),
    "icd": ICD(role="how many ?"),
    "sid": SID(layer=1, retention=0.3),
    "dola": DoLa(),
    "dola high": DoLa(candidates="high"),
    "pai": PAI(alpha=0.5, start_layer=1),
    "m3id": M3ID(forgetting=0.2),
    "vasparse": VASparse(beams=1, keep=0.7),
    "vasparse strong": VASparse(
        beams=1, keep=0.6, beta=0.7, alpha=1.0, apply_on="prob", merge="mean"
    ),
    "vasparse logit": VASparse(beams=1, keep=0.6, score_space="logit", merge="dpcknn_sum"),
    "vasparse mean": VASparse(beams=1, phi_input="masked_visual_mean"),
    "vasparse each": VASparse(beams=1, phi_input="masked_visual_pos"),
    "vasparse repository": VASparse(beams=1, variant="repo_compat", interval=2),
    "opera": OPERA(beams=2, first_tokens=2, threshold=2, damping=1e-2),
    "sap": AttentionReallocation(number=3, strength=0.9),
    "sap utility": AttentionReallocation(number=3, strength=0.9, anchors="utility"),
}
OFF: dict[str, DecodingDefense] = {
    "beam": BeamSearch(beams=1),
    "vcd": VCD(alpha=0),
    "icd": ICD(alpha=0),
    "sid": SID(alpha=0),
    "dola": DoLa(weight=0),
    "pai": PAI(alpha=0, gamma=1),
    "m3id": M3ID(forgetting=0),
    "vasparse": VASparse(beams=1, alpha=0, beta=0, keep=1),
    "vasparse switched": VASparse(beams=1, select=False, svcd=False, sink=False),
    "vasparse repository": VASparse(
        beams=1, variant="repo_compat", select=False, svcd=False, sink=False
    ),
    "opera": OPERA(beams=1, penalty_weights=0, rollbacks=0),
    "sap": AttentionReallocation(strength=0),
    "sap without anchors": AttentionReallocation(number=0),
}
SOME = ("none", "fastv")
EVERYWHERE = ("vcd", "pai", "sid", "vasparse strong", "vasparse mean", "opera", "sap")
"""Between them these use all that a family could get wrong; the others run on three families."""
PAIRS = [
    (family, name)
    for family in FAMILIES
    for name in ON
    if name in EVERYWHERE or family in ("llava", "qwen2_5_vl", "gemma3")
]
loaded = lru_cache(maxsize=len(FAMILIES))(target)


@pytest.mark.parametrize("name", OFF)
@pytest.mark.parametrize("compression", SOME)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_switched_off_it_is_plain_decoding_bit_for_bit(
    family: str, name: str, compression: str
) -> None:
    lvlm, compressor = loaded(family), COMPRESSORS[compression]
    found = spoken(lvlm, OFF[name], asked(lvlm, compressor))
    assert torch.equal(found, plain_ids(lvlm, compressor))
    args = (pictures(lvlm), tiny.QUESTIONS, tiny.ANSWERS, compressor)
    with torch.no_grad():
        wanted, _ = lvlm._passes.answer_logprobs(*args)
        scored, _ = lvlm._passes.answer_logprobs(*args, decoding=OFF[name])
    assert torch.equal(scored, wanted)


@pytest.mark.parametrize("compression", SOME)
@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_scoring_is_answering_and_has_a_gradient(family: str, name: str, compression: str) -> None:
    lvlm, method, compressor = loaded(family), ON[name], COMPRESSORS[compression]
    check_forced(lvlm, method, compressor)
    check_gradient(lvlm, method, compressor)


@pytest.mark.parametrize(("family", "name"), [pair for pair in PAIRS if pair[1] in EVERYWHERE])
def test_rows_of_a_batch_do_not_touch_each_other(family: str, name: str) -> None:
    check_rows(loaded(family), ON[name], COMPRESSORS["pyramiddrop"])


@pytest.mark.parametrize("name", [name for name in ON if name not in ("beam", "opera")])
def test_it_changes_something(name: str) -> None:
    lvlm = loaded("llava")
    args = (pictures(lvlm), tiny.QUESTIONS, tiny.ANSWERS)
    with torch.no_grad():
        plain, _ = lvlm._passes.answer_logprobs(*args)
        other, _ = lvlm._passes.answer_logprobs(*args, decoding=ON[name])
    assert float((plain - other).abs().amax()) > 1e-4


@pytest.mark.parametrize("name", ["vasparse", "pai", "sid", "vcd", "sap"])
def test_with_beams(name: str) -> None:
    """Rows that beams repeat and reorder keep what a method remembers of them."""
    lvlm = target("llava")
    one = replace(ON[name], beams=3)
    for compression in SOME:
        check_rows(lvlm, one, COMPRESSORS[compression])
    wide = spoken(lvlm, one, asked(lvlm, None))
    assert wide.shape[0] == 3


def test_draws_decide_and_nothing_else_does() -> None:
    lvlm = target("llava")
    method = VCD(noise_step=900)
    args = (pictures(lvlm), tiny.QUESTIONS, tiny.ANSWERS)

    def scored(draws: tuple[int, ...]) -> torch.Tensor:
        torch.manual_seed(len(draws))
        with torch.no_grad():
            return lvlm._passes.answer_logprobs(*args, decoding=method, draws=draws)[0]

    assert torch.equal(scored((1, 2, 3)), scored((1, 2, 3)))
    assert torch.equal(scored((1, 2, 3))[1], scored((7, 2, 9))[1])
    assert not torch.equal(scored((1, 2, 3))[0], scored((7, 2, 9))[0])
    with pytest.raises(TargetError, match="3 images but 2 draws"):
        scored((1, 2))


def test_calls_of_a_white_box_take_a_method() -> None:
    lvlm, method, fastv = target("llava"), ON["vasparse strong"], COMPRESSORS["fastv"]
    assert fastv is not None
    passes, args = lvlm._passes, (pictures(lvlm), tiny.QUESTIONS, tiny.ANSWERS)
    full, talk = passes.answer_logprobs(*args, decoding=method)
    through, _ = passes.answer_logprobs(*args, fastv, decoding=method)
    margins = passes.path_margins(*args, fastv, decoding=method)
    assert torch.equal(margins.full, answer_margin(full, talk))
    assert torch.equal(margins.compressed, answer_margin(through, talk))
    found, _, ranking = passes.full_and_rank(*args, fastv, decoding=method)
    assert torch.equal(found, full)
    assert torch.equal(ranking.kept, passes.rank(*args[:2], fastv).kept)
    said = passes.continuation(*args[:2], 5, fastv, decoding=method)
    assert torch.equal(said.ids, spoken(lvlm, method, asked(lvlm, fastv), 5))
    scores = passes.option_logprobs(*args[:2], [("yes", "red")] * 3, fastv, decoding=method)
    first = through[:, 0, [tiny.WORDS.index("yes"), tiny.WORDS.index("red")]]
    assert torch.allclose(scores, first, rtol=1e-4, atol=1e-3)  # answers of another length


def test_what_cannot_work_is_refused_before_anything_runs() -> None:
    lvlm = target("llava")
    pixels = pictures(lvlm)
    with pytest.raises(TargetError, match="start_layer is 9, but the language model has layers 0"):
        lvlm.answer(pixels, tiny.QUESTIONS, decoding=PAI(start_layer=9))
    with pytest.raises(TargetError, match="layer is 7"):
        lvlm.answer(pixels, tiny.QUESTIONS, decoding=SID(layer=7))
    with pytest.raises(TargetError, match=r"depths \[6\]"):
        lvlm.answer(pixels, tiny.QUESTIONS, decoding=DoLa(candidates=(6,)))
    with pytest.raises(TargetError, match="token_sparse_attention has taken over"):
        lvlm.answer(
            pixels,
            tiny.QUESTIONS,
            compressor=TokenSparseAttention(retention=0.5),
            decoding=VASparse(),
        )
    # Without a change to attention the two go together.
    lvlm.answer(
        pixels, tiny.QUESTIONS, compressor=TokenSparseAttention(retention=0.5), decoding=VCD()
    )
