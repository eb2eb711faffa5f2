"""The run folder: what is in it, and how it is written so that it can be trusted and resumed.

- ``manifest.json``: what was asked for, with what; its presence makes the folder a run.
- ``scenario.yaml``: the scenario as the user wrote it.
- ``ledger.jsonl``: the trials, see `reports.ledger`.
- ``calibration.json``, ``calibration/ab….safetensors``: scores of detectors on clean samples that
  are not tested, and what they learnt; in runs with detectors.
- ``images/ab/ab….png``: images by the SHA-256 of their bytes.
- ``profile.json``: where the time went, of sessions run with ``--profile``.
- ``summary.json``, ``summary.md``, ``report.html``, ``junit.xml``, ``results.sarif``: made from
  these by `reports.build_reports`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import ValidationError

from reports.artefacts import Artefacts
from reports.errors import ResumeMismatch, StoreError
from reports.files import (
    FileLock,
    explained,
    sweep,
    sync_folder,
    verified,
    write_atomically,
    write_json,
    write_text,
)
from reports.ledger import Key, Ledger, Place
from reports.records import Calibration, Manifest, Trial

MANIFEST, SCENARIO, LEDGER, IMAGES = "manifest.json", "scenario.yaml", "ledger.jsonl", "images"
CALIBRATION, STATES = "calibration.json", "calibration"
PROFILE = "profile.json"
SUMMARY, MARKDOWN, REPORT = "summary.json", "summary.md", "report.html"
JUNIT, SARIF = "junit.xml", "results.sarif"
_LOCK = ".lock"
_MISSING = "(absent)"


class RunStore:
    """One run folder. Make it with `create`, `open`, `create_or_open` or `read`, not directly.

    Attributes:
        folder: the run folder.
        manifest: as stored; a resumed run keeps the manifest it was started with.
        repaired: whether an unfinished last ledger line was cut off on opening.
    """

    def __init__(self, folder: Path, manifest: Manifest, lock: FileLock | None) -> None:
        self.folder, self.manifest, self._lock = folder, manifest, lock
        self._ledger = Ledger(folder / LEDGER)
        self._images = Artefacts(folder / IMAGES)
        self.repaired = False

    @classmethod
    def create(cls, folder: Path, manifest: Manifest, scenario: str = "") -> Self:
        """Start a run in a new or empty folder and lock it.

        Args:
            folder: made with its parents if need be.
            manifest: stored before any trial.
            scenario: text of the scenario file, stored for people.

        Raises:
            RunLockedError: if another process writes there.
            StoreError: if the folder holds something already, or cannot be written.
        """
        with explained("create", folder):
            folder.mkdir(parents=True, exist_ok=True)
            strangers = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        lock = FileLock(folder / _LOCK)
        try:
            # Only a run killed before its manifest leaves an empty ledger; a scenario.yaml alone
            # is somebody's file, not to be overwritten.
            ledger = folder / LEDGER
            ours = ledger.exists() and ledger.stat().st_size == 0
            if set(strangers) - ({SCENARIO, LEDGER} if ours else set()):
                raise StoreError(
                    f"{folder} is not empty ({', '.join(strangers[:5])}); "
                    "give a new --out folder, or that of a run to resume"
                )
            write_atomically(ledger, b"")
            write_text(folder / SCENARIO, scenario)
            write_text(folder / MANIFEST, manifest.as_json(indent=2) + "\n")
            with explained("write", folder):
                sync_folder(folder)
        except BaseException:
            lock.release()
            raise
        return cls(folder, manifest, lock)

    @classmethod
    def open(cls, folder: Path, manifest: Manifest) -> Self:
        """Resume a run: lock it, check that it is the same one, repair its ledger.

        Raises:
            ResumeMismatch: if the folder holds a run of something else.
            RunLockedError: if another process writes there.
            LedgerError: if the ledger is damaged.
            StoreError: if it is no run folder.
        """
        stored = cls._manifest(folder)
        changed = differences(stored, manifest)
        if changed:
            raise ResumeMismatch(folder, changed)
        lock = FileLock(folder / _LOCK)
        store = cls(folder, stored, lock)
        try:
            store.repaired = store._ledger.repair()
            # Not the run folder itself: a report may be being built there without the lock.
            for part in (IMAGES, STATES):
                sweep(folder / part)
        except BaseException:
            lock.release()
            raise
        return store

    @classmethod
    def create_or_open(cls, folder: Path, manifest: Manifest, scenario: str = "") -> Self:
        """`open` if the folder holds a run already, else `create`."""
        if (folder / MANIFEST).exists():
            return cls.open(folder, manifest)
        return cls.create(folder, manifest, scenario)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Look at a run without locking or changing it, even while it is being written.

        Raises:
            StoreError: if it is no run folder.
        """
        return cls(folder, cls._manifest(folder), None)

    @staticmethod
    def _manifest(folder: Path) -> Manifest:
        path = folder / MANIFEST
        if not path.is_file():
            raise StoreError(f"{folder} is not a run folder: it has no {MANIFEST}")
        with explained("read", path):
            text = path.read_bytes()
        try:
            return Manifest.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise StoreError(
                f"{path} cannot be read: {where}: {first['msg']}; "
                "it was changed by hand or written by another version of redteam"
            ) from error

    def append(self, trials: Iterable[Trial]) -> None:
        """Record the trials of one work unit; on return they and their images survive a kill.

        Raises:
            StoreError: if the disk refuses, or the run was opened for reading only.
        """
        self._writable()
        self._images.settle()
        self._ledger.append(trials)

    def trials(self) -> Iterator[Trial]:
        """Every recorded (cell, sample) once; of several lines the last counts.

        Raises:
            LedgerError: at a damaged line.
        """
        return self._ledger.trials()

    def trials_of(self, sample: str) -> list[Trial]:
        """The trials of one sample, one for each cell that has it, in the order of the manifest.

        Raises:
            LedgerError: at a damaged line.
        """
        order = {cell.id: index for index, cell in enumerate(self.manifest.cells)}
        found = list(self._ledger.of_sample(sample))
        return sorted(found, key=lambda trial: order.get(trial.cell, len(order)))

    def located(self) -> Iterator[tuple[Place, Trial]]:
        """As `trials`, each with its place in the ledger.

        Raises:
            LedgerError: at a damaged line.
        """
        return self._ledger.located()

    def trial_at(self, place: Place) -> Trial:
        """The trial at a place: to keep where it lies is cheaper than to keep it.

        Raises:
            LedgerError: if the line is damaged.
        """
        return self._ledger.at(place)

    def done(self, *, errors: bool = True) -> set[Key]:
        """(cell, sample) already recorded; `errors=False` leaves out failed measurements."""
        return self._ledger.keys(errors=errors)

    def save_png(self, data: bytes) -> str:
        """Store an image by content; return the SHA-256 (hex) of its bytes.

        It is on the disk when `append` or `close` returns.

        Raises:
            StoreError: if the run was opened for reading only.
        """
        self._writable()
        return self._images.save(data)

    def image_path(self, name: str) -> Path:
        """Where the image with this content hash is stored."""
        return self._images.path(name)

    def read_png(self, name: str) -> bytes:
        """Bytes of a stored image.

        Raises:
            StoreError: if it is missing or is no longer what was stored.
        """
        return self._images.read(name)

    def calibrations(self) -> list[Calibration]:
        """What detectors were calibrated with so far; empty without any.

        Raises:
            StoreError: if the file cannot be read.
        """
        path = self.folder / CALIBRATION
        try:
            return [Calibration.model_validate(one) for one in _entries(path, "detectors")]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path} cannot be read: {error}; it was changed by hand or written by another "
                "version of redteam"
            ) from error

    def save_calibration(self, found: Calibration, state: bytes | None) -> Calibration:
        """Keep a calibration for good: a resumed run uses it as it is.

        Args:
            found: without the hash of its state.
            state: what the detector learnt; None if it learns nothing.

        Returns:
            It, with that hash.

        Raises:
            StoreError: if the disk refuses, or the run was opened for reading only.
        """
        self._writable()
        if state is not None:
            name = hashlib.sha256(state).hexdigest()
            write_atomically(self._state_path(name), state)
            found = found.model_copy(update={"state": name})
        every = [*self.calibrations(), found]
        data = {"schema": 1, "detectors": [one.model_dump(mode="json") for one in every]}
        write_json(self.folder / CALIBRATION, data)
        return found

    def state(self, name: str) -> bytes:
        """What a detector learnt, by its content hash.

        Raises:
            StoreError: if it is missing or is no longer what was stored.
        """
        return verified(self._state_path(name), name)

    def _state_path(self, name: str) -> Path:
        return self.folder / STATES / f"{name}.safetensors"

    def scenario_text(self) -> str:
        """The scenario as the user wrote it, "" if it was not stored."""
        path = self.folder / SCENARIO
        with explained("read", path):
            return path.read_text(encoding="utf-8") if path.exists() else ""

    def save_profile(self, found: dict[str, Any]) -> None:
        """Add where the time of one session of this run went; a resumed run has several.

        Raises:
            StoreError: if the disk refuses, or the run was opened for reading only.
        """
        self._writable()
        write_json(self.folder / PROFILE, {"schema": 1, "sessions": [*self.profiles(), found]})

    def profiles(self) -> list[dict[str, Any]]:
        """Where the time of each profiled session went; empty without any.

        Raises:
            StoreError: if the file cannot be read.
        """
        path = self.folder / PROFILE
        try:
            return _entries(path, "sessions")
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path} cannot be read: {error}; delete it") from error

    def write_summary(self, summary: dict[str, Any]) -> Path:
        """Write summary.json atomically and return its path."""
        write_json(self.folder / SUMMARY, summary)
        return self.folder / SUMMARY

    def write(self, name: str, text: str) -> Path:
        """Write a text file of the run atomically and return its path."""
        write_text(self.folder / name, text)
        return self.folder / name

    def close(self) -> None:
        """Finish writing and give the lock back."""
        try:
            self._images.settle()
        finally:
            self._images.close()
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except StoreError:
            if error is None:
                raise  # else what went wrong first is the news

    def _writable(self) -> None:
        if self._lock is None:
            raise StoreError(f"{self.folder} is open for reading only; use RunStore.open")


def _entries(path: Path, key: str) -> list[Any]:
    """A list in a JSON file; empty where there is no file."""
    if not path.exists():
        return []
    with explained("read", path):
        text = path.read_text(encoding="utf-8")
    return list(json.loads(text)[key])


def differences(stored: Manifest, now: Manifest) -> list[str]:
    """What keeps a run from being resumed, one line per key: ``key: stored -> now``.

    Compared are the resolved scenario, the seed, cells, samples, and, where both have it,
    ``provenance["identity"]``: hashes of what must not change under a run, such as weights.
    """
    parts: list[tuple[str, Any, Any]] = [
        ("", stored.scenario, now.scenario),
        ("seed", stored.seed, now.seed),
        ("identity", stored.provenance.get("identity"), now.provenance.get("identity")),
    ]
    lines: list[str] = []
    for name, old, new in parts:
        if name == "identity" and (old is None or new is None):
            continue
        before, after = dict(_flat(old, name)), dict(_flat(new, name))
        lines += [
            f"{key}: {before.get(key, _MISSING)} -> {after.get(key, _MISSING)}"
            for key in sorted(before.keys() | after.keys())
            if before.get(key, _MISSING) != after.get(key, _MISSING)
        ]
    if lines:
        return list(dict.fromkeys(lines))  # the seed is usually part of the scenario too
    if [cell.id for cell in stored.cells] != [cell.id for cell in now.cells]:
        lines.append(f"cells: {len(stored.cells)} -> {len(now.cells)}, other ids or another order")
    if stored.samples != now.samples:
        lines.append(f"samples: {len(stored.samples)} -> {len(now.samples)}, other ids or order")
    if not lines and stored.scenario_hash != now.scenario_hash:
        lines.append(f"scenario_hash: {stored.scenario_hash} -> {now.scenario_hash}")
    return lines


def _flat(value: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)) and value:
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{path}[{index}]")
    else:
        yield path, json.dumps(value, ensure_ascii=False, default=str)
