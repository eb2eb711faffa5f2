"""The drawn world: deterministic, disjoint, balanced, and truthful about its evidence."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from targets.scenes import build, packing, world


def test_a_scene_is_a_function_of_split_and_index() -> None:
    first = world.scene("test", 7)
    world.scene("test", 8)
    again = world.scene("test", 7)
    assert np.array_equal(first.image, again.image)
    assert first.questions == again.questions


def test_splits_share_no_scene() -> None:
    images = {world.scene(split, i).image.tobytes() for split in world.SPLITS for i in range(50)}
    assert len(images) == 150


@pytest.mark.parametrize(("split", "index"), [("tset", 0), ("test", -1)])
def test_bad_arguments_say_what_is_allowed(split: str, index: int) -> None:
    with pytest.raises(ValueError, match="train, validation, test"):
        world.scene(split, index)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_answers_are_true_of_the_objects(index: int) -> None:
    one = world.scene("train", index)
    assert one.image.shape == (96, 96, 3)
    present = {(o.shape, o.colour) for o in one.objects}
    for q in one.questions:
        words = q.text.split()
        if q.kind == "exists":
            assert ((words[4], words[3]) in present) == (q.answer == "yes")
        elif q.kind == "colour":
            assert [o.colour for o in one.objects if o.shape == words[4]] == [q.answer]
        elif q.kind == "shape":
            assert [o.shape for o in one.objects if o.colour == words[3]] == [q.answer]
        elif q.kind == "count":
            assert world.NUMBERS[len(one.objects) - 1] == q.answer
        else:
            assert one.sign is not None
            assert q.answer == " ".join(one.sign.text)


def test_evidence_boxes_hold_what_is_asked() -> None:
    for index in range(40):
        one = world.scene("validation", index)
        labels = world.patch_labels(one)
        for q in one.questions:
            tokens = world.tokens_of(q.evidence)
            if q.kind == "read":
                assert (labels[tokens, 2] > 0).all()
                assert tokens.sum() == 2
            elif q.kind in ("colour", "shape"):
                # An object covers four patches; its smoothed edge may graze more.
                assert (labels[tokens, 0] > 0).sum() == 4
                assert tokens.sum() <= 12


def test_yes_and_no_are_balanced_and_half_of_no_is_adversarial() -> None:
    asked = [(world.scene("test", i), world.scene("test", i).questions[0]) for i in range(600)]
    yes = sum(q.answer == "yes" for _, q in asked)
    assert 0.42 < yes / len(asked) < 0.58
    adversarial = 0
    for one, q in asked:
        if q.answer == "no" and len(one.objects) > 1:
            _, _, _, colour, shape, _ = q.text.split()
            adversarial += any(o.shape == shape for o in one.objects) and any(
                o.colour == colour for o in one.objects
            )
    assert adversarial > 0.25 * (600 - yes)


def test_samples_take_turns_over_kinds_and_images() -> None:
    got = world.samples("test", 100)
    kinds = Counter(s.kind for s in got)
    assert set(kinds) == set(world.KINDS)
    assert min(kinds.values()) >= 5
    assert len({s.image_id for s in got}) == 100
    assert len({s.id for s in world.samples("test", 300, questions_per_image=5)}) == 300


def test_every_word_is_in_the_vocabulary() -> None:
    known = set(build.vocabulary())
    for index in range(100):
        for q in world.scene("train", index).questions:
            assert known.issuperset(q.text.split())
            assert known.issuperset(q.answer.split())


def test_packing_puts_answers_behind_their_question() -> None:
    words = build.vocabulary()
    batch = packing.pack("train", 0, 8)
    for row in range(8):
        one = world.scene("train", row)
        for i, q in enumerate(one.questions):
            inside = batch.block[row] == i
            text = [words[t] for t in batch.tokens[row, inside].tolist()]
            assert text == [*q.text.split(), *q.answer.split()]
            targets = batch.targets[row, inside]
            spoken = [words[t] for t in targets[targets != packing.IGNORE].tolist()]
            assert spoken == [*q.answer.split(), "</s>"]
            assert words[int(batch.tokens[row, batch.asks[row, i]])] == "?"
