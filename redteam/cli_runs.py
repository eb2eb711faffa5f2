"""Commands that look at runs that are there: ``runs``, ``show``, ``replay`` and ``export``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from redteam.cli_verdict import BaselineFolder

if TYPE_CHECKING:
    from reports.records import Cell, Trial
    from reports.store import RunStore

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")]
Sample = Annotated[str, typer.Option("--sample", metavar="ID", help="Id of the sample.")]
Cells = Annotated[
    list[str] | None,
    typer.Option(
        "--cell",
        metavar="CELL",
        help="Only these cells: an id or its beginning, or the label of a target, compression, "
        "attack or defence; may be repeated. [default: all]",
    ),
]


class Format(StrEnum):
    """What ``redteam export`` can write."""

    CSV = "csv"
    PARQUET = "parquet"
    MODEL_CARD = "model-card"
    JUNIT = "junit"
    SARIF = "sarif"
    MARKDOWN = "markdown"


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (runs, show, replay, export):
        app.command()(command)


def runs(
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Where to look. [default: runs]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List run folders, newest first: name, date, verdict, cells, progress.

    Exit codes: 0 listed (none found is no error), 2 the folder cannot be read.
    """
    from redteam.output_runs import show_runs
    from reports import listing

    place = folder or Path("runs")
    absent = folder is None and not place.exists()
    show_runs(place, [] if absent else listing.runs(place), as_json=as_json)


def show(
    run_folder: RunFolder, sample: Sample, cell: Cells = None, as_json: AsJson = False
) -> None:
    """Tell what happened to one sample: answers, distance, tokens kept, cause; needs no torch.

    Exit codes: 0 shown, 2 no such run, sample or cell, 3 the ledger is damaged, 5 the sample is
    planned but was not run.
    """
    from redteam.output_runs import show_sample
    from reports.store import RunStore

    store = RunStore.read(run_folder)
    show_sample(store, chosen(store, sample, cell), as_json=as_json)


def replay(
    run_folder: RunFolder,
    sample: Sample,
    cell: Cells = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda … [default: the one of the run]")
    ] = None,
    relative_to: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder that relative paths of the scenario start at. "
            "[default: that of the scenario the run was started with]",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask one sample again from its saved images and compare with the record.

    Exit codes: 0 everything is as recorded, 1 something differs, 2 no such run, sample or cell,
    3 it cannot be replayed (an image is missing, the weights are others, the target does not
    load), 5 there is nothing to compare: not run, or it ended in an error.
    """
    from redteam.output_runs import show_replayed, stderr
    from reports.store import RunStore

    store = RunStore.read(run_folder)
    trials = chosen(store, sample, cell)
    quieten()
    with stderr().status("loading …"):
        from redteam.replaying import Replayer

        replayer = Replayer(store, device=device, folder=relative_to)
        found = replayer.replay(trials)
    raise typer.Exit(show_replayed(store, trials[0], found, as_json=as_json))


def export(
    run_folder: RunFolder,
    name: Annotated[Format, typer.Option("--format", help="What to write.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File. [default: in the run folder]")
    ] = None,
    baseline: BaselineFolder = None,
) -> None:
    """Write a run in another format; needs no torch.

    Exit codes: 0 written, 2 it is no run folder, or a package for the format is missing, 3 the run
    is damaged or the file cannot be written.
    """
    from redteam.output_runs import show_exported
    from reports.export import export as write

    show_exported(write(run_folder, name.value, out, baseline))


def quieten() -> None:
    """Keep transformers from talking over us; whoever wants to hear it sets these."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def chosen(store: RunStore, sample: str, wanted: Sequence[str] | None) -> list[Trial]:
    """The trials of a sample in the cells that are asked for, at least one.

    Raises:
        UsageError: if the run plans no such sample or cell, with what is near.
        NothingSelected: if it is planned and was not run.
    """
    from redteam.errors import NothingSelected, UsageError, nearest

    planned = store.manifest.samples
    if sample not in set(planned):
        hint = nearest(sample, planned)
        some = ", ".join(repr(one) for one in planned[:3])
        raise UsageError(
            f"--sample {_quoted(sample)}: {store.folder} has no such sample; it has "
            f"{len(planned):,}: {_inert(some)}" + (" …" if len(planned) > 3 else "")
            + (f"; {_inert(hint)}" if hint else "")
        )  # fmt: skip
    cells = {cell.id for one in wanted or [""] for cell in _named(store, one)}
    found = [trial for trial in store.trials_of(sample) if trial.cell in cells]
    if not found:
        raise NothingSelected(
            f"sample {_quoted(sample)} is planned in {store.folder}, but was not run in "
            f"{'these cells' if wanted else 'any cell'}; run the scenario again with "
            "--out of this folder to resume"
        )
    return found


def _named(store: RunStore, wanted: str) -> list[Cell]:
    """Cells by the beginning of their id, or by the label of one of their methods."""
    from redteam.errors import UsageError, nearest

    cells = store.manifest.cells
    found = [
        cell
        for cell in cells
        if cell.id.startswith(wanted)
        or wanted in (cell.target, cell.compression, cell.attack, cell.defense)
    ]
    if found:
        return found
    labels = list(dict.fromkeys(one for cell in cells for one in (cell.attack, cell.compression)))
    hint = nearest(wanted, [*labels, *(cell.id for cell in cells)])
    raise UsageError(
        f"--cell {_quoted(wanted)}: no cell of {store.folder} has this id or label; allowed are "
        f"ids such as {_inert(', '.join(cell.id for cell in cells[:3]))}, and labels: "
        f"{_inert(', '.join(labels[:20]))}" + (f"; {_inert(hint)}" if hint else "")
    )


def _inert(text: str) -> str:
    from reports.text import plain

    return plain(text)


def _quoted(text: str) -> str:
    return repr(_inert(text))
