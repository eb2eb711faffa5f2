"""Which failures a report shows, and the ones it lists: chosen the same way every time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from reports.ledger import Place
from reports.records import Manifest, Trial
from reports.store import RunStore

SHOWN = 24
"""Findings with whole pictures in one report."""
LISTED = 976
"""Further findings, folded and with small pictures; what is beyond is in the run folder."""
ERRORS = 100
"""Errors listed."""


@dataclass(frozen=True, slots=True)
class Findings:
    """Compression-specific failures and errors of a run.

    Attributes:
        shown: with pictures, at most `SHOWN`, taken in turn from the cells.
        listed: of the others, at most `LISTED`.
        total: all compression-specific failures.
        room: how many of them a report has room for.
        errors: trials that could not be measured, at most `ERRORS`.
        errors_total: all of them.
        checks: how often each self-check fired on a sample, by its code, with one message; what
            an attack noted, by the whole of it.
    """

    shown: tuple[Trial, ...]
    listed: tuple[Trial, ...]
    total: int
    room: int
    errors: tuple[Trial, ...]
    errors_total: int
    checks: dict[str, tuple[int, str]]


class _Seen(NamedTuple):
    """What picking needs of a trial; the rest is read again, for those picked."""

    order: int
    """Of its sample in the manifest."""
    image: str
    place: Place


class Gathered:
    """Notes the findings and errors of a run while its trials pass by.

    Within a cell the order is that of the manifest, so nothing is picked for its looks.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._samples = {sample: index for index, sample in enumerate(manifest.samples)}
        self._cells = {cell.id: index for index, cell in enumerate(manifest.cells)}
        self._failures: dict[str, list[_Seen]] = defaultdict(list)
        self._errors: list[tuple[int, _Seen]] = []
        self._checks: dict[str, tuple[int, str]] = {}

    def watch(self, located: Iterable[tuple[Place, Trial]]) -> Iterator[Trial]:
        """Pass the trials on, each noted."""
        for place, trial in located:
            self._note(place, trial)
            yield trial

    def _note(self, place: Place, trial: Trial) -> None:
        for check in trial.checks:
            code = check.partition(":")[0]
            code = check if code == "note" else code
            times, least = self._checks.get(code, (0, check))
            self._checks[code] = times + 1, min(least, check)
        failed = trial.error is not None
        if failed or trial.compression_specific_failure:
            order = self._samples.get(trial.sample, len(self._samples))
            seen = _Seen(order, trial.image, place)
            if failed:
                self._errors.append((self._cells[trial.cell], seen))
            else:
                self._failures[trial.cell].append(seen)

    def pick(self, store: RunStore) -> Findings:
        """Choose what is shown, cells with most findings first; equal runs give equal picks."""
        worst_first = sorted(
            self._failures, key=lambda cell: (-len(self._failures[cell]), self._cells[cell])
        )
        groups = [sorted(self._failures[cell]) for cell in worst_first]
        shown = _in_turn(groups)
        chosen = {seen.place for _, seen in shown}
        rest = [seen for group in groups for seen in group if seen.place not in chosen]
        return Findings(
            shown=_read(store, (seen for _, seen in sorted(shown, key=lambda item: item[0]))),
            listed=_read(store, rest[:LISTED]),
            total=sum(map(len, groups)),
            room=SHOWN + LISTED,
            errors=_read(store, (seen for _, seen in sorted(self._errors)[:ERRORS])),
            errors_total=len(self._errors),
            checks=dict(sorted(self._checks.items(), key=lambda item: (-item[1][0], item[0]))),
        )


def collect(store: RunStore) -> Findings:
    """Read a run and pick its findings."""
    gathered = Gathered(store.manifest)
    for _ in gathered.watch(store.located()):
        pass
    return gathered.pick(store)


def _read(store: RunStore, seen: Iterable[_Seen]) -> tuple[Trial, ...]:
    return tuple(store.trial_at(one.place) for one in seen)


def _in_turn(groups: Sequence[Sequence[_Seen]]) -> list[tuple[int, _Seen]]:
    """Take from each group in turn, so that no cell crowds out the others, up to `SHOWN`.

    A group gives its first finding on an image not yet shown, or its first if all were.

    Returns:
        Each with the number of its group.
    """
    waiting = {number: list(group) for number, group in enumerate(groups)}
    taken: list[tuple[int, _Seen]] = []
    images: set[str] = set()
    while len(taken) < SHOWN and any(waiting.values()):
        for number, group in waiting.items():
            if group:
                fresh = (i for i, seen in enumerate(group) if seen.image not in images)
                seen = group.pop(next(fresh, 0))
                images.add(seen.image)
                taken.append((number, seen))
    return taken[:SHOWN]
