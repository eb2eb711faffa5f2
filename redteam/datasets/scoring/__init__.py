"""How benchmarks score answers: one scorer, one file, named as samples and scenarios name it.

A scorer is a module with two functions: ``credit(text, sample)``, what one answer is worth in
[0, 1], and ``summary(rows)``, what the benchmark reports of many. Attacks need a yes or no for each
sample, which is whether the credit is above the sample's bar.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Final, Protocol, cast

from redteam.errors import DatasetError, nearest

if TYPE_CHECKING:
    from redteam.datasets.base import Sample

SCORERS: Final = ("exact", "choice", "pope", "vqa", "textvqa", "mme", "scienceqa", "gqa")


@dataclass(frozen=True, slots=True)
class Scored:
    """One answer with what a summary needs, and no picture.

    Attributes:
        text: what the model said.
        answer: the right answer.
        image_id: of the picture.
        kind: of question.
        scoring: name of the scorer.
        credit: in [0, 1].
    """

    text: str
    answer: str
    image_id: str
    kind: str
    scoring: str
    credit: float


class Scorer(Protocol):
    """What each module of this package offers."""

    def credit(self, text: str, sample: Sample) -> float:
        """What an answer is worth, in [0, 1]."""
        ...

    def summary(self, rows: Sequence[Scored]) -> dict[str, float]:
        """The benchmark's own numbers; `rows` is not empty."""
        ...


def scorer(name: str) -> Scorer:
    """The scorer of a name.

    Raises:
        DatasetError: if there is none, listing what exists.
    """
    if name not in SCORERS:
        hint = nearest(name, SCORERS)
        raise DatasetError(
            f"there is no scoring {name!r}; known: {', '.join(SCORERS)}; {hint}".rstrip("; ")
        )
    return cast(Scorer, import_module(f"{__name__}.{name}"))


def credit(text: str, sample: Sample) -> float:
    """What an answer is worth by the sample's own scorer, in [0, 1]."""
    return scorer(sample.scoring).credit(text, sample)


def scored(text: str, sample: Sample) -> Scored:
    """An answer and its credit, as `summarise` takes it."""
    return Scored(
        text=text,
        answer=sample.answer,
        image_id=sample.image_id,
        kind=sample.kind,
        scoring=sample.scoring,
        credit=credit(text, sample),
    )


def summarise(rows: Sequence[Scored]) -> dict[str, float]:
    """The benchmark's own numbers over answers; {} for no answers.

    Args:
        rows: from `scored`. Where they name several scorers, each name of a number is preceded by
            that of its scorer, as in ``choice/accuracy``.
    """
    by_scorer: dict[str, list[Scored]] = {}
    for row in rows:
        by_scorer.setdefault(row.scoring, []).append(row)
    found: dict[str, float] = {}
    for name, mine in by_scorer.items():
        prefix = f"{name}/" if len(by_scorer) > 1 else ""
        found |= {prefix + key: value for key, value in scorer(name).summary(mine).items()}
    return found


def mean_credit(rows: Sequence[Scored]) -> float:
    """Mean credit; what most benchmarks call accuracy."""
    return sum(row.credit for row in rows) / len(rows)
