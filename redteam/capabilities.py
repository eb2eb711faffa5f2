"""What cannot work together, found before torch is imported or a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from redteam.errors import Problem, nearest
from redteam.scenario import Method, Scenario

_NEEDS: Final[Mapping[str, frozenset[str]]] = {
    "none": frozenset(),
    "encoder": frozenset({"gradients"}),
    "compressed": frozenset({"gradients", "visual_tokens"}),
    "white_box": frozenset({"gradients"}),
    "query": frozenset({"generate"}),
    "scores": frozenset({"generate", "option_scores"}),
    "surrogate": frozenset(),
}
"""What a target must be capable of for an attack with this knowledge."""


_RUNS: Final = (
    "none",
    "input",
    "selection",
    "decoding",
    "encoder",
    "fallback",
    "stack",
    "detector",
)
"""Kinds of defences that this version runs."""


def mismatches(scenario: Scenario) -> list[Problem]:
    """What cannot work together, one problem for each pair."""
    found: list[Problem] = []
    for surrogate in scenario.surrogates:
        found += _checkpoint(surrogate)
    for target in scenario.targets:
        found += _checkpoint(target)
        offered = frozenset(target.signature.facts.get("capabilities", ()))
        if "visual_tokens" not in offered:
            found.append(
                target.problem(
                    f"target {target.label!r} does not expose its visual tokens, so it cannot be "
                    "compressed here"
                )
            )
        for attack in scenario.attacks:
            found += _attack_on(attack, target, offered, scenario)
    for defense in scenario.defenses:
        kind = defense.signature.facts.get("kind", "input")
        if kind not in _RUNS:
            found.append(
                defense.problem(
                    f"defence {defense.label!r} is of kind {kind!r}, which this version does not "
                    "run",
                    allowed=f"defences of kinds {', '.join(_RUNS[1:])}",
                )
            )
    found += _uncalibrated(scenario)
    if found:
        return found  # what follows constructs the methods
    return [*_unprotected(scenario), *_not_adaptive(scenario)]


def detectors(scenario: Scenario) -> list[Method]:
    """The detectors among its defences."""
    return [one for one in scenario.defenses if one.detects]


def _uncalibrated(scenario: Scenario) -> list[Problem]:
    """Detectors without clean samples of their own, and samples chosen by what the target says."""
    calibration = scenario.calibration
    if calibration is None:
        return [
            defense.problem(
                f"detector {defense.label!r} sets its threshold on clean samples that are not "
                "tested, and the scenario names none",
                allowed="a data set under `calibration`",
                hint="e.g. calibration: {type: scenes, split: validation, samples: 300}",
            )
            for defense in detectors(scenario)
        ]
    if calibration.options.get("filter") is None:
        return []
    return [
        calibration.problem(
            f"filter {calibration.options['filter']!r} leaves samples out by what the target "
            "answers; thresholds have to come from all clean traffic",
            allowed="filter: null",
        )
    ]


def _unprotected(scenario: Scenario) -> list[Problem]:
    """Defences and the compressors they have no meaning for."""
    found: list[Problem] = []
    for defense in scenario.defenses:
        if defense.signature.facts.get("kind") not in (
            "selection",
            "decoding",
            "fallback",
            "stack",
            "detector",
        ):
            continue
        from defenses.guard import Guard

        guard = Guard.of(defense.create())
        for compression in scenario.compressions:
            reason = guard.refuses(compression.create())
            if reason is not None:
                found.append(
                    defense.problem(
                        f"defence {defense.label!r} does not go with compression "
                        f"{compression.label!r}: {reason}",
                        hint="put them into scenarios of their own",
                    )
                )
    return found


def _not_adaptive(scenario: Scenario) -> list[Problem]:
    """Adaptive attacks that have nothing to adapt to, or no way to."""
    from redteam.adaptive import NONE, knowledge_obstacle, obstacle

    found: list[Problem] = []
    guards = [one for one in scenario.defenses if one.type != NONE]
    for attack in scenario.attacks:
        if not attack.adaptive:
            continue
        why = knowledge_obstacle(attack)
        if why is None and not guards:
            why = "the scenario lists no defence"
        if why is None:
            reasons = [obstacle(attack, one) for one in guards]
            if all(reasons):
                pairs = zip(guards, reasons, strict=True)
                why = "; ".join(f"{one.label}: {reason}" for one, reason in pairs)
        if why is not None:
            found.append(
                attack.problem(
                    f"attack {attack.label!r} cannot adapt: {why}",
                    hint="drop adaptive: true, or list a defence it can go through",
                )
            )
    return found


def cautions(scenario: Scenario) -> tuple[str, ...]:
    """What can run but not do anything, or is not run, one sentence each.

    Imports attacks that say of themselves that they are sometimes idle, and adaptive ones with the
    defences, and with them torch.
    """
    from redteam.adaptive import omitted

    left_out = omitted(scenario) if any(one.adaptive for one in scenario.attacks) else ()
    if scenario.calibration is not None and not detectors(scenario):
        left_out += ("calibration is not used: the scenario lists no detector.",)
    left_out += _absent_baselines(scenario)
    return left_out + tuple(
        f"attack {attack.label} leaves all pictures as they are against {compression.label}: {why}."
        for attack in scenario.attacks
        if attack.signature.facts.get("sometimes_idle")
        for compression in scenario.compressions
        if (why := attack.create().idle(compression.create()))
    )


def _absent_baselines(scenario: Scenario) -> tuple[str, ...]:
    """Baselines that are not there; the run that makes one has none itself, so this is no error."""
    absent = {
        gate.baseline: gate.name
        for gate in scenario.gates
        if gate.baseline and not Path(gate.baseline_folder).is_dir()
    }
    return tuple(
        f"gate {name!r} cannot pass: its baseline {folder} is not there; give one with "
        "redteam gate RUN --baseline BASE."
        for folder, name in absent.items()
    )


def _attack_on(
    attack: Method, target: Method, offered: frozenset[str], scenario: Scenario
) -> list[Problem]:
    knowledge = str(attack.signature.facts.get("knowledge", ""))
    if knowledge not in _NEEDS:
        return [
            attack.problem(
                f"attack {attack.label!r} works with knowledge {knowledge!r}, for which this "
                "version has no view",
                allowed=", ".join(_NEEDS),
            )
        ]
    if knowledge == "surrogate":
        return _surrogates(attack, target, scenario)
    missing = sorted(_NEEDS[knowledge] - offered)
    if not missing:
        return []
    return [
        attack.problem(
            f"attack {attack.label!r} needs {' and '.join(missing)}, which target "
            f"{target.label!r} does not offer",
            allowed=f"attacks on what it offers: {', '.join(sorted(offered))}",
        )
    ]


def _surrogates(attack: Method, target: Method, scenario: Scenario) -> list[Problem]:
    """A transfer attack needs other models, and those it names have to be there."""
    from redteam.plan import surrogates_of

    known = [one.label for one in scenario.surrogates]
    for name in attack.options.get("surrogates") or ():
        if name not in known:
            return [
                attack.problem(
                    f"attack {attack.label!r} names surrogate {name!r}, which the scenario does "
                    "not list",
                    allowed=", ".join(known) or "entries of `surrogates:`, which is empty",
                    hint=nearest(name, known),
                )
            ]
    if surrogates_of(scenario, target, attack):
        return []
    return [
        attack.problem(
            f"attack {attack.label!r} has no surrogate to work on against target {target.label!r}",
            allowed="`surrogates:` in the scenario, a list like `targets`, with another model "
            "than the target",
        )
    ]


def _checkpoint(target: Method) -> list[Problem]:
    from targets.scenes import checkpoints

    shipped, wanted = checkpoints(), target.options.get("checkpoint")
    if target.type != "scenes" or not shipped or wanted in shipped:
        return []
    return [
        target.problem(
            f"scenes checkpoint {wanted!r} does not exist",
            allowed=", ".join(shipped),
            hint=nearest(wanted, shipped),
        )
    ]
