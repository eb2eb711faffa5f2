"""Controls that a scenario gets whether it lists them or not.

An attack on part of a picture is only known to do something if noise in the same part, at the same
budget, does less. Such an attack names the options that say where it acts in its class variable
``control``; noise with the same values has to stand beside it, and is added where it does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from redteam.catalog import find
from redteam.scenario import EPSILON_DIGITS, Method
from redteam.signature import signature

NOISE: Final = "noise"
_STRONGEST: Final = {"distribution": "sign"}
"""Noise at the corner of the ball: as large as an attack that uses its whole budget."""


def controls(attacks: Sequence[Method]) -> tuple[Method, ...]:
    """Noise that is missing beside the attacks that need it.

    Args:
        attacks: of a scenario.

    Returns:
        One control for each place attacked, with the budgets no listed noise has there.
    """
    missing: dict[tuple[tuple[str, Any], ...], tuple[Method, dict[float, float]]] = {}
    for attack in attacks:
        where = _where(attack)
        if not where:
            continue
        have = {round(one, EPSILON_DIGITS) for one in _budgets(attacks, where)}
        _, wanted = missing.setdefault(tuple(where.items()), (attack, {}))
        for epsilon in attack.epsilons:
            if round(epsilon, EPSILON_DIGITS) not in have:
                wanted.setdefault(round(epsilon, EPSILON_DIGITS), epsilon)
    taken = {attack.label for attack in attacks}
    added: list[Method] = []
    for place, (attack, epsilons) in missing.items():
        if epsilons:
            label = _label(dict(place), taken)
            taken.add(label)
            added.append(_control(attack, dict(place), tuple(sorted(epsilons.values())), label))
    return tuple(added)


def _where(attack: Method) -> dict[str, Any]:
    """Where an attack acts, by the options that say it; empty for most."""
    names = attack.signature.facts.get("control", ())
    return {name: attack.options[name] for name in names}


def _budgets(attacks: Sequence[Method], where: Mapping[str, Any]) -> list[float]:
    """Budgets at which noise is listed for a place."""
    return [
        epsilon
        for one in attacks
        if one.type == NOISE and one.options["norm"] == "linf"
        if all(one.options.get(name) == value for name, value in where.items())
        for epsilon in one.epsilons
    ]


def _label(where: Mapping[str, Any], taken: set[str]) -> str:
    """Short and unique; the width is told where two would share a name."""
    kind = "added-border noise" if where.get("frame") == "added" else "border noise"
    label = f"{kind} (control)"
    if label not in taken:
        return label
    number = 2
    while f"{kind} (control {number})" in taken:
        number += 1
    return f"{kind} (control {number})"


def _control(
    attack: Method, where: Mapping[str, Any], epsilons: tuple[float, ...], label: str
) -> Method:
    known = signature(find("attacks", NOISE)).options
    options = {name: option.default for name, option in known.items()}
    return Method(
        kind="attacks",
        type=NOISE,
        label=label,
        options={**options, **_STRONGEST, **where},
        epsilons=epsilons,
        place=attack.place,
        key=attack.key,
        folder=attack.folder,
    )
