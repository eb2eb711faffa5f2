"""The standard attacks through the real views, on a LLaVA of random weights."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from attacks import APGD, FGSM, PGD, Attack, Query, Square
from attacks.answers import Aim, AnswerLoss
from targets.base import Batch, Knowledge
from targets.compression.base import Compressor
from targets.compression.fastv import FastV
from targets.compression.visionzip import VisionZip
from targets.errors import KnowledgeError
from targets.lvlm import LVLM
from targets.scenes import build
from tests.fakes import pick

SEEDS = [1, 2, 3]
EPSILON = 8 / 255
COMPRESSORS: list[Compressor] = [FastV(layer=2, retention=0.25), VisionZip(retention=0.25)]


@pytest.fixture(scope="module")
def target() -> LVLM:
    shape = build.Shape(width=32, mlp=32, heads=2, vision_layers=2, text_layers=3)
    return LVLM(build.build_model(shape, 0).float(), build.build_processor())


@pytest.fixture
def batch() -> Batch:
    """Two options, none, and four; questions and answers of different length."""
    levels = torch.randint(0, 256, (3, 3, 96, 96), generator=torch.Generator().manual_seed(0))
    return Batch(
        ids=("a", "b", "c"),
        images=levels.float() / 255,
        questions=("is there a red circle ?", "what does the sign say ?", "how many shapes ?"),
        answers=("yes", "a b", "two"),
        options=(("yes", "no"), (), ("one", "two", "three", "four")),
    )


def run(target: LVLM, attack: Attack, compressor: Compressor, batch: Batch) -> Any:
    view = target.view(attack.needs, compressor if attack.knows_compression else None)
    return attack(view, batch, EPSILON, SEEDS[: len(batch.ids)])


GRADIENTS = [
    FGSM(path="compressed"),
    FGSM(start="rfgsm"),
    PGD(steps=3, path="both"),
    PGD(steps=3, path="compressed", preserve_weight=1.0),
    PGD(steps=3, target="option", path="compressed"),
    APGD(steps=4, path="compressed"),
    APGD(steps=4, loss="margin", path="both"),
    APGD(steps=4, loss="dlr", targets=2, restarts=2),
]


@pytest.mark.parametrize("attack", GRADIENTS, ids=repr)
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: c.name)
def test_gradients_reach_the_pixels(
    target: LVLM, batch: Batch, attack: Attack, compressor: Compressor
) -> None:
    result = run(target, attack, compressor, batch)
    assert float(result.linf.max()) <= EPSILON
    assert all(min(trace) < trace[0] for trace in result.loss)
    assert not any(c.startswith("zero-gradient") for cs in result.checks for c in cs)
    budget = attack.budget(EPSILON)
    assert len(result.loss[0]) == budget.steps + 1


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("path", ["full", "compressed"])
def test_losses_of_a_padded_batch_are_those_of_the_samples(
    target: LVLM, batch: Batch, loss: Any, path: Any
) -> None:
    view: Any = target.view(Knowledge.WHITE_BOX, COMPRESSORS[0])
    aim = Aim(path=path, loss=loss)
    with torch.no_grad():
        together = AnswerLoss(view, batch, aim)(batch.images, 0)
        for row in range(3):
            one = pick(batch, row)
            alone = AnswerLoss(view, one, aim)(one.images, 0)
            torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", ["full", "compressed"])
def test_a_target_becomes_likelier(target: LVLM, batch: Batch, path: Any) -> None:
    attack = PGD(steps=8, target="three", path=path)
    images = run(target, attack, COMPRESSORS[0], batch).images
    view: Any = target.view(Knowledge.WHITE_BOX, COMPRESSORS[0])
    wanted = ("three",) * 3
    with torch.no_grad():
        before = view.answer_nll(batch.images, batch.questions, wanted, path=path)
        after = view.answer_nll(images, batch.questions, wanted, path=path)
    assert (after < before - 0.01).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: c.name)
def test_square_lowers_its_score_with_no_more_than_its_view(
    target: LVLM, batch: Batch, compressor: Compressor, norm: Any
) -> None:
    texts = target.answer(batch.images, batch.questions, compressor=compressor).texts
    options = tuple(
        tuple(dict.fromkeys((*row, text))) if row else ()
        for row, text in zip(batch.options or (), texts, strict=True)
    )
    right = Batch(batch.ids, batch.images, batch.questions, texts, options)
    attack = Square(queries=25, norm=norm)
    view = target.view(attack.needs, compressor)
    result = attack(view, right, EPSILON if norm == "linf" else 3.0, SEEDS)
    assert result.queries <= 25
    assert (result.forwards, result.backwards) == (0, 0)
    assert all(later <= earlier for trace in result.loss for earlier, later in pairwise(trace))
    assert sum(min(trace) < trace[0] for trace in result.loss) >= 2
    with pytest.raises(KnowledgeError, match="white_box"):
        view.answer_nll(batch.images, batch.questions, batch.answers)  # type: ignore[attr-defined]


def test_query_finds_what_the_deployed_target_then_says_again(target: LVLM, batch: Batch) -> None:
    compressor = COMPRESSORS[0]
    texts = target.answer(batch.images, batch.questions, compressor=compressor).texts
    right = Batch(batch.ids, batch.images, batch.questions, texts)
    attack = Query(queries=20)
    view = target.view(attack.needs, compressor)
    result = attack(view, right, 64 / 255, SEEDS)
    again = target.answer(result.images, right.questions, compressor=compressor).texts
    found = [one != two for one, two in zip(texts, again, strict=True)]
    assert any(found)
    assert result.queries < 20  # since a sample that was found out is not asked again
    assert not hasattr(view, "option_scores")
