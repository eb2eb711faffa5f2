"""Majority vote over the answers to several draws of one picture."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from typing import Final

from defenses.base import DefenseError

_EDGES: Final = string.punctuation + string.whitespace


def majority(texts: Sequence[str]) -> int:
    """Which answer wins: the index of the first that says what most say.

    Answers are the same if they differ in case, in the length of spaces, or in punctuation and
    space around them only. Of equally frequent ones the earliest wins. An answer of nothing but
    punctuation is compared as it is.

    Args:
        texts: the answers to the draws, in order; one at least.

    Raises:
        DefenseError: if there are none.
    """
    if not texts:
        raise DefenseError("a vote over no answers has no winner; give one answer at least")
    said = [_normal(text) for text in texts]
    frequent = Counter(said)
    # `max` keeps the first of equals, and dictionaries the order of first appearance.
    winner = max(frequent, key=frequent.__getitem__)
    return said.index(winner)


def _normal(text: str) -> str:
    return " ".join(text.casefold().strip(_EDGES).split()) or text.strip()
