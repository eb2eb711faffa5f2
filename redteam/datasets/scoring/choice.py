"""Multiple choice in your own data: a letter in any usual form, or the text of an option."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from redteam.datasets.scoring import Scored, mean_credit
from redteam.datasets.scoring.exact import normalise
from redteam.datasets.scoring.scienceqa import LETTERS, chosen

if TYPE_CHECKING:
    from redteam.datasets.base import Sample

_FORMS: Final = re.compile(r"\(?([A-Za-z])(?:\)|[.:](?=\s|$)|\s*$)")


def credit(text: str, sample: Sample) -> float:
    """1 if the right option is named.

    In this order: the text of one option (after the normalisation of `exact`); what ScienceQA's
    parsing finds; a letter at the start as in "b", "(B)", "B)", "B:" or "B.".

    Args:
        text: what the model said.
        sample: its `answer` is a letter, its `options` the texts.
    """
    count = len(sample.options)
    texts = [normalise(option) for option in sample.options]
    plain = normalise(text)
    if plain and texts.count(plain) == 1:
        return float(LETTERS[texts.index(plain)] == sample.answer)
    letter = chosen(text, count)
    form = _FORMS.match(text.strip())
    if not letter and form and form[1].upper() in LETTERS[:count]:
        letter = form[1].upper()
    return float(letter == sample.answer)


def summary(rows: Sequence[Scored]) -> dict[str, float]:
    """``accuracy``: the share of right options."""
    return {"accuracy": mean_credit(rows)}
