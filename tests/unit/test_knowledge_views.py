"""Views by knowledge: what each grants, and that nothing else can be reached."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attacks.metering import Meter, MeteredView
from targets.base import CALLS, Batch, Knowledge, includes
from targets.compression.fastv import FastV
from targets.errors import KnowledgeError, TargetError
from targets.lvlm import LVLM
from targets.scenes import build
from targets.views import OtherModels

QUESTIONS = ("is there a red circle ?", "what colour is the star ?")
OPTIONS = (("yes", "no"), ("red", "blue"))
FASTV = FastV(layer=2, retention=0.25)


@pytest.fixture(scope="module")
def target() -> LVLM:
    shape = build.Shape(width=32, mlp=32, heads=2, vision_layers=2, text_layers=3)
    return LVLM(build.build_model(shape, 0).float(), build.build_processor())


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    levels = torch.randint(0, 256, (2, 3, 96, 96), generator=torch.Generator().manual_seed(0))
    return levels.float() / 255


OF_THE_TARGET = [one for one in Knowledge if one is not Knowledge.SURROGATE]


@pytest.mark.parametrize("knowledge", OF_THE_TARGET)
@pytest.mark.parametrize("metered", [False, True])
def test_a_view_has_the_calls_of_its_knowledge_and_no_others(
    target: LVLM, knowledge: Knowledge, metered: bool
) -> None:
    view: Any = target.view(knowledge, FASTV)
    if metered:  # a wider view, narrowed to what the attack declared
        view = MeteredView(target.view(Knowledge.WHITE_BOX, FASTV), knowledge, Meter())
    for name, needed in CALLS.items():
        if includes(knowledge, needed):
            assert callable(getattr(view, name))
        else:
            with pytest.raises(KnowledgeError, match=needed.value):
                getattr(view, name)
    for name in ("model", "passes", "family", "weights", "surrogates"):
        with pytest.raises(KnowledgeError, match="not granted"):
            getattr(view, name)


def test_the_white_box_has_everything_but_other_models() -> None:
    for knowledge in OF_THE_TARGET:
        assert includes(Knowledge.WHITE_BOX, knowledge)
        assert not includes(Knowledge.SURROGATE, knowledge)
        assert includes(knowledge, Knowledge.NONE)
    assert not includes(Knowledge.ENCODER, Knowledge.QUERY)
    assert not includes(Knowledge.QUERY, Knowledge.SCORES)


def test_surrogates_are_all_a_transfer_attacker_has(target: LVLM, images: torch.Tensor) -> None:
    meter = Meter()
    view: Any = MeteredView(OtherModels([target.surrogate("other")]), Knowledge.SURROGATE, meter)
    (other,) = view.surrogates
    assert (other.name, other.depth, other.image_size) == ("other", 3, (96, 96))
    assert other.view.rank(images, QUESTIONS, under=FASTV).kept.sum(1).tolist() == [36, 36]
    assert meter.forwards == 2
    with pytest.raises(KnowledgeError, match="compressor"):
        other.view.rank(images, QUESTIONS)
    for name in CALLS:
        with pytest.raises(KnowledgeError):
            getattr(view, name)
    with pytest.raises(KnowledgeError, match="at least one"):
        OtherModels([])
    with pytest.raises(KnowledgeError, match="no view of the target"):
        target.view(Knowledge.SURROGATE, FASTV)


@pytest.mark.parametrize("knowledge", [Knowledge.QUERY, Knowledge.SCORES])
def test_a_black_box_answers_as_deployed_and_is_counted(
    target: LVLM, images: torch.Tensor, knowledge: Knowledge
) -> None:
    meter = Meter()
    view: Any = MeteredView(target.view(knowledge, FASTV), knowledge, meter)
    answers = view.ask(images, QUESTIONS)
    assert answers == target.answer(images, QUESTIONS, compressor=FASTV).texts
    assert (meter.queries, meter.forwards) == (2, 0)
    with pytest.raises(KnowledgeError, match="deployed"):
        view.ask(images, QUESTIONS, path="full")
    with pytest.raises(KnowledgeError, match="compressor"):
        target.view(knowledge)


def test_a_white_box_asks_either_path(target: LVLM, images: torch.Tensor) -> None:
    view: Any = target.view(Knowledge.WHITE_BOX, FASTV)
    assert view.ask(images, QUESTIONS, path="full") == target.answer(images, QUESTIONS).texts
    with pytest.raises(KnowledgeError, match="'full' or 'compressed'"):
        view.ask(images, QUESTIONS, path="half")


def test_questions_go_in_as_a_file_would(target: LVLM, images: torch.Tensor) -> None:
    view: Any = target.view(Knowledge.SCORES, FASTV)
    off = images + 0.3 / 255
    off.requires_grad_()
    scores = view.option_scores(off, QUESTIONS, OPTIONS)
    assert torch.equal(scores, view.option_scores(images, QUESTIONS, OPTIONS))
    assert not scores.requires_grad


@pytest.mark.parametrize("path", ["full", "compressed"])
def test_options_are_told_apart_by_their_first_token(
    target: LVLM, images: torch.Tensor, path: str
) -> None:
    view: Any = target.view(Knowledge.WHITE_BOX, FASTV)
    images = images.clone().requires_grad_()
    found = view.option_logprobs(images, QUESTIONS, OPTIONS, path=path, straight_through=True)
    for column in range(2):
        answers = tuple(row[column] for row in OPTIONS)
        logprobs, _ = view.answer_logprobs(images, QUESTIONS, answers, path=path)
        first = [target._tokenizer(text).input_ids[-1] for text in answers]
        expected = logprobs[torch.arange(2), 0, torch.tensor(first)]
        torch.testing.assert_close(found[:, column], expected)
    (gradient,) = torch.autograd.grad(found.sum(), images)
    assert bool((gradient.abs().flatten(1).amax(1) > 0).all())


def test_options_alike_in_their_first_token_are_scored_whole(
    target: LVLM, images: torch.Tensor
) -> None:
    view: Any = target.view(Knowledge.WHITE_BOX, FASTV)
    options = (("a b", "a c"), ("a b", "b b"))
    found = view.option_logprobs(images, QUESTIONS, options)
    expected = target.option_scores(images[:1], QUESTIONS[:1], ["a b", "a c"])
    torch.testing.assert_close(found[:1], expected)
    # The other row is told apart by its first token, whatever its neighbour needs.
    alone = view.option_logprobs(images[1:], QUESTIONS[1:], options[1:])
    torch.testing.assert_close(found[1:], alone)
    with pytest.raises(TargetError, match="same number"):
        view.option_logprobs(images, QUESTIONS, (("yes",), ("a", "b")))


@pytest.mark.parametrize(("options", "passes"), [(OPTIONS, 1), ((("a b", "a c"), ("a", "b")), 2)])
@pytest.mark.parametrize("path", ["full", "compressed"])
def test_options_that_take_several_passes_are_counted_so(
    target: LVLM, images: torch.Tensor, options: Any, passes: int, path: str
) -> None:
    """As the tower sees them: a hook on it counts the images that really go through."""
    meter, seen = Meter(), [0, 0]
    view: Any = MeteredView(target.view(Knowledge.WHITE_BOX, FASTV), Knowledge.WHITE_BOX, meter)
    embedding = target.family.model.get_submodule("model.vision_tower.embeddings")

    def backward(gradient: torch.Tensor) -> None:
        seen[1] += len(gradient)

    def forward(module: object, args: object, output: torch.Tensor) -> None:
        seen[0] += len(output)
        output.register_hook(backward)  # type: ignore[no-untyped-call]

    images = images.clone().requires_grad_()
    handle = embedding.register_forward_hook(forward)
    try:
        found = view.option_logprobs(images, QUESTIONS, options, path=path)
        torch.autograd.grad(found.sum(), images)
    finally:
        handle.remove()
    assert seen == [2 * passes, 2 * passes]
    assert [meter.forwards, meter.backwards] == seen


def test_a_single_option_is_taken_whole(target: LVLM, images: torch.Tensor) -> None:
    view: Any = target.view(Knowledge.WHITE_BOX, FASTV)
    found = view.option_logprobs(images[:1], QUESTIONS[:1], (("a b",),))
    assert torch.allclose(found, target.option_scores(images[:1], QUESTIONS[:1], ["a b"]))


def test_rows_of_a_batch() -> None:
    batch = Batch(
        ids=("a", "b"),
        images=torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 2, 2),
        questions=("p", "q"),
        answers=("yes", "two"),
        options=(("yes", "no"), ()),
        judges=(lambda text: text == "YES", lambda text: text == "2"),
    )
    assert batch.right(["YES", "2"]) == [True, True]
    second = batch.rows([1])
    assert (second.ids, second.options, second.right(["two"])) == (("b",), ((),), [False])
    assert second.images.unique().tolist() == [1.0]
    plain = Batch(("a",), batch.images[:1], ("p",), ("Yes",))
    assert plain.right([" yes "]) == [True]
