"""A tower that runs once for several answers: the same answers, on every family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import pytest
import torch
from families import FAMILIES, build
from torch import Tensor

from defenses.beam import BeamSearch
from targets.base import Knowledge
from targets.compression import FasterVLM, FastV, HiPrune, VisionZip
from targets.compression.attentive_removal import AttentiveRemoval
from targets.compression.base import Compressor
from targets.errors import CompressionError
from targets.lvlm import LVLM, Answered
from targets.remembering import remembering

QUESTIONS = ("is there a red ball ?", "how many ?", "what ?")
COMPRESSORS: tuple[Compressor | None, ...] = (
    None,
    FastV(layer=2, retention=0.5),
    VisionZip(retention=0.5),
    HiPrune(retention=0.5),
    FasterVLM(retention=0.5),
)


@lru_cache(maxsize=len(FAMILIES))
def model(family: str) -> LVLM:
    return LVLM(*build(family))


def pictures(target: LVLM, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    shape = (len(QUESTIONS), 3, *target.image_size)
    return torch.randint(0, 256, shape, generator=rng) / 255


@contextmanager
def counted(target: LVLM) -> Iterator[list[int]]:
    """How often the tower ran."""
    runs: list[int] = []
    handle = target.family.tower.register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        yield runs
    finally:
        handle.remove()


def answers(target: LVLM, images: Tensor) -> list[Answered | None]:
    found: list[Answered | None] = []
    for one in COMPRESSORS:
        try:
            found.append(
                target.answer(images, QUESTIONS, compressor=one, max_new_tokens=3, seeds=[0, 1, 2])
            )
        except CompressionError:
            found.append(None)  # this family refuses it
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_same_and_the_tower_runs_less(family: str) -> None:
    target = model(family)
    images = pictures(target)
    with counted(target) as before:
        alone = answers(target, images)
    works = [one for one in alone if one is not None]
    assert len(works) >= 2
    with remembering([target.family]), counted(target) as after:
        first, again = answers(target, images), answers(target, images)
    for wanted, found, twice in zip(alone, first, again, strict=True):
        assert _plain(wanted) == _plain(found) == _plain(twice)
        if wanted is not None and wanted.score is not None:
            assert found is not None
            assert twice is not None
            assert wanted.score.equal(found.score)
            assert wanted.score.equal(twice.score)
    # Once for all that listen to nothing, and at most once more for each layer anybody wants.
    assert len(after) < len(before)
    with remembering([target.family]), counted(target) as later:
        answers(target, images)
        learnt = len(later)
        answers(target, pictures(target, seed=1))
        assert len(later) - learnt <= 1 + sum(one is None for one in alone)


def _plain(one: Answered | None) -> object:
    if one is None:
        return None
    return one.texts, None if one.kept is None else one.kept.tolist(), str(one.left)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_other_pictures_are_never_taken_for_these(family: str) -> None:
    target = model(family)
    images, others = pictures(target), pictures(target)
    others[1, 0, 0, 0] = 1 - others[1, 0, 0, 0].round()  # a single value of one picture
    alone = target.answer_logprob(others, QUESTIONS, ("yes", "2", "cat"))
    with remembering([target.family]), counted(target) as runs:
        target.answer(images, QUESTIONS, max_new_tokens=1)
        target.answer(others, QUESTIONS, max_new_tokens=1)
        assert len(runs) == 2
        assert target.answer_logprob(others, QUESTIONS, ("yes", "2", "cat")).equal(alone)


def test_nothing_is_remembered_behind_the_block_or_under_gradients() -> None:
    target = model("llava")
    images = pictures(target)
    call = target.family.core.get_image_features
    with remembering([target.family]):
        target.answer(images, QUESTIONS, max_new_tokens=1)
        view = target.view(Knowledge.WHITE_BOX, FastV(layer=2, retention=0.5))
        live = images.clone().requires_grad_()
        with counted(target) as runs:
            loss = view.answer_nll(live, QUESTIONS, ("yes", "2", "cat"))
            (slope,) = torch.autograd.grad(loss.sum(), live)
        assert runs
        assert float(slope.abs().amax()) > 0
    assert target.family.core.get_image_features == call
    assert "encoded" not in target.family.__dict__
    with counted(target) as runs:
        target.answer(images, QUESTIONS, max_new_tokens=1)
        target.answer(images, QUESTIONS, max_new_tokens=1)
    assert len(runs) == 2


def test_a_compressor_inside_the_tower_has_a_run_of_its_own() -> None:
    target, inside = model("llava"), AttentiveRemoval(retention=0.5)
    images = pictures(target)
    alone = target.answer(images, QUESTIONS, compressor=inside, max_new_tokens=3)
    plain = target.answer(images, QUESTIONS, max_new_tokens=3)
    with remembering([target.family]):
        for _ in range(2):
            assert target.answer(images, QUESTIONS, max_new_tokens=3).texts == plain.texts
            found = target.answer(images, QUESTIONS, compressor=inside, max_new_tokens=3)
            assert _plain(found) == _plain(alone)


def test_decoding_methods_share_it_too() -> None:
    target = model("llava")
    images, beams = pictures(target), BeamSearch(beams=2)
    alone = target.answer(images, QUESTIONS, decoding=beams, max_new_tokens=3)
    with remembering([target.family]), counted(target) as runs:
        for _ in range(3):
            found = target.answer(images, QUESTIONS, decoding=beams, max_new_tokens=3)
            assert found.texts == alone.texts
    assert len(runs) <= 1


def test_several_batches_are_kept_apart() -> None:
    target = model("llava")
    batches = [pictures(target, seed) for seed in range(3)]
    ways = (None, VisionZip(retention=0.5), FastV(layer=2, retention=0.5))

    def all_of_them() -> list[object]:
        return [
            _plain(target.answer(images, QUESTIONS, compressor=one, max_new_tokens=2))
            for one in ways
            for images in batches
        ]

    alone = all_of_them()
    with remembering([target.family]), counted(target) as runs:
        assert all_of_them() == alone
    assert len(runs) == 2 * len(batches)


def test_memory_is_bounded() -> None:
    target = model("llava")
    images = pictures(target)
    with remembering([target.family], most_bytes=0), counted(target) as runs:
        target.answer(images, QUESTIONS, max_new_tokens=1)
        target.answer(images, QUESTIONS, max_new_tokens=1)
    assert len(runs) == 2


def test_a_failure_inside_leaves_the_model_as_it_was() -> None:
    target = model("llava")
    with pytest.raises(ZeroDivisionError), remembering([target.family]):
        raise ZeroDivisionError
    assert "get_image_features" not in target.family.core.__dict__
