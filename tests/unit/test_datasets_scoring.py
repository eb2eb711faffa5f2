"""Scorings against cases worked out by hand from the published rules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from redteam.datasets.base import Sample, is_correct
from redteam.datasets.scoring import (
    SCORERS,
    Scored,
    credit,
    scored,
    scorer,
    summarise,
    textvqa,
    vqa,
)
from redteam.datasets.scoring.mme import said
from redteam.datasets.scoring.pope import says_yes
from redteam.errors import DatasetError

EMPTY = np.zeros((1, 1, 3), dtype=np.uint8)


def sample(answer: str, scoring: str, **more: object) -> Sample:
    return replace(Sample("s", "i", EMPTY, "?", answer, scoring=scoring), **more)  # type: ignore[arg-type]


def test_every_scorer_is_there_and_others_are_refused() -> None:
    for name in SCORERS:
        assert callable(scorer(name).credit)
        assert callable(scorer(name).summary)
    with pytest.raises(DatasetError, match="did you mean 'textvqa'"):
        scorer("textvqq")
    assert summarise([]) == {}


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("yes, there is a dog", True),
        ("No", False),
        ("no, there is none", False),
        ("No, there is not", False),
        ("There is not a dog", False),
        ("There is a dog. No doubt", True),  # only the first sentence counts
        ("Yes.No", True),
        ("No.", False),
        ("NO", True),  # the published rule knows "No" and "no" only
        ("nothing", True),
        ("none", True),
        ("", True),
        ("I do,not know", True),  # the comma is removed, and "donot" is no denial
        ("I see no\nbird", True),  # split at spaces only
    ],
)
def test_pope_parsing(text: str, yes: bool) -> None:
    assert says_yes(text) is yes
    assert credit(text, sample("Yes", "pope")) == float(yes)
    assert credit(text, sample("no", "pope")) == float(not yes)


def rows(scoring: str, *cases: tuple[str, str]) -> list[Scored]:
    return [scored(text, sample(answer, scoring)) for text, answer in cases]


def test_pope_summary() -> None:
    # 3 hits, 1 false alarm, 2 misses, 2 right denials
    cases = [("Yes", "yes")] * 3 + [("Yes", "no")] + [("No", "yes")] * 2 + [("No", "no")] * 2
    found = summarise(rows("pope", *cases))
    assert found == pytest.approx(
        {
            "accuracy": 5 / 8,
            "precision": 3 / 4,
            "recall": 3 / 5,
            "f1": 2 * 3 / (2 * 3 + 1 + 2),
            "yes_share": 4 / 8,
        }
    )


def test_pope_summary_without_a_yes() -> None:
    found = summarise(rows("pope", ("No", "no"), ("No", "no")))
    assert found == {"accuracy": 1, "precision": 0, "recall": 0, "f1": 0, "yes_share": 0}


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The dog", "dog"),
        ("A  Red\nCar.", "red car"),
        ("two", "2"),
        ("none", "0"),
        ("Ten", "10"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("Im", "im"),  # lower case comes first, so the published key "Im" is never met
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("twas", "'twas"),
        ("oclock", "o'clock"),
        ("hell", "hell"),
        ("somebody'd", "somebodyd"),
        ("black/white", "black white"),  # no space beside it: becomes one
        ("black /white", "black white"),  # a space beside it: goes
        ("a-b", "b"),  # "a b", and the article goes
        ("t-shirt", "t shirt"),
        ("t-shirt -", "tshirt"),  # a space beside one hyphen, and all of them go
        ("1,000", "1000"),  # a comma between digits
        ("1,000 t-shirts", "1000 tshirts"),  # … and then every mark goes without a trace
        ("red,blue", "red blue"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("st. john", "st john"),
        (".5", ".5"),
        ("x.y", "xy"),
        ("yes!", "yes"),
        ("it's", "it's"),
        ("10:30", "10:30"),
        ("", ""),
    ],
)
def test_vqa_normalisation(text: str, plain: str) -> None:
    assert vqa.normalise(text) == plain


def test_textvqa_normalisation() -> None:
    assert textvqa.normalise("Joe's, Diner?") == "joe 's diner"
    assert textvqa.normalise("1,5") == "15"
    assert textvqa.normalise("red,blue") == "redblue"


@pytest.mark.parametrize(
    ("same", "expected"),
    # m of ten said it: m leave-one-out sets with m - 1 others, 10 - m with m others, min(·/3, 1)
    [
        (0, 0.0),
        (1, (1 * 0 + 9 * (1 / 3)) / 10),
        (2, (2 * (1 / 3) + 8 * (2 / 3)) / 10),
        (3, (3 * (2 / 3) + 7 * 1) / 10),
        (4, 1.0),
        (10, 1.0),
    ],
)
@pytest.mark.parametrize("scoring", ["vqa", "textvqa"])
def test_vqa_accuracy(same: int, expected: float, scoring: str) -> None:
    people = ("The Two",) * same + tuple(f"other {i}" for i in range(10 - same))
    one = sample("2", scoring, references=people)
    assert credit("2.", one) == pytest.approx(expected)
    assert is_correct("2.", one) is (same >= 2), "the documented bar of 0.5"
    assert is_correct("2.", replace(one, bar=0.0)) is (same >= 1)
    assert is_correct("2.", replace(one, bar=0.9)) is (same >= 4)


def test_vqa_summary_is_the_mean() -> None:
    people = ("red",) * 2 + tuple(f"other {i}" for i in range(8))
    one = sample("red", "vqa", references=people)
    found = summarise([scored("red", one), scored("blue", one), scored("other 3", one)])
    assert found == pytest.approx({"accuracy": (0.6 + 0 + 0.3) / 3})


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("Yes", "yes"),
        ("yes it is", "yes"),
        ("No.", "no"),
        (" no", "no"),
        ("not", "no"),
        ("I say yes", "other"),  # beyond the first four characters
        ("a no", "no"),
        ("", "other"),
        ("maybe", "other"),
    ],
)
def test_mme_parsing(text: str, parsed: str) -> None:
    assert said(text) == parsed


def mme(image: str, kind: str, *texts: tuple[str, str]) -> list[Scored]:
    return [
        scored(text, replace(sample(answer, "mme"), image_id=image, kind=kind))
        for text, answer in texts
    ]


def test_mme_summary() -> None:
    answers = [
        *mme("a", "count", ("Yes", "Yes"), ("No", "No")),
        *mme("b", "count", ("Yes", "Yes"), ("Yes", "No")),
        *mme("c", "OCR", ("Yes", "Yes"), ("No", "No")),
        *mme("d", "code_reasoning", ("No", "Yes"), ("Yes", "No")),
        *mme("e", "code_reasoning", ("Yes", "Yes")),  # the other one ended in an error
    ]
    found = summarise(answers)
    assert found == pytest.approx(
        {
            "accuracy": 6 / 9,
            "accuracy_plus": 2 / 4,
            "category/count": 100 * (3 / 4 + 1 / 2),
            "category/OCR": 200.0,
            "category/code_reasoning": 100 * (1 / 3 + 0),
            "perception": 125.0 + 200.0,
            "cognition": 100 / 3,
        }
    )


OPTIONS = ("the sun", "the moon", "Mars")


@pytest.mark.parametrize(
    ("text", "published", "lenient"),
    [
        ("B", True, True),
        ("B.", True, True),
        ("B. the moon", True, True),
        ("The answer is B.", True, True),
        ("The answer is B. The answer is C.", False, False),
        ("A", False, False),
        ("b", False, True),
        ("(B)", False, True),
        ("B) the moon", False, True),
        ("B: it is round", False, True),
        ("The moon!", False, True),
        ("Mars", False, False),
        ("Both", False, False),
        ("D", False, False),
        ("", False, False),
    ],
)
def test_letters(text: str, published: bool, lenient: bool) -> None:
    one = sample("B", "scienceqa", options=OPTIONS)
    assert credit(text, one) == float(published)
    assert credit(text, replace(one, scoring="choice")) == float(lenient)


def test_a_letter_beyond_the_options_is_no_answer() -> None:
    one = sample("D", "scienceqa", options=OPTIONS)
    assert credit("D", one) == 0


@pytest.mark.parametrize(
    ("text", "right"),
    [("Left", True), ("left.", True), (" left ", True), ("the left", False), ("lefts", False)],
)
def test_gqa(text: str, right: bool) -> None:
    assert credit(text, sample("left", "gqa")) == float(right)


def test_mixed_scorers_are_kept_apart() -> None:
    found = summarise(
        [
            *rows("exact", ("red", "red"), ("red", "blue")),
            *rows("gqa", ("Left.", "left")),
        ]
    )
    assert found == {"exact/accuracy": 0.5, "gqa/accuracy": 1.0}
