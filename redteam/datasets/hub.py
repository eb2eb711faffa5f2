"""Tables of the Hugging Face hub, through the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from redteam.datasets.images import CellPicture, Picture
from redteam.datasets.parquet import missing_extra
from redteam.datasets.tables import Record, missing
from redteam.errors import DatasetError


class HubTable:
    """A split of a data set on the hub; see `redteam.datasets.tables.Table`.

    It is downloaded once and kept where `datasets` keeps things. Only data is read: data sets that
    bring code to be run are refused by the library.

    Args:
        repo: id on the hub.
        config: its configuration; None for the only one.
        split: name of the split.
        revision: commit, tag or branch; None for the newest.

    Raises:
        DatasetError: if it cannot be had, or `datasets` is missing.
    """

    def __init__(self, repo: str, config: str | None, split: str, revision: str | None) -> None:
        self._name = f"{repo}{f'/{config}' if config else ''}, split {split}"
        try:
            import datasets
        except ImportError as error:
            raise missing_extra("Data sets of the hub are", error) from error
        try:
            self._rows: Any = datasets.load_dataset(repo, config, split=split, revision=revision)
            for column, feature in self._rows.features.items():
                if isinstance(feature, datasets.Image):
                    # Decoding is ours: its limits come before the first pixel.
                    raw = datasets.Image(decode=False)
                    self._rows = self._rows.cast_column(column, raw)
        except Exception as error:
            # The library raises what its many parts raise; all of it means the same here.
            raise DatasetError(
                f"{self._name} cannot be loaded: {type(error).__name__}: {error}; without a "
                f"connection, fetch it elsewhere (hf download {repo} --repo-type dataset "
                "--local-dir FOLDER) and set path: FOLDER"
            ) from error

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self._rows.column_names)

    def records(self, wanted: Sequence[str]) -> Iterator[Record]:
        """All rows, counted from 0."""
        for number, values in enumerate(self._rows.select_columns(list(wanted))):
            yield Record(f"{self._name}: row {number}", number, values)

    def has_picture(self, record: Record, column: str) -> bool:
        """Whether the cell is not null."""
        value = self._rows[record.number][column]
        return any(value.values()) if isinstance(value, dict) else bool(value)

    def picture(self, record: Record, column: str) -> Picture:
        """The picture of a row, which is bytes."""
        key = f"{self._name}\0{record.number}"
        return CellPicture(key, lambda: self._cell(record.number, column))

    def _cell(self, number: int, column: str) -> bytes:
        value = self._rows[number][column]
        found = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(found, bytes):
            return found
        # A path alone would let a data set of others name any picture of this machine.
        raise missing(found)
