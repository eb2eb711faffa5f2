"""What a data set is, and when an answer is right."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol

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
        question: the user's text, without any chat template.
        answer: the right answer, as the model would spell it.
        accepted: further spellings that count as right.
        kind: kind of question, for a breakdown; "" for none.
        evidence: boxes one has to see to answer; empty where unknown.
    """

    id: str
    image_id: str
    image: npt.NDArray[np.uint8]
    question: str
    answer: str
    accepted: tuple[str, ...] = ()
    kind: str = ""
    evidence: tuple[Box, ...] = ()


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
    named in the class variable ``paths`` and are relative to the scenario.
    """

    name: ClassVar[str]

    def open(self) -> Samples:
        """Read what is needed to know all ids.

        Raises:
            DatasetError: if it cannot be read.
        """
        ...


_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
_WORD: Final = re.compile(r"[^\W_]+", re.UNICODE)
_YES_NO: Final = frozenset({"yes", "no"})


def normalise(text: str) -> str:
    """Lower case, no punctuation, no English articles, single spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_WORD.findall(_ARTICLES.sub(" ", folded)))


def is_correct(text: str, sample: Sample) -> bool:
    """Whether an answer is right.

    It has to equal one of the accepted answers after `normalise`. Where the right answer is yes or
    no, the first yes or no of the text decides, whatever stands around it (as POPE does).

    Args:
        text: what the model said.
        sample: the question.
    """
    truths = {normalise(truth) or truth.strip() for truth in (sample.answer, *sample.accepted)}
    if truths <= _YES_NO:
        words = normalise(text).split()
        return next((word for word in words if word in _YES_NO), None) in truths
    return (normalise(text) or text.strip()) in truths
