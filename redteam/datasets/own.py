"""Your own data: how the columns of a file become questions, whatever its format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Annotated, Final, Literal

from annotated_types import Ge, Interval

from redteam.datasets.base import Box
from redteam.datasets.entries import Entries, Entry, gather
from redteam.datasets.images import PictureError
from redteam.datasets.scoring.scienceqa import LETTERS
from redteam.datasets.tables import Record, Table, require
from redteam.errors import DatasetError

EVIDENCE: Final = "evidence"
_PEOPLE: Final = 4
"""Fewest references with which VQA accuracy can reach 1."""


@dataclass(frozen=True, kw_only=True)
class Own:
    """Options that all formats of your own data share; each class describes them."""

    path: str
    samples: Annotated[int, Ge(1)] | None = None
    seed: Annotated[int, Ge(0)] | None = None
    filter: Literal["sighted", "clean_right"] | None = None
    scoring: Literal["auto", "exact", "choice", "pope", "vqa", "textvqa", "mme", "gqa"] = "auto"
    bar: Annotated[float, Interval(ge=0, lt=1)] = 0.5
    suffix: str = ""
    outside: bool = False
    image_column: str = "image"
    question_column: str = "question"
    answer_column: str = "answer"
    options_column: str = "options"
    id_column: str = "id"
    image_id_column: str = "image_id"
    kind_column: str = "kind"

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that mean something, the picture first."""
        return (
            self.image_column,
            self.question_column,
            self.answer_column,
            self.options_column,
            self.id_column,
            self.image_id_column,
            self.kind_column,
            EVIDENCE,
        )

    def gathered(self, tables: Sequence[Table]) -> Entries:
        """The samples of tables that have been checked with `require_columns`.

        Raises:
            DatasetError: naming the row at fault, or that there is none.
        """
        every = self._entries(tables)
        # Without a seed the rows beyond the last that is wanted need not be looked at.
        entries = list(every if self.seed is not None else islice(every, self.samples))
        if not entries:
            raise DatasetError(f"{self.path} holds no row")
        return gather(entries, self.samples, self.seed)

    def require_columns(self, table: Table, where: str) -> None:
        """Check that the necessary columns are there, and those that were named.

        Raises:
            DatasetError: if one is missing.
        """
        named = [
            getattr(self, field.name)
            for field in fields(Own)
            if field.name.endswith("_column") and getattr(self, field.name) != field.default
        ]
        needed = [self.image_column, self.question_column, self.answer_column]
        require(table, list(dict.fromkeys(needed + named)), where)

    def _entries(self, tables: Sequence[Table]) -> Iterator[Entry]:
        wanted = [column for column in self.columns if column != self.image_column]
        several = len(tables) > 1
        for number, table in enumerate(tables):
            there = [column for column in wanted if column in table.columns]
            for record in table.records(there):
                default = f"{number}-{record.number:06d}" if several else f"{record.number:06d}"
                yield self._entry(table, record, default)

    def _entry(self, table: Table, record: Record, default: str) -> Entry:
        values = record.values
        options = texts(record, self.options_column, optional=True)
        question = text(record, self.question_column)
        answers, references = self._answers(record, options)
        listed = "".join(
            f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)
        )
        try:
            picture = table.picture(record, self.image_column)
        except PictureError as error:
            raise record.wrong(str(error)) from error
        return Entry(
            where=record.where,
            picture=picture,
            id=name(record, self.id_column, default),
            image_id=name(record, self.image_id_column, getattr(picture, "name", "")),
            question=question + listed + self.suffix,
            answer=answers[0],
            accepted=answers[1:],
            kind=name(record, self.kind_column, ""),
            evidence=boxes(record, values.get(EVIDENCE)),
            options=options,
            references=references,
            scoring=self._scoring(options),
            bar=self.bar,
        )

    def _scoring(self, options: tuple[str, ...]) -> str:
        if self.scoring != "auto":
            return self.scoring
        return "choice" if options else "exact"

    def _answers(
        self, record: Record, options: tuple[str, ...]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The answers, best first, and what each annotator said."""
        scoring, column = self._scoring(options), self.answer_column
        if scoring == "choice":
            if not options:
                raise record.wrong(f"has no {self.options_column!r}; scoring choice needs them")
            return (letter(record, column, options),), ()
        found = texts(record, column)
        if scoring in ("vqa", "textvqa"):
            if len(found) < _PEOPLE:
                raise record.wrong(
                    f"{column!r} holds {len(found)} answers; scoring {scoring} counts how many "
                    f"people said the same and needs at least {_PEOPLE} (ten are usual)"
                )
            return (commonest(found),), found
        if scoring in ("pope", "mme") and found[0].strip().lower() not in ("yes", "no"):
            raise record.wrong(f"{column!r} is {found[0]!r}; scoring {scoring} needs yes or no")
        return found, ()


def commonest(answers: Sequence[str]) -> str:
    """What most people said; the first of those with a tie."""
    return max(dict.fromkeys(answers), key=list(answers).count)


def text(record: Record, column: str) -> str:
    """A text that has to be there.

    Raises:
        DatasetError: if it is missing, empty or something else, such as NaN.
    """
    value = record.values.get(column)
    if column not in record.values:
        raise record.wrong(f"has no {column!r}")
    if not isinstance(value, str) or not value.strip():
        raise record.wrong(f"{column!r} is {value!r}; it has to be a text")
    return value


def name(record: Record, column: str, default: str) -> str:
    """A text or a whole number that may be missing."""
    value = record.values.get(column)
    if value is None or value == "":
        return default
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise record.wrong(f"{column!r} is {value!r}; it has to be a text")
    return str(value)


def texts(record: Record, column: str, *, optional: bool = False) -> tuple[str, ...]:
    """A text, or a list of texts.

    Raises:
        DatasetError: if it is empty or holds anything else.
    """
    value = record.values.get(column)
    if optional and (value is None or value in ("", [])):
        return ()
    if column not in record.values:
        raise record.wrong(f"has no {column!r}")
    found = value if isinstance(value, list) else [value]
    if not found or not all(isinstance(one, str) and one.strip() for one in found):
        raise record.wrong(f"{column!r} is {value!r}; write a text or a list of texts")
    return tuple(found)


def letter(record: Record, column: str, options: tuple[str, ...]) -> str:
    """The letter of the right option, given as its text, its letter, or its index from 0.

    Raises:
        DatasetError: if it is none of the options.
    """
    value = record.values.get(column)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if len(options) > len(LETTERS):
        raise record.wrong(f"has {len(options)} options; at most {len(LETTERS)} have letters")
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(options):
        return LETTERS[value]
    if isinstance(value, str) and options.count(value) == 1:
        return LETTERS[options.index(value)]
    if isinstance(value, str) and len(value) == 1 and value in LETTERS[: len(options)]:
        return value
    raise record.wrong(
        f"{column!r} is {value!r}; write the text of one option, its letter "
        f"(A to {LETTERS[len(options) - 1]}) or its index from 0"
    )


def boxes(record: Record, value: object) -> tuple[Box, ...]:
    """Boxes ``[x0, y0, x1, y1]`` in pixels.

    Raises:
        DatasetError: if it is anything else.
    """
    found: list[Box] = []
    for box in value if isinstance(value, list) else [value] if value else []:
        edges = box if isinstance(box, list) else []
        whole = len(edges) == 4 and all(type(edge) is int and edge >= 0 for edge in edges)
        if not whole or edges[0] >= edges[2] or edges[1] >= edges[3]:
            raise record.wrong(
                f"{EVIDENCE!r} holds {box!r}; write boxes [x0, y0, x1, y1] with x0 < x1"
            )
        found.append((edges[0], edges[1], edges[2], edges[3]))
    return tuple(found)
