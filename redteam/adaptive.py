"""Attacks that know the defence: which defences they can go through, and how.

An attack with ``adaptive: true`` is run anew against each defence it can go through. It gets the
defended target, or takes the form its authors gave it against that defence. Against `none` it is
the attack itself: the control that shows what it does undefended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from redteam.errors import ScenarioError
from redteam.scenario import Method, Scenario

if TYPE_CHECKING:
    from attacks.base import Attack
    from defenses.base import Defense
    from defenses.guard import Guard

NONE = "none"
"""Type of the absent defence."""


@dataclass(frozen=True, slots=True)
class Adapted:
    """An attack as it is run against one defence.

    Attributes:
        attack: in the form it takes.
        through: whether it gets the defended target; else its own form is what adapts, or there is
            no defence.
        passes: passes of one picture for each pass it makes.
    """

    attack: Attack
    through: bool
    passes: int = 1


def adapt(attack: Method, defense: Method, own: Attack | None = None) -> Adapted:
    """An adaptive attack against a defence that it can go through.

    Args:
        attack: of the scenario.
        defense: of the scenario.
        own: the attack constructed, if at hand.

    Raises:
        ScenarioError: if a class refuses its options.
    """
    made: Attack = attack.create() if own is None else own
    if defense.type == NONE:
        return Adapted(made, through=False)
    special = made.against(defense.type, defense.options)
    if special is not None:
        return Adapted(special, through=False)
    from defenses.adaptive import passes_of
    from defenses.guard import Guard

    guarding = defense.create()
    detector = Guard.of(guarding).detector
    if detector is not None:
        from attacks.evade import Evade
        from attacks.force_fallback import ForceFallback
        from attacks.raise_alarm import RaiseAlarm

        draws = attack.draws if detector.draws else 1
        if isinstance(made, ForceFallback):
            names = ("steps", "alpha", "restarts", "momentum")
            taken = {name: getattr(made, name) for name in names}
            alarm = RaiseAlarm(draws=draws, passes=detector.passes, **taken)
            return Adapted(alarm, through=False)
        return Adapted(Evade(inner=made, draws=draws, passes=detector.passes), through=False)
    return Adapted(made, through=True, passes=passes_of(guarding, attack.draws))


def obstacle(attack: Method, defense: Method) -> str | None:
    """Why an adaptive attack cannot go through a defence; None if it can.

    Raises:
        ScenarioError: if a class refuses its options.
    """
    if defense.type == NONE:
        return None
    made, guarding = attack.create(), defense.create()
    if made.against(defense.type, defense.options) is not None:
        return None
    if not guarding.verifiable:
        return "it names no route for an attack"
    from defenses.guard import Guard

    guard = Guard.of(guarding)
    if guard.detector is not None:
        if made.takes_penalty or made.raises_alarm:
            return None
        return "it descends on no loss that the detector's score could be added to"
    return _out_of_sight(made, guard) or _undecoded(made, guard) or _unsettled(made, guarding)


def _out_of_sight(attack: Attack, guard: Guard) -> str | None:
    """A selection defence is in the compressor, or in how the tower's attention is read."""
    hidden = [one for one in guard.attacked_selections if not one.looks_again]
    if attack.needs.value == "encoder":
        if not hidden:
            return None
        return "the attack knows the vision tower alone, and the defence changes nothing there"
    if attack.knows_compression or not (guard.selections or guard.fallback):
        return None
    return "the attack does not know the compression, which is where the defence is"


def _undecoded(attack: Attack, guard: Guard) -> str | None:
    """Decoding is in the answers alone."""
    if guard.decoding is None:
        return None
    if attack.undecoded:
        return "the attack looks at the model's own distributions, which decoding does not change"
    if attack.needs.value in ("encoder", "compressed"):
        return "the attack sees no answers, and the defence is in how they are decoded"
    return None


def _unsettled(attack: Attack, defense: Defense) -> str | None:
    """One answer of a defence that draws says little about the next."""
    from defenses.adaptive import draws_at_random

    if not attack.stops_early or not draws_at_random(defense):
        return None
    return (
        "stop_when_broken ends a sample at one wrong answer, and the defence draws: it would not "
        "be attacked in expectation"
    )


def meets(attack: Method, defense: Method) -> bool:
    """Whether an attack adapts to a defence; False also where a class refuses its options."""
    if not attack.adaptive or defense.type == NONE or knowledge_obstacle(attack):
        return False
    try:
        return obstacle(attack, defense) is None
    except ScenarioError:
        return False  # told when the plan is made


def knowledge_obstacle(attack: Method) -> str | None:
    """Why an attack cannot be adaptive at all, by what it knows; imports nothing."""
    knowledge = attack.signature.facts.get("knowledge")
    if knowledge == "none":
        return "it knows nothing, so it cannot know the defence"
    if knowledge == "surrogate":
        return "it works on other models, which have no defence"
    return None


def met(scenario: Scenario, attack: Method) -> list[Method]:
    """The defences an adaptive attack is run against, `none` among them if it is listed."""
    return [one for one in scenario.defenses if obstacle(attack, one) is None]


def omitted(scenario: Scenario) -> tuple[str, ...]:
    """Which adaptive attacks are not run against which defences, one sentence for each reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for attack in scenario.attacks:
        if not attack.adaptive or knowledge_obstacle(attack) is not None:
            continue
        for defense in scenario.defenses:
            why = obstacle(attack, defense)
            if why:
                found.setdefault((attack.label, why), []).append(defense.label)
    return tuple(
        f"attack {attack} is not run against {', '.join(defenses)}: {why}."
        for (attack, why), defenses in found.items()
    )
