"""Exact match after a normalisation of our own: the rule for data without a published one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from redteam.datasets.scoring import Scored, mean_credit

if TYPE_CHECKING:
    from redteam.datasets.base import Sample

_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
_WORD: Final = re.compile(r"[^\W_]+", re.UNICODE)
_YES_NO: Final = frozenset({"yes", "no"})


def normalise(text: str) -> str:
    """Lower case, no punctuation, no English articles, single spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_WORD.findall(_ARTICLES.sub(" ", folded)))


def credit(text: str, sample: Sample) -> float:
    """1 if an answer equals one of the accepted answers after `normalise`, else 0.

    Where the right answer is yes or no, the first yes or no of the text decides, whatever stands
    around it. (POPE's own parsing is another one, see `redteam.datasets.scoring.pope`.)

    Args:
        text: what the model said.
        sample: the question.
    """
    truths = {normalise(truth) or truth.strip() for truth in (sample.answer, *sample.accepted)}
    if truths <= _YES_NO:
        words = normalise(text).split()
        return float(next((word for word in words if word in _YES_NO), None) in truths)
    return float((normalise(text) or text.strip()) in truths)


def summary(rows: Sequence[Scored]) -> dict[str, float]:
    """``accuracy``: the mean credit."""
    return {"accuracy": mean_credit(rows)}
