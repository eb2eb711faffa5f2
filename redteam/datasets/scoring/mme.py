"""MME: two questions about each picture, and credit for getting both right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final

from redteam.datasets.scoring import Scored, mean_credit

if TYPE_CHECKING:
    from redteam.datasets.base import Sample

_HALVES: Final = {
    "perception": "existence count position color posters celebrity scene landmark artwork ocr",
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning",
}
_HEAD: Final = 4


def said(text: str) -> str:
    """``yes``, ``no`` or ``other``: what the first four characters hold, yes before no."""
    head = text.strip().lower()[:_HEAD]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def credit(text: str, sample: Sample) -> float:
    """1 if the answer says what is right.

    *MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models*
    (arXiv 2306.13394), parsed as in its evaluation script.
    """
    return float(said(text) == sample.answer.strip().rstrip(".").lower())


def summary(rows: Sequence[Scored]) -> dict[str, float]:
    """``accuracy`` over questions and ``accuracy_plus`` over pictures (both questions right).

    ``category/NAME`` is 100 (accuracy + accuracy_plus) of that category, at most 200;
    ``perception`` and ``cognition`` are the sums over the categories of each half that are there.
    Pictures of which only one question was answered count in `accuracy` alone.
    """
    points = {
        kind: 100 * (mean_credit(mine) + _plus(mine))
        for kind, mine in sorted(_grouped(rows, lambda row: row.kind).items())
    }
    found = {"accuracy": mean_credit(rows), "accuracy_plus": _plus(rows)}
    for half, kinds in _HALVES.items():
        there = [value for kind, value in points.items() if kind.lower() in kinds.split()]
        found |= {half: sum(there)} if there else {}
    return found | {f"category/{kind}": value for kind, value in points.items() if kind}


def _plus(rows: Sequence[Scored]) -> float:
    pairs = [pair for pair in _grouped(rows, lambda row: row.image_id).values() if len(pair) > 1]
    right = sum(all(row.credit == 1 for row in pair) for pair in pairs)
    return right / len(pairs) if pairs else 0.0


def _grouped(rows: Iterable[Scored], key: Callable[[Scored], str]) -> dict[str, list[Scored]]:
    found: dict[str, list[Scored]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found
