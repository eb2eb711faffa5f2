"""Put the parts of one run together: the folders of `redteam run --shard I/N`.

Only folders of one and the same run are merged: the same resolved scenario, samples, weights and
kind of device. Every image is verified on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from reports.errors import StoreError
from reports.ledger import Key
from reports.records import Manifest, Trial
from reports.store import RunStore, differences
from reports.text import plain

_BLOCK: Final = 1_000
"""Trials that are held and appended at once."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What came of it.

    Attributes:
        trials: recorded in the new folder.
        repeated: (cell, sample) that several folders held; the first one measured counts.
        disagreeing: of these, the ones whose answers were not the same.
        missing: (cell, sample) that no folder holds.
        notes: what a reader should know.
    """

    trials: int
    repeated: int
    disagreeing: int
    missing: int
    notes: tuple[str, ...] = ()


def merge(folders: Sequence[Path], out: Path) -> Merged:
    """Write one run folder from several of the same run.

    Args:
        folders: of the parts; at least one.
        out: a new or empty folder.

    Raises:
        StoreError: if a folder is no run folder, is damaged, is of another run, or `out` cannot be
            written.
    """
    if not folders:
        raise StoreError("there is nothing to merge; name the folders of the parts")
    stores = [RunStore.read(folder) for folder in dict.fromkeys(map(Path, folders))]
    first = stores[0]
    for other in stores[1:]:
        changed = differences(first.manifest, other.manifest)
        if changed:
            shown = "\n".join(f"  {line}" for line in changed[:20])
            raise StoreError(
                f"{other.folder} is no part of the same run as {first.folder} "
                f"({first.folder.name} -> {other.folder.name}):\n{shown}\n"
                "Merge only folders made by one scenario with --shard I/N."
            )
    chosen, repeated, disagreeing = _chosen(stores)
    manifest = _manifest(stores)
    with RunStore.create(out, manifest, first.scenario_text()) as target:
        _calibrations(stores, target)
        for store, keys in zip(stores, chosen, strict=True):
            _copy(store, keys, target)
    expected = len(manifest.cells) * len(manifest.samples)
    found = sum(map(len, chosen))
    return Merged(found, repeated, disagreeing, expected - found, _notes(stores))


def _chosen(stores: Sequence[RunStore]) -> tuple[list[set[Key]], int, int]:
    """Which trials to take of each folder: the first that was measured, else the first error."""
    owner: dict[Key, tuple[int, bool, tuple[str, ...]]] = {}
    repeated: set[Key] = set()
    disagreeing: set[Key] = set()
    for index, store in enumerate(stores):
        for trial in store.trials():
            key = (trial.cell, trial.sample)
            mine = (index, trial.error is None, _said(trial))
            before = owner.setdefault(key, mine)
            if before is mine:
                continue
            repeated.add(key)
            if before[1] and mine[1] and before[2] != mine[2]:
                disagreeing.add(key)
            if mine[1] and not before[1]:
                owner[key] = mine
    chosen: list[set[Key]] = [set() for _ in stores]
    for key, (index, _, _) in owner.items():
        chosen[index].add(key)
    return chosen, len(repeated), len(disagreeing)


def _said(trial: Trial) -> tuple[str, ...]:
    """The four answers of a trial."""
    if trial.answers is None:
        return ()
    four = trial.answers
    answers = (four.clean_full, four.clean_compressed, four.attacked_full, four.attacked_compressed)
    return tuple(answer.text for answer in answers)


def _copy(store: RunStore, keys: set[Key], target: RunStore) -> None:
    """Append some trials of a folder to another, the images before the trials that name them."""
    some = (one for one in store.trials() if (one.cell, one.sample) in keys)
    for block in _blocks(some):
        for trial in block:
            for name in (trial.clean_png, trial.attacked_png, trial.base_png):
                if name is not None and not target.image_path(name).exists():
                    target.save_png(store.read_png(name))
        target.append(block)


def _blocks(trials: Iterator[Trial]) -> Iterator[list[Trial]]:
    while block := list(islice(trials, _BLOCK)):
        yield block


def _calibrations(stores: Sequence[RunStore], target: RunStore) -> None:
    """Take over what detectors learnt; parts that learnt different things do not fit together."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for store in stores:
        for one in store.calibrations():
            key = (one.target, one.compression, one.detector)
            if key not in found:
                state = None if one.state is None else store.state(one.state)
                target.save_calibration(one, state)
                found[key] = one.scores
            elif found[key] != one.scores:
                raise StoreError(
                    f"{store.folder}: detector {plain(one.detector)!r} on "
                    f"{plain(one.compression)!r} was calibrated to other scores than in an "
                    "earlier folder, so its thresholds differ; run the parts on machines of one "
                    "kind, or run them again"
                )


def _manifest(stores: Sequence[RunStore]) -> Manifest:
    """That of the first folder, with what each part was made with."""
    first = stores[0].manifest
    parts = [
        {
            "folder": store.folder.resolve().name,
            "created": store.manifest.created,
            **{
                key: store.manifest.provenance[key]
                for key in ("command", "commit", "versions", "hardware")
                if key in store.manifest.provenance
            },
        }
        for store in stores
    ]
    return first.model_copy(update={"provenance": {**first.provenance, "merged": parts}})


def _notes(stores: Sequence[RunStore]) -> tuple[str, ...]:
    """In what the parts were made with differently."""
    found = []
    for key, what in (("versions", "versions of packages"), ("hardware", "hardware")):
        seen = {repr(store.manifest.provenance.get(key)) for store in stores}
        if len(seen) > 1:
            found.append(
                f"the parts were made with different {what}; answers near a tie can differ by it"
            )
    return tuple(found)
