"""Everything that reads what others wrote, as functions of bytes; each has one kind of error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from redteam.datasets.csv import Csv
from redteam.datasets.jsonl import Jsonl
from redteam.datasets.parquet import Parquet
from redteam.errors import DatasetError, ScenarioError
from redteam.scenario import load_scenario
from reports.errors import LedgerError, StoreError
from reports.ledger import Ledger
from reports.store import MANIFEST, RunStore

Reader = Callable[[bytes, Path], object]


def scenario(data: bytes, folder: Path) -> None:
    """A scenario file."""
    path = folder / "fuzz.yaml"
    path.write_bytes(data)
    load_scenario(path)


def ledger(data: bytes, folder: Path) -> None:
    """A ledger, in every way it is read."""
    path = folder / "ledger.jsonl"
    path.write_bytes(data)
    found = Ledger(path)
    problems = []
    for read in (found.keys, lambda: found.keys(errors=False), lambda: list(found.trials())):
        try:
            read()
        except LedgerError as error:
            problems.append(error)
    assert path.read_bytes() == data, "reading does not write"
    found.repair()
    assert data.startswith(path.read_bytes()), "a repair only cuts"
    if problems:
        raise problems[0]


def manifest(data: bytes, folder: Path) -> None:
    """The manifest of a run folder."""
    (folder / MANIFEST).write_bytes(data)
    RunStore.read(folder)


def _pictures(folder: Path) -> None:
    if not (folder / "a.png").exists():
        Image.new("RGB", (6, 4), "red").save(folder / "a.png")


def jsonl(data: bytes, folder: Path) -> None:
    """A data set of JSON lines, with all its samples."""
    _pictures(folder)
    (folder / "fuzz.jsonl").write_bytes(data)
    opened = Jsonl(path=str(folder / "fuzz.jsonl")).open()
    assert opened.identity
    assert [one.id for one in opened] == list(opened.ids)


def csv(data: bytes, folder: Path) -> None:
    """A data set as a table of text, with all its samples."""
    _pictures(folder)
    (folder / "fuzz.csv").write_bytes(data)
    opened = Csv(path=str(folder / "fuzz.csv")).open()
    assert opened.identity
    assert [one.id for one in opened] == list(opened.ids)


def parquet(data: bytes, folder: Path) -> None:
    """A Parquet file, with all its samples."""
    _pictures(folder)
    (folder / "fuzz.parquet").write_bytes(data)
    opened = Parquet(path=str(folder / "fuzz.parquet")).open()
    assert opened.identity
    assert [one.id for one in opened] == list(opened.ids)


def picture(data: bytes, folder: Path) -> None:
    """A picture in a data set."""
    (folder / "b.png").write_bytes(data)
    line = b'{"image": "b.png", "question": "?", "answer": "x"}\n'
    (folder / "one.jsonl").write_bytes(line)
    for sample in Jsonl(path=str(folder / "one.jsonl")).open():
        assert sample.image.ndim == 3


READERS: dict[str, tuple[Reader, type[Exception]]] = {
    "scenario": (scenario, ScenarioError),
    "ledger": (ledger, LedgerError),
    "manifest": (manifest, StoreError),
    "jsonl": (jsonl, DatasetError),
    "csv": (csv, DatasetError),
    "parquet": (parquet, DatasetError),
    "picture": (picture, DatasetError),
}


def read(kind: str, data: bytes, folder: Path) -> Any:
    """The error that a reader raises, or None; anything else it raises goes through."""
    reader, expected = READERS[kind]
    try:
        reader(data, folder)
    except expected as error:
        return error
    return None
