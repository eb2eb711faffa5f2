"""ScienceQA: the letter of an option."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from redteam.datasets.scoring import Scored, mean_credit

if TYPE_CHECKING:
    from redteam.datasets.base import Sample

LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SENTENCE: Final = re.compile(r"The answer is ([A-Z])\.")


def chosen(text: str, count: int) -> str:
    """The letter an answer names, or "" if it names none of the first `count`.

    The text is a letter (a full stop may follow), or begins with a letter, a full stop and a space,
    or holds exactly one "The answer is X.".
    """
    text = text.strip()
    found = _SENTENCE.findall(text)
    letter = ""
    if len(text) == 1 or text[1:] == "." or text[1:3] == ". ":
        letter = text[0]
    elif len(found) == 1:
        letter = found[0]
    return letter if letter and letter in LETTERS[:count] else ""


def credit(text: str, sample: Sample) -> float:
    """1 if the letter is right.

    *Learn to Explain* (arXiv 2209.09513), parsed as LLaVA's evaluation does (arXiv 2304.08485).

    *Differs from the published evaluation in* that an answer without a letter is wrong; the
    original draws an option at random for it. "A." alone is a letter too, and "The answer is
    Brown" names none.
    """
    return float(chosen(text, len(sample.options)) == sample.answer)


def summary(rows: Sequence[Scored]) -> dict[str, float]:
    """``accuracy``: the share of right letters."""
    return {"accuracy": mean_credit(rows)}
