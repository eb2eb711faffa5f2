"""An answer that was decoded from NaN is no answer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch

from defenses.beam import BeamSearch
from defenses.vcd import VCD
from targets.compression import FastV
from targets.errors import NonFiniteError
from targets.lvlm import LVLM
from targets.soundness import FiniteLogits, without_nan

SOUND, POISONED = "is there a red circle ?", "is there a green sign ?"
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "compressed": {"compressor": FastV(layer=2, retention=0.5)},
    "contrasted": {"decoding": VCD()},
    "beams": {"decoding": BeamSearch()},
}


@pytest.fixture(scope="module", params=[math.nan, math.inf])
def target(request: pytest.FixtureRequest) -> LVLM:
    """A model with one broken row of weights, as a damaged checkpoint has."""
    lvlm = LVLM(tiny.build_model(), tiny.build_processor())
    with torch.no_grad():
        table = lvlm.family.model.get_input_embeddings().weight
        table[tiny.WORDS.index("sign")] = request.param
    return lvlm


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_from_broken_logits_is_refused(way: str, target: LVLM) -> None:
    images = tiny.pictures(2)
    said = target.answer(images, [SOUND] * 2, max_new_tokens=2, **WAYS[way])
    assert len(said.texts) == 2, "what does not touch the broken weights is answered"
    with pytest.raises(NonFiniteError, match=r"NaN or infinity.*float32"):
        target.answer(images, [SOUND, POISONED], max_new_tokens=2, **WAYS[way])
    again = target.answer(images, [SOUND] * 2, max_new_tokens=2, **WAYS[way])
    assert again.texts == said.texts, "the refusal leaves the model as it was"


def test_scores_are_refused_too(target: LVLM) -> None:
    images = tiny.pictures(1)
    assert target.option_scores(images, [SOUND], ["yes", "no"]).isfinite().all()
    with pytest.raises(NonFiniteError, match="the score of an option"):
        target.option_scores(images, [POISONED], ["yes", "no"])
    with pytest.raises(NonFiniteError, match="the log-probability of an answer"):
        target.answer_logprob(images, [POISONED], ["yes"])


def test_what_is_impossible_is_not_unsound() -> None:
    watch = FiniteLogits()
    watch.require()
    watch(None, torch.tensor([[-math.inf, 0.0]]))
    watch.require()
    watch(None, torch.tensor([[-math.inf, -math.inf], [0.0, 0.0]]))
    watch(None, torch.tensor([[0.0, 0.0]]))
    with pytest.raises(NonFiniteError):
        watch.require()
    impossible = torch.tensor([-math.inf, 0.0])
    assert without_nan(impossible, "x") is impossible
