"""Tables of questions: rows with named values and, apart from them, pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from redteam.datasets.images import CellPicture, Picture, PictureError, locate
from redteam.errors import DatasetError, nearest

MAX_TEXT: Final = 1 << 30
"""Bytes of questions and answers that one table may hold, decompressed."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row without its picture.

    Attributes:
        where: ``file:line`` or ``file: row n``, for messages.
        number: of the row in its table.
        values: by column.
    """

    where: str
    number: int
    values: Mapping[str, object]

    def wrong(self, message: str) -> DatasetError:
        """An error that names this row."""
        return DatasetError(f"{self.where}: {message}")


class Table(Protocol):
    """Rows in order; see `Record`."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns."""
        ...

    def records(self, wanted: Sequence[str]) -> Iterator[Record]:
        """All rows with the wanted columns.

        Raises:
            DatasetError: naming the row that cannot be read.
        """
        ...

    def has_picture(self, record: Record, column: str) -> bool:
        """Whether a row has a picture at all; it may be a bad one."""
        ...

    def picture(self, record: Record, column: str) -> Picture:
        """The picture of a row, unread.

        Raises:
            PictureError: if it is no picture, or may not be read.
        """
        ...


def require(table: Table, wanted: Sequence[str], where: str) -> None:
    """Check that a table has columns.

    Raises:
        DatasetError: naming the column, what there is, and the nearest.
    """
    for column in wanted:
        if column not in table.columns:
            hint = nearest(column, table.columns)
            raise DatasetError(
                f"{where} has no column {column!r}; it has: {', '.join(table.columns)}"
                + (f"; {hint}" if hint else "")
            )


def find_files(path: Path, suffix: str, *, deep: bool = False) -> tuple[list[Path], Path]:
    """The files a path stands for, sorted, and the folder their pictures have to lie in.

    Args:
        path: a file, or a folder with files of one kind.
        suffix: of the files in a folder.
        deep: look into folders of the folder too.

    Raises:
        DatasetError: if there is none.
    """
    if not path.is_dir():
        return [path], path.parent
    found = sorted(path.rglob(f"*{suffix}") if deep else path.glob(f"*{suffix}"))
    found = [one for one in found if one.is_file()]
    if not found:
        raise DatasetError(f"{path} holds no {suffix} file; name the file itself, or another type")
    return found, path


@dataclass(frozen=True, slots=True)
class Place:
    """Where paths in a table start and end.

    Attributes:
        folder: they are relative to.
        root: they have to lie in; None allows any place.
    """

    folder: Path
    root: Path | None

    def picture(self, cell: object, key: str) -> Picture:
        """The picture a cell holds: a path, bytes, or both in a struct as `datasets` writes it.

        Raises:
            PictureError: if it holds neither.
        """
        if isinstance(cell, str) and cell.strip():
            return locate(cell, self.folder, self.root)
        if isinstance(cell, bytes) and cell:
            return CellPicture(key, lambda: cell)
        if isinstance(cell, Mapping):
            return self.picture(cell.get("bytes") or cell.get("path"), key)
        raise missing(cell)


def missing(cell: object) -> PictureError:
    """The error for a cell that holds no picture."""
    shown = "empty" if cell is None or cell == "" else f"{cell!r}"[:60]
    return PictureError(f"image is {shown}; it has to be a path or the bytes of a picture")
