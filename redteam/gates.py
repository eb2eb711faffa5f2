"""Gates of a scenario, checked, with `where` resolved to the labels of its methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from redteam.document import Location, read_document
from redteam.errors import ScenarioError, nearest
from redteam.findings import Findings, annotation_at, shown
from redteam.validation import Gate, number
from reports.gate import limit_words
from reports.records import Cell, GateSpec
from reports.registry import METRICS

_LISTS: Final = {
    "target": "targets",
    "compression": "compressions",
    "attack": "attacks",
    "defense": "defenses",
}
_NO_DEFENSE: Final = "none"


class Named(Protocol):
    """What `where` may name: a method of a scenario, or of the cells of a run."""

    @property
    def label(self) -> str:
        """Unique among its kind."""
        ...

    @property
    def type(self) -> str:
        """Its name in the catalogue."""
        ...

    @property
    def epsilons(self) -> tuple[float, ...]:
        """Budgets of an attack."""
        ...


def resolve_gates(
    gates: Sequence[Gate],
    methods: Mapping[str, Sequence[Named]],
    findings: Findings,
    folder: Path,
) -> list[GateSpec]:
    """Gates as the report decides them.

    In `where` a method is named by its label or its type; a type that covers several methods makes
    one gate for each of them.

    Args:
        gates: as they are written.
        methods: under the keys of a scenario: targets, compressions, attacks, defenses.
        findings: what is wrong goes there.
        folder: of the file; a baseline is relative to it.
    """
    found: list[GateSpec] = []
    for index, gate in enumerate(gates):
        location: Location = ("gates", index)
        _check_limits(gate, location, findings)
        choices = {
            key: _choices(key, value, methods, (*location, "where", key), findings)
            for key, value in gate.where.items()
        }
        for chosen in product(*choices.values()):
            where = dict(zip(choices, chosen, strict=True))
            found.append(
                GateSpec(
                    name=_name(gate, where, several=any(len(c) > 1 for c in choices.values())),
                    metric=gate.metric,
                    max=gate.max,
                    min=gate.min,
                    where=where,
                    confidence=gate.confidence,
                    allow_unverified=gate.allow_unverified,
                    family=gate.family or "",
                    baseline=gate.baseline or "",
                    baseline_folder=_absolute(gate.baseline, folder, location, findings),
                    max_increase=gate.max_increase,
                    max_decrease=gate.max_decrease,
                    line=findings.document.line(location),
                )
            )
    return found


def _absolute(baseline: str | None, folder: Path, location: Location, findings: Findings) -> str:
    if not baseline:
        return ""
    try:
        found = (folder / Path(baseline).expanduser()).resolve()
        found.exists()  # it need not, but asking tells a name that no file can have
    except (OSError, RuntimeError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        findings.add((*location, "baseline"), f"{baseline[:60]!r} is no path: {why}")
        return ""
    return str(found)


def _name(gate: Gate, where: Mapping[str, Any], *, several: bool) -> str:
    if gate.name and not several:
        return gate.name
    words = [gate.name or f"{gate.metric} {limit_words(gate)}"]
    words += [_epsilon(value) if key == "epsilon" else str(value) for key, value in where.items()]
    return ", ".join(words)


def _epsilon(value: float) -> str:
    return f"epsilon {value * 255:.4g}/255"


def _check_limits(gate: Gate, location: Location, findings: Findings) -> None:
    if gate.metric not in METRICS:
        findings.add(
            (*location, "metric"),
            f"there is no metric {gate.metric!r}",
            allowed=", ".join(METRICS),
            hint=nearest(gate.metric, METRICS),
        )
    elif METRICS[gate.metric].kind == "maximum":
        findings.add(
            (*location, "metric"),
            f"{gate.metric!r} has no interval, and a gate decides from one",
            hint="see: redteam list metrics",
        )
    absolute = gate.max is not None or gate.min is not None
    change = gate.max_increase is not None or gate.max_decrease is not None
    if absolute and (change or gate.baseline):
        findings.add(
            location,
            "is on a metric and on its change since a baseline",
            allowed="max and min, or max_increase and max_decrease with a baseline",
            hint="write two gates",
        )
    elif gate.baseline and not change:
        findings.add(
            location, "names a baseline and no limit", allowed="max_increase, max_decrease, or both"
        )
    elif not absolute and not change:
        findings.add(
            location,
            "states no limit",
            allowed="max, min, or both; or max_increase, max_decrease with a baseline",
        )
    elif gate.max is not None and gate.min is not None and gate.min > gate.max:
        findings.add(location, f"min {gate.min:g} is above max {gate.max:g}; nothing can pass")


def _choices(
    key: str,
    value: object,
    methods: Mapping[str, Sequence[Named]],
    location: Location,
    findings: Findings,
) -> list[Any]:
    """The values one key of `where` stands for; a problem and nothing if there is none."""
    if key == "epsilon":
        return _epsilons(value, methods["attacks"], location, findings)
    known = {method.label: method.type for method in methods[_LISTS[key]]}
    if key == "defense" and not known:
        known = {_NO_DEFENSE: _NO_DEFENSE}
    if isinstance(value, str) and value in known:
        return [value]
    by_type = [label for label, kind in known.items() if kind == value]
    if not by_type:
        findings.add(
            location,
            f"no {key} of this scenario is called {shown(value)}",
            allowed=", ".join(dict.fromkeys([*known, *known.values()])),
            hint=nearest(value, [*known, *known.values()]),
        )
    return by_type


def _epsilons(
    value: object, attacks: Sequence[Named], location: Location, findings: Findings
) -> list[float]:
    try:
        wanted = number(value)
    except ValueError as error:
        findings.add(location, f"{shown(value)} {error}")
        return []
    known = sorted({epsilon for attack in attacks for epsilon in attack.epsilons})
    if isinstance(wanted, int | float) and not isinstance(wanted, bool):
        for epsilon in known:
            if abs(epsilon - wanted) < 1e-9:
                return [epsilon]
    findings.add(
        location,
        f"no attack of this scenario runs at epsilon {shown(value)}",
        allowed=", ".join(f"{epsilon * 255:.4g}/255" for epsilon in known),
    )
    return []


class GateFile(BaseModel):
    """What is read of a file of gates."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    gates: list[Gate]


@dataclass(frozen=True, slots=True)
class InCells:
    """A method as the cells of a run name it."""

    label: str
    type: str
    epsilons: tuple[float, ...] = ()


def read_gates(path: Path, cells: Sequence[Cell]) -> list[GateSpec]:
    """Gates of a file for a run that is there already.

    Args:
        path: a scenario, of which only the gates are read, or a file with nothing but `gates`.
        cells: of the run; `where` names their labels or types.

    Raises:
        ScenarioError: with everything that is wrong.
    """
    document = read_document(path)
    findings = Findings(document)
    if not isinstance(document.data, dict):
        findings.add((), f"{shown(document.data)} has no gates", allowed="a mapping with gates")
        raise ScenarioError(findings.problems)
    gates: list[GateSpec] = []
    try:
        written = GateFile.model_validate(document.data).gates
        gates = resolve_gates(written, methods_of(cells), findings, path.parent)
    except ValidationError as error:
        findings.pydantic(error, (), lambda inner: annotation_at(GateFile, inner))
    if findings.problems:
        raise ScenarioError(findings.in_order())
    return gates


def methods_of(cells: Sequence[Cell]) -> dict[str, list[InCells]]:
    """The methods of a run under the keys of a scenario."""
    found: dict[str, list[InCells]] = {}
    for key, kind in _LISTS.items():
        labels = dict.fromkeys(getattr(cell, key) for cell in cells)
        found[kind] = [_in_cells(key, label, cells) for label in labels]
    return found


def _in_cells(key: str, label: str, cells: Sequence[Cell]) -> InCells:
    mine = [cell for cell in cells if getattr(cell, key) == label]
    spec = mine[0].spec.get(key)
    kind = spec.get("type", label) if isinstance(spec, Mapping) else label
    epsilons = {cell.epsilon for cell in mine} if key == "attack" else set()
    return InCells(label, str(kind), tuple(sorted(epsilons)))
