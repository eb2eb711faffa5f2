"""Run folders of a few cells without pictures, for tests that compare two of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from report_data import cell, manifest, trial

from reports.records import Cell, GateSpec
from reports.store import RunStore

CAA = {"attack": {"type": "caa", "steps": 30}}


def attacked(id: str = "c1", **changes: Any) -> Cell:
    """A cell of an attack that no self-check is about."""
    return cell(id, **({"knowledge": "none", "spec": CAA} | changes))


def write(
    folder: Path,
    outcomes: Mapping[str, Sequence[str]],
    *,
    cells: list[Cell] | None = None,
    gates: list[GateSpec] | None = None,
    per_image: int = 1,
    skip: int = 0,
    **changes: Any,
) -> Path:
    """Write a run folder.

    Args:
        folder: new.
        outcomes: of each cell by its id, one for each sample; see `report_data.trial`.
        cells: of the run; one named after each id if left out.
        gates: of the run.
        per_image: questions that share an image.
        skip: last samples that never ran.
        changes: to the manifest.
    """
    samples = len(next(iter(outcomes.values())))
    planned = manifest(
        samples, cells=cells or [attacked(name) for name in outcomes], gates=gates, **changes
    )
    with RunStore.create(folder, planned, "name: test\n") as store:
        for name, mine in outcomes.items():
            store.append(
                trial(f"s{i}", outcome, name, image=f"image-{i // per_image}")
                for i, outcome in enumerate(mine[: samples - skip])
            )
    return folder


def broken(times: int, n: int, first: int = 0) -> list[str]:
    """Outcomes of n samples of which `times`, from `first` on, break when compressed."""
    return ["1110" if first <= i < first + times else "1111" for i in range(n)]
