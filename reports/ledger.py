"""The ledger: an append-only file of trials, one a line, each with its checksum.

A line is ``{"sha256": "<16 hex>", "trial": {…}}``; the checksum is over the bytes of the trial as
written. A unit of work is appended in one write, flushed and fsynced, so a killed writer can only
leave one unfinished line, the last. Such a line is ignored by readers and cut off by the next
writer. Any other damage is an error, because nothing we do explains it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError
from pydantic_core import to_json

from reports.errors import LedgerError
from reports.files import explained
from reports.records import Trial

_HEAD, _MIDDLE, _TAIL = b'{"sha256": "', b'", "trial": ', b"}\n"
_DIGITS = 16
_MEASURED = b'"error":null}'
"""How a trial without an error ends as we write it: the error is its last field."""
_KEY = re.compile(rb'\{"schema_version":1,"cell":"([^"\\]*)","sample":"([^"\\]*)",')
"""How it begins, where neither name needs an escape."""
Key = tuple[str, str]
"""(cell, sample)."""


class Place(NamedTuple):
    """Where a line lies; it stays there, since nothing is ever inserted before it."""

    number: int
    offset: int
    length: int


class Ledger:
    """Reads and appends trials.

    Of several lines with the same cell and sample the last one counts: a trial that ended in an
    error may be measured again, and its old line stays as history.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._torn: int | None = None
        """Where half a unit begins that could not be taken back."""

    def append(self, trials: Iterable[Trial]) -> None:
        """Append trials as one unit; on return they are on the disk.

        Raises:
            StoreError: if the disk refuses; the ledger is then as it was before.
        """
        data = b"".join(_line(trial) for trial in trials)
        if not data:
            return
        # Unbuffered: closing a buffered file writes what a full disk has left in the buffer, behind
        # the end to which the ledger was cut back.
        with explained("append to", self.path), self.path.open("ab", buffering=0) as file:
            if self._torn is not None:
                file.truncate(self._torn)
                self._torn = None
            size = file.seek(0, os.SEEK_END)
            try:
                _write_all(file, data)
                os.fsync(file.fileno())
            except BaseException:
                self._torn = size
                file.truncate(size)
                self._torn = None
                raise

    def trials(self) -> Iterator[Trial]:
        """Every (cell, sample) once, its last line, in the order of those lines.

        Raises:
            LedgerError: at a damaged line.
        """
        return (trial for _, trial in self.located())

    def located(self) -> Iterator[tuple[Place, Trial]]:
        """As `trials`, each with its place, from which `at` reads it again.

        Raises:
            LedgerError: at a damaged line.
        """
        # Two readings: the first only looks at keys, so that a superseded line is never parsed.
        last = {key: place.number for place, _, key in self._keys()}
        current = set(last.values())
        for place, payload in self._lines():
            if place.number in current:
                yield place, self._parse(place.number, payload)

    def at(self, place: Place) -> Trial:
        """The trial of one line.

        Raises:
            LedgerError: if the line is damaged.
        """
        with explained("read", self.path), self.path.open("rb") as file:
            file.seek(place.offset)
            line = file.read(place.length)
        return self._parse(place.number, self._verified(place.number, line))

    def of_sample(self, sample: str) -> Iterator[Trial]:
        """The trials of one sample, as `trials` has them; only its lines are parsed.

        Raises:
            LedgerError: at a damaged line.
        """
        mark = b'"sample":' + to_json(sample)
        found: dict[str, Trial] = {}
        for place, payload in self._lines():
            if mark in payload:
                trial = self._parse(place.number, payload)
                if trial.sample == sample:  # an answer may quote the mark
                    found[trial.cell] = trial
        yield from found.values()

    def keys(self, *, errors: bool = True) -> set[Key]:
        """(cell, sample) of what is recorded; `errors=False` leaves out those that ended in one."""
        last = {key: self._kept(place, payload, errors) for place, payload, key in self._keys()}
        return {key for key, kept in last.items() if kept}

    def _kept(self, place: Place, payload: bytes, errors: bool) -> bool:
        if errors or payload.endswith(_MEASURED):
            return True
        return self._parse(place.number, payload).error is None

    def repair(self) -> bool:
        """Cut off an unfinished last line; True if there was one.

        Raises:
            LedgerError: at a damaged line that a killed writer does not explain.
        """
        end = 0
        for place, _ in self._lines():
            end = place.offset + place.length
        with explained("repair", self.path):
            if not self.path.exists() or self.path.stat().st_size == end:
                return False
            os.truncate(self.path, end)
        return True

    def _lines(self) -> Iterator[tuple[Place, bytes]]:
        """Yield the place and the trial's bytes of every good line."""
        if not self.path.exists():
            return
        offset = 0
        with explained("read", self.path), self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return  # only the last line can lack its end: a killed writer
                yield Place(number, offset, len(line)), self._verified(number, line)
                offset += len(line)

    def _keys(self) -> Iterator[tuple[Place, bytes, Key]]:
        for place, payload in self._lines():
            yield place, payload, self._key(place.number, payload)

    def _key(self, number: int, payload: bytes) -> Key:
        try:
            if found := _KEY.match(payload):
                return found[1].decode(), found[2].decode()
            record = json.loads(payload)
            cell, sample = record["cell"], record["sample"]
        except (KeyError, TypeError) as error:
            raise LedgerError(self._damaged(number, f"it has no {error}")) from error
        except (ValueError, RecursionError) as error:
            raise LedgerError(self._damaged(number, f"it is no JSON: {error}")) from error
        if not (isinstance(cell, str) and isinstance(sample, str)):
            raise LedgerError(self._damaged(number, "its cell or sample is no text"))
        return cell, sample

    def _verified(self, number: int, line: bytes) -> bytes:
        start = len(_HEAD) + _DIGITS + len(_MIDDLE)
        digest, payload = line[len(_HEAD) : len(_HEAD) + _DIGITS], line[start : -len(_TAIL)]
        if line != _HEAD + digest + _MIDDLE + payload + _TAIL:
            raise LedgerError(self._damaged(number, "it is not a ledger line"))
        if _checksum(payload) != digest:
            raise LedgerError(self._damaged(number, "its checksum does not match"))
        return payload

    def _parse(self, number: int, payload: bytes) -> Trial:
        try:
            return Trial.model_validate_json(payload)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the line"
            reason = f"{where}: {first['msg']} (written by another version of redteam?)"
            raise LedgerError(self._damaged(number, reason)) from error

    def _damaged(self, number: int, reason: str) -> str:
        return (
            f"{self.path} line {number} is damaged: {reason}. It was changed after it was "
            f"written. Delete line {number} and run again with the same --out: only that trial "
            "is measured again."
        )


def _write_all(file: FileIO, data: bytes) -> None:
    left = memoryview(data)
    while left:  # a disk that is about to be full takes a part
        left = left[file.write(left) :]


def _checksum(payload: bytes) -> bytes:
    return hashlib.sha256(payload).hexdigest()[:_DIGITS].encode()


def _line(trial: Trial) -> bytes:
    payload = trial.as_json().encode()
    return _HEAD + _checksum(payload) + _MIDDLE + payload + _TAIL
