"""Adaptive attacks in a plan: what they meet, what is refused, and what labels and notes say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from redteam.adaptive import omitted
from redteam.capabilities import cautions, mismatches
from redteam.errors import ScenarioError
from redteam.plan import make_plan
from redteam.scenario import Scenario, load_scenario

TEXT = """\
name: plan
targets: [{type: scenes}]
dataset: {type: scenes, samples: 10}
compressions: [{type: fastv, retention: 0.25}, {type: visionzip, retention: 0.25}]
attacks:
  - {type: noise}
  - {type: caa, steps: 5}
  - {type: caa, steps: 5, adaptive: true, draws: 3}
  - {type: cira, steps: 5, adaptive: true}
epsilons: [16/255]
defenses: [none, translation_consensus, {type: random_floor, rho: 0.2}, oracle]
"""

Load = Callable[..., Scenario]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def loader(*overrides: str) -> Scenario:
        path = tmp_path / "plan.yaml"
        path.write_text(TEXT)
        return load_scenario(path, overrides)

    return loader


def test_images_of_an_adaptive_attack_belong_to_one_defence(load: Load) -> None:
    plan = make_plan(load())
    met = {
        (group.attack.label, group.defense.label, group.gradients)
        for group in plan.groups
        if group.defense is not None
    }
    assert met == {
        ("caa adaptive", "translation_consensus", 5 * 4),
        ("caa adaptive", "random_floor", 5 * 3),
        ("cira adaptive", "translation_consensus", 5 * 4),
    }
    for group in plan.groups:
        served = {(one.cell.attack, one.defense.label) for one in group.cells}
        if group.defense is not None:
            assert {defense for _, defense in served} == {group.defense.label}
        elif group.attack.label == "cira adaptive":
            assert served == {("cira adaptive", "none")}, "its control, with no plain form to share"
        else:
            plain = {one for one in served if one[0] == group.attack.label}
            assert len(plain) == 4, "one image serves all defences"
            control = {("caa adaptive", "none")} if group.attack.label == "caa" else set()
            assert served - plain == control, "against no defence it is the attack itself"
    assert len({group.id for group in plan.groups}) == len(plan.groups)
    assert len({cell.id for cell in plan.cells}) == len(plan.cells)
    assert {cell.spec["attack"].get("draws") for cell in plan.cells} == {None, 3, 20}
    steps = {c.defense: c.declared["steps"] for c in plan.cells if c.attack == "caa adaptive"}
    assert steps == {"none": 5, "translation_consensus": 20, "random_floor": 15}


def test_a_plain_attack_knows_nothing_of_defences(load: Load) -> None:
    ids = [
        {g.id for g in make_plan(load(*more)).groups if g.attack.label == "caa"}
        for more in ((), ("defenses=[]", "attacks=[{type: caa, steps: 5}]"))
    ]
    assert ids[0] == ids[1]


def test_labels_say_what_no_attack_adapts_to(load: Load) -> None:
    labels = [one.label for one in load().defenses]
    assert labels == ["none", "translation_consensus", "random_floor", "oracle (unverified)"]
    labels = [one.label for one in load("attacks=[{type: cira, adaptive: true}]").defenses]
    assert labels[2] == "random_floor (unverified)", "the tower is all this attack sees"
    labels = [one.label for one in load("attacks=[{type: noise}]").defenses]
    assert labels[1] == "translation_consensus (unverified)"


def test_what_is_left_out_is_said(load: Load) -> None:
    found = omitted(load())
    assert len(found) == 3
    assert "cira adaptive is not run against random_floor" in found[1]
    assert "names no route" in found[0]
    assert set(found) <= set(cautions(load()))


def test_cells_record_what_the_defence_is_and_who_knows_it(load: Load) -> None:
    found = {(cell.attack, cell.defense): cell for cell in make_plan(load()).cells}
    assert found["caa adaptive", "none"].guard is None
    assert found["caa adaptive", "none"].knows_defense is None
    plain, knowing = (found[attack, "random_floor"] for attack in ("caa", "caa adaptive"))
    assert (plain.knows_defense, knowing.knows_defense, knowing.knows_seed) == (False, True, False)
    assert knowing.guard is not None
    assert (knowing.guard.kind, knowing.guard.route) == ("selection", "eot")
    assert knowing.guard.stochastic
    consensus = found["caa", "translation_consensus"].guard
    assert consensus is not None
    assert (consensus.route, consensus.stochastic, consensus.iterative) == ("bpda", False, False)
    assert [(part.id, part.kind) for part in consensus.parts] == [(consensus.id, "selection")]
    stacked = load(
        "defenses=[none, hybrid, {stack: [hybrid, resize_pad]}]",
        "attacks=[{type: caa, adaptive: true}]",
    )
    ids = {cell.guard.id: cell.guard for cell in make_plan(stacked).cells if cell.guard}
    hybrid, stack = ids.values()
    assert [part.id == hybrid.id for part in stack.parts] == [True, False]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("attacks=[{type: noise, adaptive: true}]", "it knows nothing"),
        ("attacks=[{type: transfer_caa, adaptive: true}]", "it works on other models"),
        ("attacks=[{type: pgd, adaptive: true}]", "does not know the compression"),
        ("defenses=[]", "the scenario lists no defence"),
        ("defenses=[{type: oracle}]", "names no route"),
        ("compressions=[{type: divprune, retention: 0.25}]", "'divprune 25%': its choice does not"),
    ],
)
def test_what_cannot_adapt_is_refused(override: str, says: str, load: Load) -> None:
    scenario = load(override, "surrogates=[{type: scenes, checkpoint: scenes-b}]")
    assert any(says in problem.message for problem in mismatches(scenario))
    with pytest.raises(ScenarioError, match=says):
        make_plan(scenario)


def test_draws_are_of_adaptive_attacks(load: Load) -> None:
    with pytest.raises(ScenarioError, match="draws are of an attack that adapts"):
        load("attacks=[{type: caa, draws: 3}]")
    with pytest.raises(ScenarioError, match="draws"):
        load("attacks=[{type: caa, adaptive: true, draws: 0}]")
