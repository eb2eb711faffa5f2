"""Gates of a scenario, checked, with `where` resolved to the labels of its methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, Final

from redteam.document import Location
from redteam.errors import nearest
from redteam.findings import Findings, shown
from redteam.validation import Gate, number
from reports.records import GateSpec
from reports.registry import METRICS

if TYPE_CHECKING:
    from redteam.scenario import Method

_LISTS: Final = {
    "target": "targets",
    "compression": "compressions",
    "attack": "attacks",
    "defense": "defenses",
}
_NO_DEFENSE: Final = "none"


def resolve_gates(
    gates: Sequence[Gate], methods: Mapping[str, Sequence[Method]], findings: Findings
) -> list[GateSpec]:
    """Gates as the report decides them.

    In `where` a method is named by its label or its type; a type that covers several methods makes
    one gate for each of them.
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
                    line=findings.document.line(location),
                )
            )
    return found


def _name(gate: Gate, where: Mapping[str, Any], *, several: bool) -> str:
    if gate.name and not several:
        return gate.name
    limits = [f"≤ {gate.max:g}" if gate.max is not None else ""]
    limits.append(f"≥ {gate.min:g}" if gate.min is not None else "")
    words = [f"{gate.metric} {' and '.join(limit for limit in limits if limit)}"]
    if gate.name:
        words = [gate.name]
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
    if gate.max is None and gate.min is None:
        findings.add(location, "states no limit", allowed="max, min, or both")
    elif gate.max is not None and gate.min is not None and gate.min > gate.max:
        findings.add(location, f"min {gate.min:g} is above max {gate.max:g}; nothing can pass")


def _choices(
    key: str,
    value: object,
    methods: Mapping[str, Sequence[Method]],
    location: Location,
    findings: Findings,
) -> list[Any]:
    """The values one key of `where` stands for; a problem and nothing if there is none."""
    if key == "epsilon":
        return _epsilons(value, methods["attacks"], location, findings)
    known = {method.label: method.type for method in methods[_LISTS[key]]}
    if key == "defense" and not known:
        known = {_NO_DEFENSE: _NO_DEFENSE}
    if value in known:
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
    value: object, attacks: Sequence[Method], location: Location, findings: Findings
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
