"""What commands on runs that are there print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.table import Table
from rich.text import Text

from redteam.output import stderr, stdout
from reports import story
from reports.listing import Listed, State
from reports.text import count, plain
from reports.verdict import ExitCode

if TYPE_CHECKING:
    from redteam.replaying import Replayed
    from reports.records import Trial
    from reports.store import RunStore

__all__ = ["show_exported", "show_replayed", "show_runs", "show_sample", "stderr"]

_STYLES: Final = {
    "pass": "green", "fail": "red", "inconclusive": "yellow", "not_gated": "", "": "dim"
}  # fmt: skip


def _json(data: object) -> None:
    """JSON in ASCII: the texts of a run may hold what must not reach a terminal raw."""
    text = json.dumps(data, indent=2, ensure_ascii=True, allow_nan=False)
    stdout().file.write(text + "\n")


def show_runs(place: Path, found: Sequence[Listed], *, as_json: bool) -> None:
    """The end of ``redteam runs``."""
    if as_json:
        _json([one.as_json() for one in found])
        return
    console = stdout()
    if not found:
        console.print(Text(f"no run in {_path(place)}; start with: redteam run quickstart"))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("date (UTC)", "name", "verdict", "cells", "progress", "folder"):
        table.add_column(name, justify="right" if name == "cells" else "left", overflow="fold")
    for one in found:
        damaged = one.state is State.DAMAGED
        verdict = "damaged" if damaged else one.verdict.replace("_", " ") or "no report"
        table.add_row(
            Text(plain(one.created[:16].replace("T", " "), 40) or "—"),
            Text(plain(one.name, 60)),
            Text(verdict, style="bold red" if damaged else _STYLES[one.verdict]),
            Text(f"{one.cells:,}" if one.cells else "—"),
            Text(_progress(one)),
            Text(_path(one.folder)),
        )
    console.print(table)
    for one in found:
        if one.problem:
            console.print(Text(f"! {plain(one.problem)}", style="yellow"), soft_wrap=True)
    console.print(Text("one sample of a run: redteam show RUN --sample ID", style="dim"))


def _progress(one: Listed) -> str:
    if one.state is State.DAMAGED:
        return "—"
    errors = f", {count(one.errors, 'error')}" if one.errors else ""
    return f"{one.done:,} of {one.expected:,}{errors}"


def _path(path: Path) -> str:
    return plain(str(path), 200)


def show_sample(store: RunStore, trials: Sequence[Trial], *, as_json: bool) -> None:
    """The end of ``redteam show``: the sample, then one block for each cell."""
    cells = {cell.id: cell for cell in store.manifest.cells}
    if as_json:
        _json(
            {
                "folder": str(store.folder),
                "sample": trials[0].sample,
                "trials": [trial.model_dump(mode="json") for trial in trials],
            }
        )
        return
    console = stdout()
    first, *rest = story.heading(trials[0])
    console.print(Text(first, style="bold"), soft_wrap=True)
    for line in rest:
        console.print(Text(line), soft_wrap=True)
    for trial in trials:
        console.print()
        first, *rest = story.story(trial, cells[trial.cell], store.folder)
        console.print(Text(first, style="bold"), soft_wrap=True)
        for line in rest:
            console.print(Text(line), soft_wrap=True)


def show_replayed(
    store: RunStore, trial: Trial, found: Sequence[Replayed], *, as_json: bool
) -> ExitCode:
    """The end of ``redteam replay``: cell by cell, the same or what differs.

    Returns:
        PASS if everything is as recorded, else FAIL.
    """
    differs = sum(bool(one.differences) for one in found)
    code = ExitCode.FAIL if differs else ExitCode.PASS
    if as_json:
        _json(
            {
                "folder": str(store.folder),
                "sample": trial.sample,
                "exit_code": int(code),
                "cells": [one.as_json() for one in found],
            }
        )
        return code
    console = stdout()
    for line in story.heading(trial):
        console.print(Text(line), soft_wrap=True)
    for note in dict.fromkeys(note for one in found for note in one.notes):
        console.print(Text(f"! {plain(note)}", style="yellow"), soft_wrap=True)
    for one in found:
        word = "differs" if one.differences else "as recorded"
        style = "bold red" if one.differences else "green"
        console.print(
            Text(f"{word:12}", style=style)
            + Text(f"{one.cell.id}  {one.label}: {', '.join(one.compared)}"),
            soft_wrap=True,
        )
        for what in one.differences:
            line = f"  {what.what}: recorded {plain(what.recorded)!r}, now {plain(what.now)!r}"
            console.print(Text(line), soft_wrap=True)
    same = len(found) - differs
    console.print(Text(f"{same} of {count(len(found), 'cell')} as recorded", style="bold"))
    return code


def show_exported(path: Path) -> None:
    """The end of ``redteam export``."""
    stdout().print(Text(f"wrote {_path(path)}"), soft_wrap=True)
