"""Trained compressors on every family: they work, or say why not; never with foreign weights."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import families
import pytest
import tiny
import torch

from targets.compression import Explainability, QueCC, TokenFLEX, Uniform, compress
from targets.compression.aside import question_state
from targets.errors import CompressionError
from targets.families import family_of

SQUARES = ("llava", "paligemma", "gemma3")
"""Families whose pictures are one square grid of tokens."""


@pytest.fixture(scope="module", params=sorted(families.FAMILIES))
def built(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    model, processor = families.build(request.param)
    return request.param, model, processor


@pytest.mark.parametrize("kind", [Explainability, QueCC, TokenFLEX])
def test_weights_of_the_scenes_model_are_refused(built: Any, kind: Any) -> None:
    name, model, _ = built
    with pytest.raises(CompressionError) as refused, compress(model, kind(retention=0.25)):
        pass
    square = name in SQUARES or kind is Explainability
    assert ("were trained for another model" if square else "grids or tiles") in str(refused.value)


@pytest.mark.parametrize("kind", [Explainability, QueCC, TokenFLEX])
def test_the_untrained_mode_generates_or_is_refused(built: Any, kind: Any) -> None:
    name, model, processor = built
    method = kind(retention=0.25, weights="none")
    reason = method.refuses(family_of(model))
    if kind is not Explainability and name not in SQUARES:
        assert reason is not None
        return
    assert reason is None
    module = import_module(f"families.{families.FAMILIES[name][1]}")
    for case in module.CASES:
        inputs = families.batch(name, processor, case)
        with torch.no_grad(), compress(model, method) as session:
            made = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert made.shape[0] == len(inputs["input_ids"])
        if session.trace.rows is None:
            continue
        left, first = session.trace.tokens[0], session.trace.first
        assert first is not None
        wanted = [method.count(first.seen.cut, int(t), 4) for t in first.seen.totals]
        assert left.tolist() == wanted


class Asking(Uniform):
    """Keeps tokens somehow, and hears what QueCC would ask with."""

    def score(self, seen: Any) -> Any:
        self.__dict__["heard"] = question_state(seen.text)
        self.__dict__["words"] = seen.text.words_after()
        return super().score(seen)


def test_the_question_is_read_alone_in_the_middle_of_a_forward(built: Any) -> None:
    """What QueCC asks with is what the language model says to the question by itself."""
    name, model, processor = built
    inputs, asking = families.batch(name, processor, "padded"), Asking(keep_tokens=2)
    with torch.no_grad(), compress(model, asking) as session:
        model(**inputs)
        assert session.trace.rows is not None
    heard, words = asking.__dict__["heard"], asking.__dict__["words"]
    text = family_of(model).text
    for row, ids in enumerate(inputs["input_ids"]):
        with torch.no_grad():
            alone = text(input_ids=ids[words[row]][None], use_cache=False).last_hidden_state
        assert int(words[row].sum()) > 1
        assert torch.allclose(heard[row], alone[0, -1], rtol=0, atol=2e-5)


def test_only_the_question_and_the_picture_matter() -> None:
    """QueCC's tokens of a row do not depend on other rows, nor on how far it is padded."""
    model, method = tiny.build_model(), tiny.COMPRESSORS["quecc"]
    pixels = tiny.normalised(tiny.pictures(3))
    found = []
    for rows in ((0, 1, 2), (1,)):
        ids, mask, positions = tiny.prompt([tiny.QUESTIONS[row] for row in rows])
        with torch.no_grad(), compress(model, method) as session:
            model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                pixel_values=pixels[list(rows)],
            )
        assert session.trace.score is not None
        found.append(session.trace.score[rows.index(1)])
    assert torch.allclose(*found, rtol=0, atol=1e-6)
