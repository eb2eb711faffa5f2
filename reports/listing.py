"""Which runs a folder holds and where each stands, read cheaply and without tripping over any."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from reports.errors import ReportError, StoreError
from reports.files import explained
from reports.records import Manifest
from reports.store import LEDGER, MANIFEST, SUMMARY, RunStore
from reports.verdict import Verdict


class State(StrEnum):
    """How far a run is."""

    COMPLETE = "complete"
    """Every planned trial is recorded."""
    INCOMPLETE = "incomplete"
    """Trials are missing: stopped, or still running."""
    DAMAGED = "damaged"
    """Its manifest or its ledger cannot be read; `Listed.problem` says why."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One run folder.

    Attributes:
        folder: of the run.
        state: how far it is.
        name: of the scenario; that of the folder if the manifest cannot be read.
        created: UTC, ISO 8601; "" if unknown.
        verdict: of its last report; "" if that is missing or saw fewer trials.
        exit_code: likewise; None if unknown.
        cells: how many.
        samples: how many.
        expected: planned trials.
        done: recorded trials, those that ended in an error included.
        errors: of these; None without a report.
        problem: what is damaged; "" if nothing.
    """

    folder: Path
    state: State
    name: str
    created: str = ""
    verdict: str = ""
    exit_code: int | None = None
    cells: int = 0
    samples: int = 0
    expected: int = 0
    done: int = 0
    errors: int | None = None
    problem: str = ""

    def as_json(self) -> dict[str, Any]:
        """For ``redteam runs --json``."""
        return {
            "folder": str(self.folder),
            "state": self.state.value,
            "name": self.name,
            "created": self.created or None,
            "verdict": self.verdict or None,
            "exit_code": self.exit_code,
            "cells": self.cells,
            "samples": self.samples,
            "progress": {"expected": self.expected, "done": self.done, "errors": self.errors},
            "problem": self.problem or None,
        }


def runs(folder: Path) -> list[Listed]:
    """The runs in a folder, newest first, those without a date last.

    A run is a folder with a manifest or a ledger; others are passed over. A folder that is a run
    itself is the one that is listed.

    Raises:
        StoreError: if there is no such folder, or it cannot be read.
    """
    if not folder.is_dir():
        raise StoreError(f"{folder} is no folder; give one that holds run folders")
    with explained("list", folder):
        inside = [folder] if _is_run(folder) else sorted(folder.iterdir())
        found = [_listed(one) for one in inside if _is_run(one)]
    return sorted(found, key=lambda one: (one.created, one.folder.name), reverse=True)


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (MANIFEST, LEDGER))


def _listed(folder: Path) -> Listed:
    try:
        store = RunStore.read(folder)
    except ReportError as error:
        return Listed(folder, State.DAMAGED, folder.resolve().name, problem=str(error))
    manifest, summary = store.manifest, _summary(folder)
    try:
        done = _recorded(summary) if summary and not _newer(folder) else len(store.done())
    except ReportError as error:
        return _told(folder, manifest, State.DAMAGED, problem=str(error))
    complete = done >= len(manifest.cells) * len(manifest.samples)
    state = State.COMPLETE if complete else State.INCOMPLETE
    if summary is None or _recorded(summary) != done:
        return _told(folder, manifest, state, done=done)
    return _told(
        folder,
        manifest,
        state,
        done=done,
        verdict=summary["verdict"],
        exit_code=summary["exit_code"],
        errors=summary["progress"]["errors"],
    )


def _newer(folder: Path) -> bool:
    """Whether the ledger may hold more than the last report saw."""
    with explained("read", folder):
        ledger = folder / LEDGER
        seen = (folder / SUMMARY).stat().st_mtime_ns
        return ledger.exists() and ledger.stat().st_mtime_ns > seen


def _told(folder: Path, manifest: Manifest, state: State, **more: Any) -> Listed:  # noqa: ANN401
    return Listed(
        folder,
        state,
        manifest.name,
        created=manifest.created,
        cells=len(manifest.cells),
        samples=len(manifest.samples),
        expected=len(manifest.cells) * len(manifest.samples),
        **more,
    )


def _recorded(summary: Mapping[str, Any]) -> int:
    progress = summary["progress"]
    return int(progress["measured"]) + int(progress["errors"])


def _summary(folder: Path) -> dict[str, Any] | None:
    """The last report; None if it is missing or not what we write: it can be made again."""
    try:
        found = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        Verdict(found["verdict"])
        _recorded(found)
        return {**found, "exit_code": int(found["exit_code"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
