"""What a data set is, and when an answer is right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

Box = tuple[int, int, int, int]
"""Pixels x0, y0, x1, y1; the last two exclusive."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one picture.

    Attributes:
        id: unique in the data set.
        image_id: of the picture; questions about one picture share it.
        image: uint8 ``[H, W, 3]``, RGB.
        question: the user's text, without any chat template; options and suffix included.
        answer: the right answer, as the model would spell it.
        accepted: further spellings that count as right.
        kind: kind of question, for a breakdown; "" for none.
        evidence: boxes one has to see to answer; empty where unknown.
        options: of a multiple choice, without their letters; empty for an open question.
        references: what each annotator said, with repetitions, for scorings that count them.
        scoring: name of the scorer, see `redteam.datasets.scoring`.
        bar: an answer is right if its credit, in [0, 1], is above this; in [0, 1).
        choices: the closed set of answers of a question that has one though it offers no options;
            see `redteam.datasets.closed`.
    """

    id: str
    image_id: str
    image: npt.NDArray[np.uint8]
    question: str
    answer: str
    accepted: tuple[str, ...] = ()
    kind: str = ""
    evidence: tuple[Box, ...] = ()
    options: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    scoring: str = "exact"
    bar: float = 0.5
    choices: tuple[str, ...] = ()


class Samples(Protocol):
    """An opened data set. Pictures may be read only when a sample is asked for."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of all samples, in order."""
        ...

    @property
    def identity(self) -> str:
        """Hash of the content; another one means another data set."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def __iter__(self) -> Iterator[Sample]: ...


class Dataset(Protocol):
    """A data set as a scenario names it: a frozen dataclass whose fields are its options.

    One of them is `samples`, how many to use; ``--limit`` lowers it. Options that are paths are
    named in the class variable ``paths`` and are relative to the scenario; null is no path. An
    option `filter` with a rule of `redteam.datasets.filters` is obeyed by the runner.
    """

    name: ClassVar[str]

    def open(self) -> Samples:
        """Read what is needed to know all ids.

        Raises:
            DatasetError: if it cannot be read.
        """
        ...


def is_correct(text: str, sample: Sample) -> bool:
    """Whether an answer is right: its credit by the sample's scorer is above the sample's bar.

    Args:
        text: what the model said.
        sample: the question.
    """
    from redteam.datasets.scoring import credit

    return credit(text, sample) > sample.bar
