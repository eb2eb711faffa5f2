"""The closed set of answers to a question, where there is one."""

from __future__ import annotations

import numpy as np
import pytest

from redteam.datasets.base import Sample
from redteam.datasets.closed import closed_answers
from redteam.datasets.scenes import Scenes


def sample(answer: str, **more: object) -> Sample:
    image = np.zeros((2, 2, 3), np.uint8)
    return Sample("s", "i", image, "question?", answer, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (sample("yes"), ("yes", "no")),
        (sample("No"), ("Yes", "No")),
        (sample("NO"), ("YES", "NO")),
        (sample("B", options=("red", "green", "blue")), ("A", "B", "C")),
        (sample("red", choices=("red", "blue")), ("red", "blue")),
        (sample("a dog"), ()),
    ],
)
def test_what_a_question_has_to_choose_from(one: Sample, expected: tuple[str, ...]) -> None:
    assert closed_answers(one) == expected


def test_scenes_questions_are_closed_but_for_reading() -> None:
    for one in Scenes(split="validation", samples=25).open():
        found = closed_answers(one)
        assert (one.answer in found) == (one.kind != "read")
        assert len(set(found)) == len(found)
