"""Defences deployed together: what may be written, what is refused, how attacks go through."""

from __future__ import annotations

from pathlib import Path

import pytest

from defenses.base import AdaptiveRoute, DefenseError
from defenses.beam import BeamSearch
from defenses.guard import Guard
from defenses.hybrid import Hybrid
from defenses.oracle import Oracle
from defenses.pai import PAI
from defenses.random_floor import RandomFloor
from defenses.resize_pad import ResizePad
from defenses.score_smoothing import ScoreSmoothing
from defenses.sid import SID
from defenses.stack import Stack
from defenses.translation_consensus import TranslationConsensus
from defenses.voting import majority
from redteam.adaptive import obstacle, omitted
from redteam.errors import ScenarioError
from redteam.plan import make_plan
from redteam.scenario import load_scenario

ATTACK = "{type: caa, preset: strict_preserve, steps: 1, adaptive: true, draws: 3}"
TEXT = """\
name: stacked
targets: [{type: scenes}]
dataset: {type: scenes, samples: 4}
compressions: [{type: visionzip, retention: 0.25}]
attacks: [{type: caa, preset: strict_preserve, steps: 1, adaptive: true, draws: 3}]
epsilons: [16/255]
defenses:
"""


def written(folder: Path, defenses: str, attacks: str = "") -> Path:
    path = folder / "stacked.yaml"
    text = TEXT + defenses
    if attacks:
        text = text.replace(ATTACK, attacks)
    path.write_text(text)
    return path


def test_members_become_one_defence(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "  - stack: [resize_pad, {type: hybrid, diverse: 0.5}, {type: random_floor, rho: 0.5}]\n"
        "  - {name: mine, stack: [hybrid, sid]}\n",
    )
    first, second = load_scenario(path).defenses
    assert (first.label, second.label) == ("resize_pad + hybrid + random_floor", "mine")
    wanted = Stack(members=(ResizePad(), Hybrid(diverse=0.5), RandomFloor(rho=0.5)))
    assert first.create() == wanted
    assert (
        first.spec["stack"][0]["smallest"] == ResizePad().smallest
    )  # defaults are part of what ids are made of
    guard = Guard.of(wanted)
    assert (len(guard.inputs), len(guard.selections)) == (1, 2)
    steps = {c.defense: c.declared["steps"] for c in make_plan(load_scenario(path)).cells}
    assert steps == {"resize_pad + hybrid + random_floor": 3, "mine": 2}, "draws; branches of sid"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{stack: []}", "a list of defences"),
        ("{stack: hybrid}", "a list of defences"),
        ("{stack: [hybrit, sid]}", "hybrid"),
        ("{stack: [{type: random_floor, rho: 2}, sid]}", "stack"),
        ("{stack: [sid, {stack: [hybrid, pai]}]}", "stack inside stack is not allowed"),
        ("{stack: [none, sid]}", "none is no defence"),
        ("{alpha: 1, stack: [hybrid, sid]}", "at each member"),
    ],
)
def test_what_is_wrong_inside_is_found(tmp_path: Path, entry: str, message: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        load_scenario(written(tmp_path, f"  - {entry}\n"))
    assert message in str(caught.value)
    assert ":8:" in str(caught.value)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ((Hybrid(),), "has 1 member"),
        ((PAI(), SID()), "holds pai and sid; one of kind decoding at most"),
        ((TranslationConsensus(), ScoreSmoothing()), "one of those that rank other views at most"),
    ],
)
def test_what_cannot_act_together_is_refused(members: tuple[Hybrid, ...], message: str) -> None:
    with pytest.raises(DefenseError, match=message):
        Stack(members=members)


def test_a_stack_that_does_not_fit_is_refused_before_anything_runs(tmp_path: Path) -> None:
    path = written(tmp_path, "  - {stack: [translation_consensus, sid]}\n")
    path.write_text(path.read_text().replace("visionzip", "divprune"))
    with pytest.raises(ScenarioError, match="does not go with compression 'divprune 25%'"):
        make_plan(load_scenario(path))


def test_an_attack_needs_what_the_neediest_member_needs() -> None:
    assert Stack(members=(Hybrid(), PAI())).route is AdaptiveRoute.BPDA
    assert Stack(members=(Hybrid(), RandomFloor())).route is AdaptiveRoute.EOT
    assert Stack(members=(Hybrid(), RandomFloor())).draws
    assert not Stack(members=(Hybrid(), PAI())).draws
    assert not Stack(members=(Hybrid(), Oracle())).verifiable


@pytest.mark.parametrize(
    ("attack", "defense", "why"),
    [
        ("{type: caa, preset: strict_preserve, adaptive: true}", "{stack: [hybrid, pai]}", None),
        ("{type: caa, adaptive: true}", "{stack: [hybrid, pai]}", "sees no answers"),
        ("{type: verbose, path: compressed, adaptive: true}", "pai", "own distributions"),
        ("{type: cira, adaptive: true}", "pai", "sees no answers"),
        ("{type: cira, adaptive: true}", "{stack: [resize_pad, pai]}", "sees no answers"),
        ("{type: cira, adaptive: true}", "{stack: [resize_pad, hybrid]}", "the vision tower alone"),
        ("{type: pgd, adaptive: true}", "pai", None),
        ("{type: pgd, adaptive: true}", "{stack: [hybrid, pai]}", "does not know the compression"),
    ],
)
def test_an_attack_goes_through_all_parts_or_is_not_run(
    tmp_path: Path, attack: str, defense: str, why: str | None
) -> None:
    scenario = load_scenario(written(tmp_path, f"  - none\n  - {defense}\n", attack))
    found = obstacle(scenario.attacks[0], scenario.defenses[1])
    assert (found is None) if why is None else (found is not None and why in found)
    assert bool(omitted(scenario)) == (why is not None)


def test_a_beam_alone_is_gone_through_as_greedy_decoding_is() -> None:
    assert Guard.of(BeamSearch(beams=3)).acts(compressed=False)


def test_the_majority_of_answers() -> None:
    assert majority(["red"]) == 0
    assert majority(["red", "Blue", " blue "]) == 1
    assert majority(["red", "blue", "blue", "red"]) == 0, "of equally frequent ones the first"
