"""The closed set of answers to a question, where there is one: what a classifier would choose from.

Attacks that need scores of classes (Square, APGD with a margin, library attacks) take these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from redteam.datasets.base import Sample

_YES_NO: Final = ("yes", "no")


def closed_answers(sample: Sample) -> tuple[str, ...]:
    """Answers a question has to choose from, the right one among them; empty if it is open.

    In this order: what the data set says (`Sample.choices`); the letters of a multiple choice; yes
    and no, where the right answer is one of them, in its own spelling.
    """
    from redteam.datasets.scoring.scienceqa import LETTERS

    if sample.choices:
        return sample.choices
    letters = tuple(LETTERS[: len(sample.options)])
    if sample.answer in letters:
        return letters
    if sample.answer.lower() not in _YES_NO:
        return ()
    if sample.answer.istitle():
        return tuple(word.title() for word in _YES_NO)
    return tuple(word.upper() for word in _YES_NO) if sample.answer.isupper() else _YES_NO
