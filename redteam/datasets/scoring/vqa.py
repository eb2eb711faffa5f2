"""VQA accuracy: how many of ten people said the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from redteam.datasets.scoring import Scored, mean_credit

if TYPE_CHECKING:
    from redteam.datasets.base import Sample

_ENOUGH: Final = 3
_PUNCTUATION: Final = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES: Final = frozenset({"a", "an", "the"})
_NUMERALS: Final = "zero one two three four five six seven eight nine ten"
_NUMBERS: Final = {word: str(value) for value, word in enumerate(_NUMERALS.split())} | {"none": "0"}
_COMMA_IN_NUMBER: Final = re.compile(r"\d,\d")
# The published expression has a misspelt look-behind, which never matches. This is what it does.
_FULL_STOP: Final = re.compile(r"\.(?!\d)")

# Spelled out; the table of contractions is every one of these with one apostrophe forgotten.
_CONTRACTED: Final = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll
    you're you've
"""
_CONTRACTIONS: Final = {
    word[:at] + word[at + 1 :]: word
    for word in _CONTRACTED.split()
    for at, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # so it is published


def normalise(text: str) -> str:
    """An answer by the rules of the VQA evaluation.

    A punctuation mark is dropped where it stands beside a space anywhere in the text, or where the
    text holds a comma between digits; else it becomes a space. Full stops go, except before a
    digit. Then lower case; number words up to ten become digits (and "none" 0), articles go, and
    contractions get their apostrophe back.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    found, number = text, _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        dropped = number or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if dropped else " ")
    words = (_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", found).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def agreement(text: str, sample: Sample, normalised: Callable[[str], str] = normalise) -> float:
    """Mean over the people of min(others who said it ÷ 3, 1), each person left out in turn.

    Args:
        text: what the model said.
        sample: its `references` are the people's answers; ten in VQAv2 and TextVQA.
        normalised: applied to the text and to every reference.
    """
    said = normalised(text)
    same = [normalised(one) == said for one in sample.references]
    total = sum(same)
    shares = [min((total - one) / _ENOUGH, 1.0) for one in same]
    return sum(shares) / len(shares) if shares else 0.0


def credit(text: str, sample: Sample) -> float:
    """VQA accuracy of one answer.

    *Making the V in VQA Matter* (arXiv 1612.00837) with the evaluation of *VQA* (arXiv 1505.00468).

    *Differs from the published evaluation in* that answers are always normalised; there they are
    compared as they stand where all ten people agree, so that "Yes" would be wrong beside "yes".
    """
    return agreement(text, sample)


def summary(rows: Sequence[Scored]) -> dict[str, float]:
    """``accuracy``: the mean VQA accuracy."""
    return {"accuracy": mean_credit(rows)}
