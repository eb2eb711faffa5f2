"""GQA: exact match with the one short answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from redteam.datasets.scoring import Scored, mean_credit

if TYPE_CHECKING:
    from redteam.datasets.base import Sample


def credit(text: str, sample: Sample) -> float:
    """1 if the answer is the right one, letter by letter.

    *GQA: A New Dataset for Real-World Visual Reasoning* (arXiv 1902.09506). Case, space around the
    answer and full stops at its end are ignored, as LLaVA's conversion for the official evaluation
    does (arXiv 2304.08485).
    """
    return float(_plain(text) == _plain(sample.answer))


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()


def summary(rows: Sequence[Scored]) -> dict[str, float]:
    """``accuracy``: the share of exact matches."""
    return {"accuracy": mean_credit(rows)}
