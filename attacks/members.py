"""Attacks that `suite` and `minimal` can run, by name: one line each, from cheap to dear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from types import MappingProxyType
from typing import Any, Final

from attacks.base import Attack
from attacks.errors import AttackError, suggestion
from attacks.goal import GOALS, Goal

COMPRESSED: Final[tuple[Goal, ...]] = ("compression_only", "compressed")


@dataclass(frozen=True, slots=True)
class Member:
    """One line of the table.

    Attributes:
        home: ``module:Class`` in this package.
        options: that differ from the attack's defaults.
        goals: for which it is run unless members are named.
    """

    home: str
    options: Mapping[str, Any] = field(default_factory=dict)
    goals: tuple[Goal, ...] = GOALS

    def make(self, steps: int) -> Attack:
        """The attack, with this many steps if it takes any."""
        module, _, name = self.home.partition(":")
        kind: type[Attack] = getattr(import_module(f"attacks.{module}"), name)
        counted = any(one.name == "steps" for one in fields(kind))  # type: ignore[arg-type]
        return kind(**self.options, **({"steps": steps} if counted else {}))


_THROUGH = {"path": "compressed"}
_SPARING = {**_THROUGH, "preserve_weight": 1.0}

# In the order of what a step costs: nothing, a single step, the vision tower, the tower and the
# first blocks of the language model, the whole model once, the whole model on both paths, a
# hundred questions.
MEMBERS: Mapping[str, Member] = MappingProxyType(
    {
        "noise": Member("noise:Noise", {"distribution": "sign"}),
        "fgsm": Member("fgsm:FGSM", _THROUGH, COMPRESSED),
        "fgsm_full": Member("fgsm:FGSM", goals=("full",)),
        "veattack": Member("veattack:VEAttack"),
        "attention_only": Member("attention_only:AttentionOnly", goals=COMPRESSED),
        "cage": Member("cage:CAGE", goals=COMPRESSED),
        "fata": Member("fata:FATA", goals=COMPRESSED),
        "cira": Member("cira:CIRA", goals=COMPRESSED),
        "caa": Member("caa:CAA", {"preset": "strict_preserve"}, COMPRESSED),
        "pgd": Member("pgd:PGD", _THROUGH, COMPRESSED),
        "pgd_full": Member("pgd:PGD", goals=("full",)),
        "apgd": Member("apgd:APGD", {**_THROUGH, "loss": "margin"}, ("compressed",)),
        "apgd_full": Member("apgd:APGD", {"loss": "margin"}, ("full",)),
        "pgd_sparing": Member("pgd:PGD", _SPARING, ("compression_only",)),
        "apgd_sparing": Member("apgd:APGD", {**_SPARING, "loss": "margin"}, ("compression_only",)),
        "margin_split": Member("margin_split:MarginSplit", goals=("compression_only",)),
        "square": Member("square:Square", {"queries": 100}, COMPRESSED),
    }
)


def members_for(goal: Goal) -> tuple[str, ...]:
    """Names of what is run for a goal unless members are named."""
    return tuple(name for name, member in MEMBERS.items() if goal in member.goals)


def gradients(attack: Attack, epsilon: float) -> int:
    """Most gradients an attack takes for one sample."""
    return attack.gradients(attack.budget(epsilon))


def make_member(owner: str, name: str, steps: int) -> Attack:
    """Construct a member by name.

    Args:
        owner: the attack that wants it, for the message.
        name: in `MEMBERS`.
        steps: gradient steps, for those that take any.

    Raises:
        AttackError: there is no such member.
    """
    if name not in MEMBERS:
        raise AttackError(
            f"attack {owner}: there is no member {name!r}; allowed: {', '.join(MEMBERS)}"
            + suggestion(name, MEMBERS)
        )
    return MEMBERS[name].make(steps)
