"""What is said of each defence of a run: its badge, its numbers, and the rules that failed.

The rules are in `reports.honesty`. Where a defence acts at several places (targets, compressions)
it is as good as its worst one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from reports.checks import Doubt, empty, harmless
from reports.draws import over_draws, worst_attack
from reports.evidence import Budget, Case, budget_of, cases, is_large, undefended
from reports.honesty import Finding, audit, common_clean, verified
from reports.marks import UNVERIFIED, VERIFIED, worst
from reports.measure import Row
from reports.records import Cell, GateSpec, Manifest
from reports.statistics import EMPTY, Estimate, wilson
from reports.text import epsilon_text, plain

Place = tuple[str, str, str]
"""Defence, target, compression."""


class Badges:
    """The badges of a run.

    Args:
        manifest: of the run.
        rows: of each cell, by its id.
        doubts: self-checks, by id of the cell.
    """

    def __init__(
        self,
        manifest: Manifest,
        rows: Mapping[str, Sequence[Row]],
        doubts: Mapping[str, Sequence[Doubt]],
    ) -> None:
        self._cases = [(case, audit(case)) for case in cases(manifest, rows, doubts)]
        self._of = {_place(case.first): found for case, found in self._cases}
        self._met = {
            _place(case.first): {budget_of(cell) for cell in case.sound} for case, _ in self._cases
        }

    def of(self, cell: Cell) -> str:
        """The badge of the defence of a cell at its place and budget; "" without a defence."""
        if undefended(cell):
            return ""
        holds = verified(self._of[_place(cell)])
        return VERIFIED if holds and self._was_met(cell) else UNVERIFIED

    def _was_met(self, cell: Cell) -> bool:
        """Whether an attack that knew the defence ran at the cell's budget, if it has one."""
        return empty(cell) or budget_of(cell) in self._met[_place(cell)]

    def veto(self, gate: GateSpec, cell: Cell) -> str | None:
        """Why a gate may not pass on a cell on the strength of its defence; None if it may."""
        if self.of(cell) != UNVERIFIED or gate.allow_unverified or harmless(gate):
            return None
        blocking = [one for one in self._of[_place(cell)] if one.blocks]
        if blocking:
            why = blocking[0].sentence
        else:
            why = f"no attack that knows it ran at ε {epsilon_text(cell.epsilon)}"
        return (
            f"the defence {plain(cell.defense)} is {UNVERIFIED} ({why}); see `redteam audit`, or "
            "set allow_unverified: true at the gate to take the figure as it is"
        )

    def as_json(self) -> list[dict[str, Any]]:
        """`defenses` of summary.json, see docs/results-format.md."""
        found: dict[str, list[dict[str, Any]]] = {}
        for case, findings in self._cases:
            found.setdefault(case.defense, []).append(_place_json(case, findings))
        return [
            {
                "defense": name,
                "badge": worst(place["badge"] for place in places),
                "places": places,
            }
            for name, places in found.items()
        ]

    def timings(self) -> list[dict[str, Any]]:
        """`timings.defenses` of summary.json: apart, so that two equal runs differ in no other."""
        return [
            {**_where(case), "seconds": _seconds(common_clean(case))} for case, _ in self._cases
        ]


def _place(cell: Cell) -> Place:
    return cell.defense, cell.target, cell.compression


def _where(case: Case) -> dict[str, str]:
    cell = case.first
    return {"defense": cell.defense, "target": cell.target, "compression": cell.compression}


def _place_json(case: Case, findings: Sequence[Finding]) -> dict[str, Any]:
    where = _where(case)
    return {
        "target": where["target"],
        "compression": where["compression"],
        "badge": VERIFIED if verified(findings) else UNVERIFIED,
        "clean": _clean(common_clean(case)),
        "budgets": [_budget(case, budget) for budget in _budgets(case)],
        "rules": [
            {
                "rule": one.rule,
                "title": one.title,
                "level": one.level,
                "state": one.state.value,
                "message": one.message,
                "remedy": one.remedy,
            }
            for one in findings
        ],
    }


def _clean(pairs: Sequence[tuple[Row, Row]]) -> dict[str, Any]:
    """Accuracy on clean images without and with the defence, on the samples answered both ways."""
    found: dict[str, Any] = {}
    for path in ("full", "compressed"):
        name = f"{path}_clean"
        with_, without = (
            wilson(sum(getattr(pair[side], name) for pair in pairs), len(pairs)).as_json()
            for side in (0, 1)
        )
        found[path] = {"none": without, "defended": with_}
    return found


def _budgets(case: Case) -> list[Budget]:
    return sorted({(cell.norm, round(cell.epsilon, 9)) for cell in (*case.adaptive, *case.foreign)})


def _budget(case: Case, budget: Budget) -> dict[str, Any]:
    """CSFR and attack success of the compressed path, worst case over the attacks of each sort."""
    adaptive, foreign = case.at(case.adaptive, budget), case.at(case.foreign, budget)
    control = case.at(case.controls, budget)
    return {
        "norm": budget[0],
        "epsilon": round(budget[1], 6),
        "large": is_large(budget),
        **{
            sort: {
                "attacks": list(dict.fromkeys(cell.attack for cell in with_)),
                "csfr": {
                    "none": _csfr(case, _same_attacks(control, with_)),
                    "defended": _csfr(case, with_),
                },
                **_over_draws(case, with_),
            }
            for sort, with_ in (("non_adaptive", foreign), ("adaptive", adaptive))
        },
    }


def _same_attacks(cells: Iterable[Cell], others: Sequence[Cell]) -> list[Cell]:
    names = {cell.attack for cell in others}
    return [cell for cell in cells if cell.attack in names]


def _csfr(case: Case, cells: Iterable[Cell]) -> dict[str, Any]:
    """Of samples right clean on both paths, the share that an attack broke only when compressed."""
    able: dict[str, bool] = {}
    for cell in cells:
        for name, row in case.measured(cell).items():
            if row.full_clean and row.compressed_clean:
                able[name] = able.get(name, False) or row.failure
    found: Estimate = wilson(sum(able.values()), len(able)) if able else EMPTY
    return found.as_json()


def _over_draws(case: Case, cells: Iterable[Cell]) -> dict[str, Any]:
    """Over the draws of a random defence, of each sample under the attack that is worst on it."""
    found = over_draws(worst_attack(case.measured(cell) for cell in cells))
    return {} if found is None else {"draws": found}


def _seconds(pairs: Sequence[tuple[Row, Row]]) -> dict[str, Any]:
    """Mean and 95th percentile of the seconds of one clean answer, without and with the defence."""
    found: dict[str, Any] = {}
    for index, path in enumerate(("full", "compressed")):
        sides = {}
        for side, name in ((1, "none"), (0, "defended")):
            values = [pair[side].seconds[index] for pair in pairs if pair[side].seconds]
            sides[name] = (
                {
                    "mean": round(float(np.mean(values)), 6),
                    "p95": round(float(np.quantile(values, 0.95)), 6),
                }
                if values
                else None
            )
        found[path] = sides
    return found
