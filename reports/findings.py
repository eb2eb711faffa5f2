"""Which failures a report shows, and the ones it lists: chosen the same way every time."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from reports.records import Trial
from reports.store import RunStore

SHOWN = 24
"""Findings with pictures in one report; the rest are listed, and all are in the run folder."""
LISTED = 400
"""Rows of the list of findings; what is beyond is in the ledger."""
ERRORS = 100
"""Errors listed."""


@dataclass(frozen=True, slots=True)
class Findings:
    """Compression-specific failures and errors of a run.

    Attributes:
        shown: with pictures, at most `SHOWN`, taken in turn from the cells.
        listed: of the others, at most `LISTED`.
        total: all compression-specific failures.
        errors: trials that could not be measured, at most `ERRORS`.
        errors_total: all of them.
        checks: how often each self-check fired on a sample, by its code, with one message; what
            an attack noted, by the whole of it.
    """

    shown: tuple[Trial, ...]
    listed: tuple[Trial, ...]
    total: int
    errors: tuple[Trial, ...]
    errors_total: int
    checks: dict[str, tuple[int, str]]


def collect(store: RunStore) -> Findings:
    """Read a run and pick its findings, cells with most of them first; equal runs give equal picks.

    Within a cell the order is that of the manifest, so nothing is picked for its looks.
    """
    samples = {sample: index for index, sample in enumerate(store.manifest.samples)}
    by_cell: dict[str, list[Trial]] = defaultdict(list)
    errors: list[Trial] = []
    checks: dict[str, list[str]] = defaultdict(list)
    total = 0
    for trial in store.trials():
        for check in trial.checks:
            code = check.partition(":")[0]
            checks[check if code == "note" else code].append(check)
        if trial.error is not None:
            errors.append(trial)
        elif trial.compression_specific_failure:
            total += 1
            by_cell[trial.cell].append(trial)
    for trials in by_cell.values():
        trials.sort(key=lambda trial: samples.get(trial.sample, len(samples)))
    cells = [cell.id for cell in store.manifest.cells]
    position = {cell: index for index, cell in enumerate(cells)}
    errors.sort(key=lambda t: (position[t.cell], samples.get(t.sample, len(samples))))
    worst_first = sorted(by_cell, key=lambda cell: (-len(by_cell[cell]), position[cell]))
    shown = _in_turn([list(by_cell[cell]) for cell in worst_first])
    chosen = {(trial.cell, trial.sample) for trial in shown}
    rest = [t for cell in worst_first for t in by_cell[cell] if (t.cell, t.sample) not in chosen]
    return Findings(
        shown=tuple(sorted(shown, key=lambda trial: worst_first.index(trial.cell))),
        listed=tuple(rest[:LISTED]),
        total=total,
        errors=tuple(errors[:ERRORS]),
        errors_total=len(errors),
        checks={
            code: (len(found), min(found))
            for code, found in sorted(checks.items(), key=lambda item: (-len(item[1]), item[0]))
        },
    )


def _in_turn(groups: list[list[Trial]]) -> list[Trial]:
    """Take from each group in turn, so that no cell crowds out the others, up to `SHOWN`.

    A group gives its first finding on an image not yet shown, or its first if all were.
    """
    taken: list[Trial] = []
    images: set[str] = set()
    while len(taken) < SHOWN and any(groups):
        for group in filter(None, groups):
            fresh = (i for i, trial in enumerate(group) if trial.image not in images)
            trial = group.pop(next(fresh, 0))
            images.add(trial.image)
            taken.append(trial)
    return taken[:SHOWN]
