"""Your own data: one JSON object a line, pictures beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from redteam.datasets.entries import Entries
from redteam.datasets.images import Picture
from redteam.datasets.own import Own
from redteam.datasets.tables import Place, Record, find_files
from redteam.errors import DatasetError, nearest

MAX_FILE: Final = 256 << 20
MAX_LINE: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Jsonl(Own):
    """Questions from a JSON-lines file: image, question, answer; optional options, kind and more.

    Each line holds ``image`` (path relative to the file, inside its folder), ``question``,
    ``answer`` (a text, or a list of accepted texts, the first as the model would spell it), and
    may hold ``options``, ``id``, ``image_id``, ``kind`` and ``evidence`` (boxes
    ``[x0, y0, x1, y1]`` in pixels). Other keys are refused: they are usually misspelt.

    Args:
        path: of the file, or of a folder with .jsonl files, relative to the scenario.
        samples: use only so many; null is all.
        seed: draw them, stratified by kind; null takes the first.
        filter: keep what every target gets right at full tokens (clean_right), and of these what
            it gets wrong on a black image (sighted); null keeps all.
        scoring: what counts as right; auto is choice where there are options, else exact.
        bar: credit above which an answer is right, in [0, 1).
        suffix: appended to each question.
        outside: allow pictures outside the folder of the file.
        image_column: key of the picture.
        question_column: key of the question.
        answer_column: key of the answer or answers.
        options_column: key of the options of a multiple choice.
        id_column: key of the id; the line number by default.
        image_id_column: key of the picture's id; its path by default.
        kind_column: key of the kind of question.
    """

    name: ClassVar[str] = "jsonl"
    paths: ClassVar[tuple[str, ...]] = ("path",)

    def open(self) -> Entries:
        """Read and check all lines, and the header of every picture.

        Raises:
            DatasetError: with the line at fault.
        """
        files, root = find_files(Path(self.path), ".jsonl")
        needed = (self.image_column, self.question_column, self.answer_column)
        tables = [
            JsonTable(file, None if self.outside else root, self.columns, needed) for file in files
        ]
        return self.gathered(tables)


class JsonTable:
    """Lines of a file; see `redteam.datasets.tables.Table`.

    Args:
        path: of the file.
        root: folder that pictures have to lie in; None allows any.
        known: keys that may stand in a line; empty allows all.
        needed: keys that every line has.
    """

    def __init__(
        self,
        path: Path,
        root: Path | None,
        known: Sequence[str] = (),
        needed: Sequence[str] = (),
    ) -> None:
        self._path, self._place = path, Place(path.parent, root)
        self._known, self._needed = tuple(known), tuple(needed)

    @property
    def columns(self) -> tuple[str, ...]:
        """Keys that may be there; without a list of them, those of the first line."""
        if self._known:
            return self._known
        first = next(self.records(()), None)
        return tuple(first.values) if first is not None else ()

    def records(self, wanted: Sequence[str]) -> Iterator[Record]:
        """All lines; they keep all their keys."""
        del wanted
        empty = True
        for number, raw in self._read():
            if raw.strip():
                empty = False
                yield self._parse(number, raw)
        if empty:
            raise DatasetError(f"{self._path} holds no line; write one JSON object a line")

    def has_picture(self, record: Record, column: str) -> bool:
        """Whether a line names one."""
        return bool(record.values.get(column))

    def picture(self, record: Record, column: str) -> Picture:
        """The file a line names."""
        cell = record.values.get(column)
        if not isinstance(cell, str) or not cell.strip():
            raise record.wrong(f"{column!r} is {cell!r}; it has to be a text")
        return self._place.picture(cell, "")

    def _read(self) -> Iterator[tuple[int, bytes]]:
        try:
            if self._path.stat().st_size > MAX_FILE:
                raise DatasetError(f"{self._path} is larger than {MAX_FILE >> 20} MiB; split it")
            with self._path.open("rb") as file:
                number = 0
                while raw := file.readline(MAX_LINE + 1):
                    number += 1
                    if len(raw) > MAX_LINE:
                        raise DatasetError(f"{self._path}:{number}: is longer than 1 MiB")
                    yield number, raw
        except OSError as error:
            raise DatasetError(f"{self._path} cannot be read: {error.strerror}") from error

    def _parse(self, number: int, raw: bytes) -> Record:
        empty = Record(f"{self._path}:{number}", number, {})
        try:
            data = json.loads(raw.decode("utf-8"), parse_constant=_refuse)
        except UnicodeDecodeError as error:
            raise empty.wrong(f"is not UTF-8 at byte {error.start}") from error
        except (ValueError, RecursionError) as error:
            raise empty.wrong(f"is not JSON: {error}") from error
        if b"\\u" in raw and not _whole(data):
            raise empty.wrong("holds half a character (a lone surrogate); write it whole")
        if not isinstance(data, dict):
            raise empty.wrong('is no JSON object; write {"image": …, "question": …}')
        for key in data:
            if self._known and key not in self._known:
                hint, known = nearest(key, self._known), ", ".join(self._known)
                raise empty.wrong(f"unknown key {key!r}; known: {known}; {hint}".rstrip("; "))
        for key in self._needed:
            if key not in data:
                raise empty.wrong(f"has no {key!r}")
        return Record(empty.where, number, data)


def _whole(data: object) -> bool:
    """Whether all texts can be written down again: a lone surrogate is half a character."""
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON value")
