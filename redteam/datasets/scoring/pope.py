"""POPE: is an object there or not, and how much the model likes to say yes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from redteam.datasets.scoring import Scored, mean_credit

if TYPE_CHECKING:
    from redteam.datasets.base import Sample

_DENIALS: Final = frozenset({"No", "no", "not"})


def says_yes(text: str) -> bool:
    """Whether an answer counts as yes, by the parsing of POPE's evaluation.

    *Evaluating Object Hallucination in Large Vision-Language Models* (arXiv 2305.10355). Of the
    text up to the first full stop, without commas and split at spaces, any of the words "No", "no"
    and "not" makes it a no. **Everything else is a yes**, also an empty answer, nonsense, or "NO".
    """
    words = text.partition(".")[0].replace(",", "").split(" ")
    return not _DENIALS.intersection(words)


def credit(text: str, sample: Sample) -> float:
    """1 if the answer says yes where yes is right, or no where no is right."""
    return float(says_yes(text) == (sample.answer.strip().lower() == "yes"))


def summary(rows: Sequence[Scored]) -> dict[str, float]:
    """``accuracy, precision, recall, f1`` of "yes", and ``yes_share``, how often it is said.

    *Differs from the published evaluation in* the degenerate cases: it divides by zero where no
    answer, or no truth, is yes; here precision, recall and F1 are 0 then.
    """
    said = [says_yes(row.text) for row in rows]
    true = [row.answer.strip().lower() == "yes" for row in rows]
    hits = sum(a and b for a, b in zip(said, true, strict=True))
    precision = hits / sum(said) if any(said) else 0.0
    recall = hits / sum(true) if any(true) else 0.0
    both = precision + recall
    return {
        "accuracy": mean_credit(rows),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / both if both else 0.0,
        "yes_share": sum(said) / len(rows),
    }
