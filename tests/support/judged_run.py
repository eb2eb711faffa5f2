"""A run folder of trials without pictures: suites, minimal epsilons and self-checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from report_data import cell, manifest, trial

from reports.records import Cell, Distance, Effort, GateSpec, Trial
from reports.store import RunStore

N = 40
EPSILONS = (4 / 255, 8 / 255, 16 / 255)
ATTACKS = {  # name: knowledge, samples broken only when compressed, at each budget
    "noise": ("none", (0, 0, 1)),
    "caa": ("compressed", (8, 16, 24)),
    "weak": ("white_box", (0, 1, 0)),
    "fata": ("encoder", (2, 6, 12)),
    "cira": ("encoder", (4, 9, 14)),
    "pgd": ("white_box", (1, 2, 3)),
    "square": ("scores", (1, 5, 9)),
    "suite": ("white_box", (10, 20, 30)),
}


def cells() -> list[Cell]:
    made = [
        cell(
            f"{name}{index}",
            attack=name,
            knowledge=knowledge,
            epsilon=epsilon,
            declared={"steps": 0 if name == "noise" else 60, "queries": 22 * (name == "suite")},
            spec={"attack": {"type": name}},
        )
        for name, (knowledge, _) in ATTACKS.items()
        for index, epsilon in enumerate(EPSILONS)
    ]
    search = {"type": "minimal", "attack": "pgd", "goal": "compression_only"}
    return [
        *made,
        cell(
            "minimal", attack="minimal", knowledge="white_box", epsilon=EPSILONS[-1],
            spec={"attack": search}, declared={"steps": 100, "queries": 12},
        ),
    ]  # fmt: skip


def searched(cell_id: str, levels: list[int | None], **changes: Any) -> list[Trial]:
    """Trials of a search: the level at which a sample broke, None where it held at 16."""
    return [
        trial(
            f"s{i}",
            "1111" if level is None else "1110",
            cell_id,
            distance=Distance(linf=(level or 16) / 255, l2=1.0, psnr=None),
            **changes,
        )
        for i, level in enumerate(levels)
    ]


def build(folder: Path, gates: list[GateSpec] | None = None) -> Path:
    """Write the run folder, without reports."""
    planned = manifest(N, cells=cells(), gates=gates)
    with RunStore.create(folder, planned, "name: test\n") as store:
        for name, (_, broken) in ATTACKS.items():
            for index, count in enumerate(broken):
                store.append(
                    trial(
                        f"s{i}", "1110" if i < count else "1111", f"{name}{index}",
                        effort=Effort(forwards=31, backwards=30, queries=4 * (name == "suite")),
                        made_by=("caa" if i % 2 else "noise") if name == "suite" else "",
                        checks=["no-progress: no step helped"] if name == "weak" else [],
                    )
                    for i in range(N)
                )  # fmt: skip
        store.append(searched("minimal", [1 + i // 3 if i < 30 else None for i in range(N)]))
    return folder
