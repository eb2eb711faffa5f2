"""Your own data: a Parquet table, pictures inside it or beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from redteam.datasets.entries import Entries
from redteam.datasets.images import CellPicture, Picture, PictureError
from redteam.datasets.own import Own
from redteam.datasets.tables import MAX_TEXT, Place, Record, find_files
from redteam.errors import DatasetError

MAX_GROUP: Final = 4 << 30
"""Bytes of pictures that one row group may hold, decompressed."""


@dataclass(frozen=True, kw_only=True)
class Parquet(Own):
    """Questions from Parquet files: image, question, answer; optional options, kind and more.

    ``image`` is the bytes of a picture, a path relative to the file, or a struct of ``bytes`` and
    ``path`` as the `datasets` library writes it. ``answer`` and ``options`` are texts or lists of
    texts. Other columns are ignored.

    Args:
        path: of the file, or of a folder with .parquet files at any depth, relative to the
            scenario.
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
        id_column: column of the id; the row number by default.
        image_id_column: column of the picture's id; the hash of the picture by default.
        kind_column: column of the kind of question.
    """

    name: ClassVar[str] = "parquet"
    paths: ClassVar[tuple[str, ...]] = ("path",)

    def open(self) -> Entries:
        """Read and check all rows, and the header of every picture.

        Raises:
            DatasetError: with the row at fault, or if pyarrow is missing.
        """
        files, root = find_files(Path(self.path), ".parquet", deep=True)
        tables = []
        for file in files:
            table = ParquetTable(file, None if self.outside else root)
            self.require_columns(table, str(file))
            tables.append(table)
        return self.gathered(tables)


class ParquetTable:
    """Rows of a Parquet file; pictures are read a row group at a time, when asked for.

    Args:
        path: of the file.
        root: folder that pictures have to lie in; None allows any.

    Raises:
        DatasetError: if it is no Parquet file, or pyarrow is missing.
    """

    def __init__(self, path: Path, root: Path | None) -> None:
        self._path, self._place = path, Place(path.parent, root)
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise missing_extra("Parquet files are", error) from error
        self._trouble: tuple[type[Exception], ...] = (pyarrow.ArrowException, OSError, ValueError)
        try:
            self._file: Any = pyarrow.parquet.ParquetFile(path)
        except self._trouble as error:
            raise DatasetError(f"{path} cannot be read as Parquet: {error}") from error
        self._starts = [0]
        for group in range(self._file.metadata.num_row_groups):
            rows = self._file.metadata.row_group(group).num_rows
            self._starts.append(self._starts[-1] + rows)
        self._held: tuple[int, str, Any] = (-1, "", None)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self._file.schema_arrow.names)

    def records(self, wanted: Sequence[str]) -> Iterator[Record]:
        """All rows, counted from 0."""
        groups = range(len(self._starts) - 1)
        self._check_size(wanted, groups, MAX_TEXT)
        number = 0
        for group in groups:
            for values in self._read(group, list(wanted)).to_pylist():
                yield Record(f"{self._path}: row {number}", number, values)
                number += 1

    def has_picture(self, record: Record, column: str) -> bool:
        """Whether the cell is not null."""
        value = self._value(record.number, column)
        return any(value.values()) if isinstance(value, dict) else bool(value)

    def picture(self, record: Record, column: str) -> Picture:
        """The picture of a row; its column has to be bytes, a text, or a struct of these."""
        self._check_type(column)
        number = record.number
        key = f"{self._path}\0{number}"
        if not self._is_path(column):
            return CellPicture(key, lambda: self._cell(number, column, key))
        return self._place.picture(self._value(number, column), key)

    def _cell(self, number: int, column: str, key: str) -> bytes | Picture:
        value = self._value(number, column)
        found = value.get("bytes") if isinstance(value, dict) else value
        return found if isinstance(found, bytes) else self._place.picture(value, key)

    def _value(self, number: int, column: str) -> Any:  # noqa: ANN401 - any cell
        group = next(i for i, start in enumerate(self._starts[1:]) if number < start)
        if self._held[:2] != (group, column):
            self._check_size([column], [group], MAX_GROUP)
            self._held = (group, column, self._read(group, [column]).column(column))
        return self._held[2][number - self._starts[group]].as_py()

    def _read(self, group: int, columns: list[str]) -> Any:  # noqa: ANN401 - pyarrow.Table
        try:
            return self._file.read_row_group(group, columns=columns, use_threads=False)
        except self._trouble as error:
            first, last = self._starts[group], self._starts[group + 1] - 1
            raise DatasetError(
                f"{self._path}: rows {first} to {last} are damaged: {error}"
            ) from error

    def _check_size(self, wanted: Sequence[str], groups: Iterable[int], most: int) -> None:
        """A small file may claim terabytes: what it says of itself is checked before reading."""
        total = 0
        for group in groups:
            described = self._file.metadata.row_group(group)
            for index in range(described.num_columns):
                part = described.column(index)
                if part.path_in_schema.partition(".")[0] in wanted:
                    total += part.total_uncompressed_size
        if total > most:
            raise DatasetError(
                f"{self._path}: {', '.join(wanted)} take {total >> 20} MiB decompressed; at most "
                f"{most >> 20} MiB are read at a time; write smaller files or row groups"
            )

    def _check_type(self, column: str) -> None:
        kind = self._file.schema_arrow.field(column).type
        names = {kind.field(i).name for i in range(kind.num_fields)} if _is_struct(kind) else set()
        if not (names & {"bytes", "path"} or _plain(kind) in ("binary", "string")):
            raise PictureError(
                f"column {column!r} is of type {kind}; a picture is bytes, a path, or a struct "
                "of bytes and path"
            )

    def _is_path(self, column: str) -> bool:
        return _plain(self._file.schema_arrow.field(column).type) == "string"


def _is_struct(kind: Any) -> bool:  # noqa: ANN401 - pyarrow.DataType
    return str(kind).startswith("struct<")


def _plain(kind: Any) -> str:  # noqa: ANN401 - pyarrow.DataType
    return str(kind).removeprefix("large_").removesuffix("_view")


def missing_extra(what: str, error: ImportError) -> DatasetError:
    """The error for an optional package that is not installed."""
    return DatasetError(
        f"{what} read with {error.name or 'a package'}, which is not installed: "
        'pip install "redteam[data]"'
    )
