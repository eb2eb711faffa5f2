"""Public benchmarks: where their tables are, and what their columns mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

from annotated_types import Ge

from redteam.datasets.entries import Entries, Entry, gather
from redteam.datasets.hub import HubTable
from redteam.datasets.images import PictureError
from redteam.datasets.jsonl import JsonTable
from redteam.datasets.own import text
from redteam.datasets.parquet import ParquetTable
from redteam.datasets.tables import Record, Table, require
from redteam.errors import DatasetError

_SUFFIXES: Final = (".parquet", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class Published(ABC):
    """Options that all benchmarks share; each class describes them."""

    path: str | None = None
    repo: str = ""
    config: str | None = None
    split: str = "test"
    revision: str | None = None
    samples: Annotated[int, Ge(1)] | None = None
    seed: Annotated[int, Ge(0)] | None = 0
    filter: Literal["sighted", "clean_right"] | None = None
    suffix: str = ""

    paths: ClassVar[tuple[str, ...]] = ("path",)
    wanted: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    together: ClassVar[bool] = False

    def open(self) -> Entries:
        """Read and check all rows, and the header of every picture that is used.

        Raises:
            DatasetError: with the row at fault, or if the data cannot be had.
        """
        guarded = (self._guarded(*row, at) for at, row in enumerate(self._records()))
        entries = [entry for entry in guarded if entry is not None]
        if not entries:
            raise DatasetError(f"{self.path or self.repo} holds no question of these options")
        found = gather(entries, self.samples, self.seed, together=self.together)
        if not len(found):
            raise DatasetError(
                f"samples is {self.samples}, less than the questions about one picture, which "
                "belong together here; use at least 2"
            )
        return found

    @abstractmethod
    def entry(self, table: Table, record: Record, position: int) -> Entry | None:
        """A row in the public layout as a question; None where these options exclude it.

        Args:
            table: it comes from.
            record: the row.
            position: among the rows of all files of the split, from 0.
        """

    def tables(self, config: str | None) -> list[Table]:
        """The tables of a configuration: of the hub, or of a folder of the same layout."""
        if self.path is None:
            return [HubTable(self.repo, config, self.split, self.revision)]
        files, root = local_files(Path(self.path), config, self.split)
        return [
            ParquetTable(file, root) if file.suffix == ".parquet" else JsonTable(file, root)
            for file in files
        ]

    def _records(self) -> Iterator[tuple[Table, Record]]:
        for table in self.tables(self.config):
            require(table, (*self.wanted, "image"), self.path or self.repo)
            there = [column for column in self.optional if column in table.columns]
            for record in table.records([*self.wanted, *there]):
                yield table, record

    def _guarded(self, table: Table, record: Record, position: int) -> Entry | None:
        try:
            return self.entry(table, record, position)
        except PictureError as error:
            raise record.wrong(str(error)) from error


def local_files(path: Path, config: str | None, split: str) -> tuple[list[Path], Path]:
    """Files of a split, in the layout of the hub, and the folder pictures have to lie in.

    A file is taken as it is. In a folder, they are looked for in the folder of the configuration
    (``data`` where there is none), or in the folder itself, as ``SPLIT.parquet`` or
    ``SPLIT-00000-of-00003.parquet`` (or .jsonl).

    Raises:
        DatasetError: if there is none, saying what there is.
    """
    if not path.is_dir():
        return [path], path.parent
    inner = path / (config or "data")
    folder = inner if inner.is_dir() else path
    every = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    found = [file for file in every if file.stem == split or file.stem.startswith(f"{split}-")]
    if found:
        return found, path
    there = ", ".join(file.name for file in every[:8]) or "no .parquet or .jsonl file"
    raise DatasetError(
        f"{folder} holds no {split}.parquet, {split}-….parquet or {split}.jsonl, but {there}; set "
        "split or config, or let path name the file itself"
    )


def yes_or_no(record: Record, spelling: str) -> str:
    """The truth of a yes/no question, as the model spells it.

    Args:
        record: its ``answer`` says yes or no, however written.
        spelling: how the model writes "yes".

    Raises:
        DatasetError: if it says neither.
    """
    value = text(record, "answer").strip().rstrip(".").lower()
    if value not in ("yes", "no"):
        raise record.wrong(f"'answer' is {record.values['answer']!r}; it has to be yes or no")
    return value.capitalize() if spelling == "Yes" else value


def words(record: Record, column: str, values: Sequence[object]) -> tuple[str, ...]:
    """What people answered, empty answers included.

    Raises:
        DatasetError: if there are none, as in test splits, or one is no text.
    """
    if not any(str(value or "").strip() for value in values):
        raise record.wrong(
            f"{column!r} is empty; the answers of test splits are not public, use split: validation"
        )
    for value in values:
        if not isinstance(value, str):
            raise record.wrong(f"{column!r} holds {value!r}; it has to be a text")
    return tuple(str(value) for value in values)
