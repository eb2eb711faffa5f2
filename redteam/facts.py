"""What a cell records of its defence, so that a report can tell which rules apply to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from redteam.adaptive import NONE
from redteam.scenario import Method
from reports.records import DefenseFacts, PartFacts

if TYPE_CHECKING:
    from defenses.base import Defense


def facts_of(method: Method) -> DefenseFacts | None:
    """What a defence of a scenario says of itself; None of `none`.

    Raises:
        ScenarioError: if its class refuses its options.
    """
    if method.type == NONE:
        return None
    from defenses.fingerprint import fingerprint

    defense: Defense = method.create()
    parts = defense.parts()
    fitted = [ids for part in parts if (ids := getattr(part, "calibration", None)) is not None]
    return DefenseFacts(
        id=fingerprint(defense),
        kind=defense.kind.value,
        route=defense.route.value,
        stochastic=defense.draws,
        iterative=any(part.iterative for part in parts),
        parts=[
            PartFacts(id=fingerprint(part), name=part.name, kind=part.kind.value) for part in parts
        ],
        beams=max((int(getattr(part, "beams", 1)) for part in parts), default=1),
        calibration=[str(name) for ids in fitted for name in ids] if fitted else None,
    )


def told(attack: Method, defense: Method) -> dict[str, Any]:
    """Fields of a `Cell` on its defence and on what the attacker knows of it."""
    facts = facts_of(defense)
    if facts is None:
        return {}
    # No attack here is ever told the seed that the deployment draws with.
    return {"guard": facts, "knows_defense": attack.adaptive, "knows_seed": False}
