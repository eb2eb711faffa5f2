"""Your own data: a table as spreadsheets write it, pictures beside it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from redteam.datasets.entries import Entries
from redteam.datasets.images import Picture
from redteam.datasets.own import EVIDENCE, Own
from redteam.datasets.tables import Place, Record, find_files
from redteam.errors import DatasetError

MAX_FILE: Final = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Csv(Own):
    """Questions from a CSV file with a header: image, question, answer; optional options, kind.

    UTF-8, with or without a byte order mark. ``image`` is a path relative to the file, inside its
    folder. Several answers or options stand in one cell, parted by `separator`; boxes of
    ``evidence`` are written as in JSON. Other columns are ignored.

    Args:
        path: of the file, or of a folder with .csv files, relative to the scenario.
        samples: use only so many; null is all.
        seed: draw them, stratified by kind; null takes the first.
        filter: keep what every target gets right at full tokens (clean_right), and of these what
            it gets wrong on a black image (sighted); null keeps all.
        scoring: what counts as right; auto is choice where there are options, else exact.
        bar: credit above which an answer is right, in [0, 1).
        suffix: appended to each question.
        outside: allow pictures outside the folder of the file.
        image_column: column of the picture.
        question_column: column of the question.
        answer_column: column of the answer or answers.
        options_column: column of the options of a multiple choice.
        id_column: column of the id; the line number by default.
        image_id_column: column of the picture's id; its path by default.
        kind_column: column of the kind of question.
        separator: parts several answers or options in a cell; empty never parts them.
        delimiter: between cells, one character.
    """

    name: ClassVar[str] = "csv"
    paths: ClassVar[tuple[str, ...]] = ("path",)

    separator: str = "|"
    delimiter: str = ","

    def __post_init__(self) -> None:
        if len(self.delimiter) != 1 or self.delimiter in '"\r\n':
            raise DatasetError(
                f"delimiter is {self.delimiter!r}; allowed: one character, no quotation mark and "
                'no end of line; a tab is "\\t"'
            )

    def open(self) -> Entries:
        """Read and check all rows, and the header of every picture.

        Raises:
            DatasetError: with the line at fault.
        """
        files, root = find_files(Path(self.path), ".csv")
        tables = []
        for file in files:
            table = CsvTable(file, None if self.outside else root, self)
            self.require_columns(table, str(file))
            tables.append(table)
        return self.gathered(tables)


class CsvTable:
    """Rows of a file; see `redteam.datasets.tables.Table`.

    Args:
        path: of the file.
        root: folder that pictures have to lie in; None allows any.
        options: how cells are parted.

    Raises:
        DatasetError: if there is no header.
    """

    def __init__(self, path: Path, root: Path | None, options: Csv) -> None:
        self._path, self._place, self._options = path, Place(path.parent, root), options
        header = next(self._rows(), None)
        if header is None:
            raise DatasetError(f"{path} is empty; its first line names the columns")
        self._columns = tuple(cell.strip() for cell in header[1])
        for column in self._columns:
            if self._columns.count(column) > 1:
                raise DatasetError(f"{path}:1: column {column!r} is there twice")

    @property
    def columns(self) -> tuple[str, ...]:
        """Names in the header."""
        return self._columns

    def records(self, wanted: Sequence[str]) -> Iterator[Record]:
        """All rows; an error names the line a row begins in."""
        rows = self._rows()
        next(rows)
        for line, cells in rows:
            if not cells:
                continue
            values = dict(zip(self._columns, cells, strict=False))
            record = Record(f"{self._path}:{line}", line, values)
            if len(cells) != len(self._columns):
                raise record.wrong(
                    f"has {len(cells)} cells; the header names {len(self._columns)} columns; a "
                    "text with the delimiter in it stands in quotation marks"
                )
            yield self._typed(record, wanted)

    def has_picture(self, record: Record, column: str) -> bool:
        """Whether a row names one."""
        return bool(record.values[column])

    def picture(self, record: Record, column: str) -> Picture:
        """The file a row names."""
        return self._place.picture(record.values[column], "")

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        try:
            if self._path.stat().st_size > MAX_FILE:
                raise DatasetError(f"{self._path} is larger than {MAX_FILE >> 20} MiB; split it")
            with self._path.open("rb") as file:
                reader = csv.reader(
                    self._decoded(file), delimiter=self._options.delimiter, strict=True
                )
                line = 1
                try:
                    for cells in reader:
                        yield line, cells
                        line = reader.line_num + 1
                except csv.Error as error:
                    raise DatasetError(f"{self._path}:{line}: is not CSV: {error}") from error
        except OSError as error:
            raise DatasetError(f"{self._path} cannot be read: {error.strerror}") from error

    def _decoded(self, file: Any) -> Iterator[str]:  # noqa: ANN401 - a binary file
        """Lines as text: decoded one by one, so that an error has a line."""
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DatasetError(
                    f"{self._path}:{number}: is not UTF-8 at byte {error.start} of the line; "
                    "save the file as UTF-8"
                ) from error
            if "\0" in line:
                raise DatasetError(f"{self._path}:{number}: holds a NUL byte; it is no text")
            yield line

    def _typed(self, record: Record, wanted: Sequence[str]) -> Record:
        """Lists where lists are meant."""
        values: dict[str, object] = dict(record.values)
        own = self._options
        for column in {own.answer_column, own.options_column} & set(wanted):
            cell = str(values[column])
            if own.separator and own.separator in cell:
                values[column] = [part.strip() for part in cell.split(own.separator)]
        if values.get(EVIDENCE):
            try:
                values[EVIDENCE] = json.loads(str(values[EVIDENCE]))
            except (ValueError, RecursionError) as error:
                raise record.wrong(f"{EVIDENCE!r} is not JSON: {error}") from error
        return Record(record.where, record.number, values)
