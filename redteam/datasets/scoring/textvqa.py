"""TextVQA: VQA accuracy with one more step of normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from redteam.datasets.scoring import Scored, mean_credit, vqa

if TYPE_CHECKING:
    from redteam.datasets.base import Sample


def normalise(text: str) -> str:
    """As the evaluation server does: commas and question marks go, 's is parted, then as VQA."""
    parted = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return vqa.normalise(parted)


def credit(text: str, sample: Sample) -> float:
    """VQA accuracy of one answer after TextVQA's normalisation.

    *Towards VQA Models That Can Read* (arXiv 1904.08920).
    """
    return vqa.agreement(text, sample, normalise)


def summary(rows: Sequence[Scored]) -> dict[str, float]:
    """``accuracy``: the mean VQA accuracy."""
    return {"accuracy": mean_credit(rows)}
