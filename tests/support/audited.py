"""A run in which one defence meets every rule of an honest evaluation, to be spoilt rule by rule.

Run it to look at the report: ``python tests/support/audited.py FOLDER``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from report_data import manifest as plain_manifest
from report_data import trial

from reports.badges import Badges
from reports.checks import run_checks
from reports.evidence import cases
from reports.honesty import Finding, audit
from reports.measure import Row, row_of
from reports.records import (
    Cell,
    DefenseFacts,
    Demand,
    Demands,
    GateSpec,
    Manifest,
    Objective,
    PartFacts,
    Pipelines,
    Trial,
)
from reports.store import RunStore

N = 320
PIPELINE = "0123456789ab"
SMALL, MIDDLE, LARGE = 8 / 255, 16 / 255, 64 / 255
EPSILONS = (SMALL, MIDDLE, LARGE)
CAA = {"type": "caa", "restarts": 5}
ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {  # label: knowledge, options
    "noise": ("none", {"type": "noise"}),
    "caa": ("compressed", {**CAA, "steps": 50}),
    "caa adaptive": ("compressed", {**CAA, "steps": 50, "adaptive": True, "draws": 20}),
    "caa adaptive 100": ("compressed", {**CAA, "steps": 100, "adaptive": True, "draws": 20}),
    "square adaptive": ("scores", {"type": "square", "adaptive": True, "draws": 20}),
}
BROKEN: dict[str, dict[str, tuple[int, ...]]] = {  # by defence and attack: at each budget
    "none": {
        "noise": (4, 5, 20),
        "caa": (110, 180, 320),
        "caa adaptive": (110, 180, 320),
        "caa adaptive 100": (111, 181, 320),
        "square adaptive": (60, 90, 200),
    },
    "good": {
        "noise": (3, 4, 18),
        "caa": (6, 12, 60),
        "caa adaptive": (20, 44, 320),
        "caa adaptive 100": (21, 45, 320),
        "square adaptive": (8, 15, 90),
    },
    "oracle": {"noise": (2, 2, 9), "caa": (2, 4, 30)},
}
Wanted = Callable[[Cell], bool]


def facts(**changes: Any) -> DefenseFacts:
    given: dict[str, Any] = {
        "id": "d0",
        "kind": "selection",
        "route": "bpda",
        "stochastic": False,
        "parts": [PartFacts(id="d0", name="good", kind="selection")],
    }
    return DefenseFacts(**(given | changes))


def demands(factor: float = 1.0, fallback: bool = False) -> Demands:
    one = Demand(tokens=36, generated=2, seconds=0.02 * factor)
    hit = one.model_copy(update={"fallback": fallback})
    return Demands(clean_full=one, clean_compressed=one, attacked_full=one, attacked_compressed=hit)


def outcome(defense: str, attack: str, broken: int, count: int = N) -> list[Trial]:
    """Trials of a cell: the first `broken` fail only when compressed."""
    knows = ATTACKS[attack][1].get("adaptive", False)
    through = Pipelines(deployed=PIPELINE, attacked=PIPELINE if knows else "")
    return [
        trial(
            f"s{i}",
            "1110" if i < broken else "1111",
            f"{defense}/{attack}",
            pipelines=None if defense == "none" else through,
            demands=demands(1.0 if defense == "none" else 1.6 + 0.01 * (i % 5)),
            attacked_png="0" * 64,
            loss=[1.0, 0.5, 0.2],
            objective=Objective(
                kept=0.2, best=0.2, believed=i < broken, unstable=0.02 if i < 2 else None
            ),
        )
        for i in range(count)
    ]


def cell_of(defense: str, attack: str, epsilon: float) -> Cell:
    knowledge, options = ATTACKS[attack]
    return Cell(
        id=f"{defense}/{attack}/{round(255 * epsilon)}",
        target="scenes-a",
        compression="fastv K=2 25%",
        attack=attack,
        defense=defense,
        epsilon=epsilon,
        knowledge=knowledge,
        knows_compression=knowledge not in ("none",),
        spec={"attack": options, "defense": {"type": defense}},
        declared={"steps": options.get("steps", 0), "queries": 5000 * (knowledge == "scores")},
        guard=None if defense == "none" else facts(id=f"{defense}-id") if defense != "good"
        else facts(),
        knows_defense=None if defense == "none" else bool(options.get("adaptive")),
        knows_seed=None if defense == "none" else False,
    )  # fmt: skip


@dataclass
class Run:
    """Cells and rows, to be changed by a test."""

    count: int = N
    cells: list[Cell] = field(default_factory=list)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=lambda: {"targets": {"scenes-a": {"w": "9"}}})
    gates: list[GateSpec] = field(default_factory=list)
    scenario: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def good(cls, count: int = N) -> Run:
        run = cls(count)
        for defense, attacks in BROKEN.items():
            for attack, broken in attacks.items():
                for epsilon, number in zip(EPSILONS, broken, strict=True):
                    run.add(cell_of(defense, attack, epsilon), number)
        return run

    def add(self, cell: Cell, broken: int) -> None:
        self.cells.append(cell)
        self.rows[cell.id] = rows(cell.defense, cell.attack, broken, self.count)

    def change(self, wanted: Wanted, **update: Any) -> None:
        self.cells = [
            cell.model_copy(update=update) if wanted(cell) else cell for cell in self.cells
        ]

    def option(self, wanted: Wanted, **options: Any) -> None:
        for index, cell in enumerate(self.cells):
            if wanted(cell):
                spec = {**cell.spec, "attack": {**cell.spec["attack"], **options}}
                self.cells[index] = cell.model_copy(update={"spec": spec})

    def drop(self, wanted: Wanted) -> None:
        self.cells = [cell for cell in self.cells if not wanted(cell)]

    def outcome(self, wanted: Wanted, broken: int) -> None:
        for cell in filter(wanted, self.cells):
            self.rows[cell.id] = rows(cell.defense, cell.attack, broken, self.count)

    def row(self, wanted: Wanted, **update: Any) -> None:
        for cell in filter(wanted, self.cells):
            self.rows[cell.id] = [row._replace(**update) for row in self.rows[cell.id]]

    @property
    def manifest(self) -> Manifest:
        return plain_manifest(
            self.count,
            cells=self.cells,
            gates=self.gates,
            scenario=self.scenario,
            provenance={"identity": self.identity},
        )

    def badges(self) -> Badges:
        return Badges(self.manifest, self.rows, self._doubts())

    def findings(self, defense: str = "good") -> tuple[Finding, ...]:
        """Every rule on a defence."""
        found = cases(self.manifest, self.rows, self._doubts())
        return audit(next(case for case in found if case.defense == defense))

    def _doubts(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {cell.id: [] for cell in self.cells}
        for doubt in run_checks(self.cells, self.rows):
            found[doubt.cell.id].append(doubt)
        return found


_CACHE: dict[tuple[str, str, int, int], list[Row]] = {}


def rows(defense: str, attack: str, broken: int, count: int = N) -> list[Row]:
    key = (defense, attack, broken, count)
    if key not in _CACHE:
        _CACHE[key] = [row_of(one) for one in outcome(defense, attack, broken, count)]
    return _CACHE[key]


def build(folder: Path, gates: Sequence[GateSpec] = (), count: int = N) -> Path:
    """The same run as a folder, without reports."""
    run = Run.good(count)
    run.gates = list(gates)
    with RunStore.create(folder, run.manifest, "name: test\n") as store:
        for cell in run.cells:
            number = BROKEN[cell.defense][cell.attack][EPSILONS.index(cell.epsilon)]
            store.append(
                one.model_copy(update={"cell": cell.id})
                for one in outcome(cell.defense, cell.attack, number, count)
            )
    return folder


if __name__ == "__main__":
    from reports import build_reports

    built = build_reports(build(Path(sys.argv[1])))
    sys.stdout.write(f"{built.headline}: {built.why}\n{built.report}\n")
