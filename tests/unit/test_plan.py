"""Plans: cells, shared images, stable ids and seeds, capabilities, costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from redteam import cli
from redteam.adaptive import met
from redteam.capabilities import mismatches
from redteam.cost import estimate, unit_cost
from redteam.errors import DatasetError, ScenarioError
from redteam.plan import Plan, make_plan, seed_of
from redteam.scenario import Scenario, load_scenario, packaged
from redteam.signature import Signature, signature

TEXT = """\
name: plan
targets: [{type: scenes}]
dataset: {type: scenes, samples: 10}
compressions: [{type: fastv, retention: 0.25}, {type: visionzip, retention: 0.25}]
attacks:
  - {type: noise, epsilons: [8/255, 8/255, 0]}
  - {type: pgd, steps: 20, restarts: 2}
  - {type: pgd, path: compressed, steps: 5}
  - {type: caa, steps: 30}
  - {type: caa, steps: 30, preset: strict_preserve}
epsilons: [16/255, 8/255]
engine: {batch_size: 4}
"""

Load = Callable[..., Scenario]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def loader(*overrides: str, text: str = TEXT) -> Scenario:
        path = tmp_path / "plan.yaml"
        path.write_text(text)
        return load_scenario(path, overrides)

    return loader


def test_images_are_shared_by_what_does_not_know_the_compression(load: Load) -> None:
    plan = make_plan(load())
    shared = {
        (group.attack.label, len(group.cells), group.known.label if group.known else "")
        for group in plan.groups
    }
    both = "fastv K=2 25%", "visionzip 25%"
    assert shared == {("noise", 2, ""), ("pgd full steps=20 restarts=2", 2, "")} | {
        (attack, 1, known)
        for attack in ("pgd compressed steps=5 restarts=1", "caa paper", "caa strict_preserve")
        for known in both
    }
    assert len(plan.cells) == 2 * (2 + 4 * 2)
    assert len({cell.id for cell in plan.cells}) == len(plan.cells)
    assert len({group.id for group in plan.groups}) == len(plan.groups)


def test_cells_say_what_the_attack_knows(load: Load) -> None:
    known = {
        cell.attack: (cell.knowledge, cell.knows_compression) for cell in make_plan(load()).cells
    }
    assert known["noise"] == ("none", False)
    assert known["pgd full steps=20 restarts=2"] == ("white_box", False)
    assert known["caa paper"] == ("compressed", True)
    assert known["caa strict_preserve"] == ("white_box", True)


def test_cells_are_ordered_for_a_table(load: Load) -> None:
    cells = make_plan(load()).cells
    assert [cell.compression for cell in cells] == sorted(cell.compression for cell in cells)
    caa = [cell.epsilon for cell in cells if cell.attack == "caa paper"]
    assert caa == [8 / 255, 16 / 255] * 2


def test_every_cell_meets_every_sample_once(load: Load) -> None:
    plan = make_plan(load())
    seen = [
        (one.cell.id, index)
        for unit in plan.units(10)
        for one in unit.group.cells
        for index in unit.samples
    ]
    assert len(seen) == len(set(seen)) == 10 * len(plan.cells)


def ids(plan: Plan) -> dict[tuple[str, ...], str]:
    return {
        (cell.compression, cell.attack, str(cell.epsilon)): group.id + cell.id
        for group in plan.groups
        for cell in (one.cell for one in group.cells)
    }


def test_ids_depend_on_nothing_else_in_the_scenario(load: Load) -> None:
    before = ids(make_plan(load()))
    for overrides in (
        ["engine.batch_size=1"],
        ["dataset.samples=3"],
        ["seed=9"],
        ["epsilons=[8/255, 4/255, 16/255]"],
        ["compressions=[{type: visionzip, retention: 0.25}, {type: fastv, retention: 1/4}]"],
    ):
        after = ids(make_plan(load(*overrides)))
        assert all(after[key] == value for key, value in before.items()), overrides
    changed = ids(make_plan(load("attacks.3.steps=31")))
    assert {key for key in before if changed.get(key) != before[key]}


def test_seeds() -> None:
    seeds = {
        seed_of(root, what, sample)
        for root in (0, 1)
        for what in ("a", "b")
        for sample in ("s1", "s2", "1/s")
    }
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(0, "a", "s1") == 2915932460773990944, "seeds never change between versions"


def test_what_does_not_fit_is_found_before_torch(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    import redteam.scenario

    def altered(entry: object) -> Signature:
        found = signature(entry)  # type: ignore[arg-type]
        facts = dict(found.facts)
        if found.entry.name == "caa":
            facts["knowledge"] = "surrogate"
        if found.entry.kind == "targets":
            facts["capabilities"] = ("generate",)
        return Signature(found.entry, found.options, found.summary, facts)

    monkeypatch.setattr(redteam.scenario, "signature", altered)
    text = "\n".join(map(str, mismatches(load())))
    assert "plan.yaml:2:11: targets[0]: target 'scenes-a' does not expose its visual tokens" in text
    assert "attacks[1]: attack 'pgd full steps=20 restarts=2' needs gradients" in text
    assert "attacks[3]: attack 'caa paper' has no surrogate to work on" in text
    assert "noise" not in text


def test_a_method_that_refuses_its_options_names_its_line(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    import redteam.scenario

    class Picky:
        def __init__(self, **options: object) -> None:
            raise ValueError(f"steps {options['steps']} and restarts do not go together")

    real = redteam.scenario.load
    monkeypatch.setattr(
        redteam.scenario, "load", lambda entry: Picky if entry.name == "caa" else real(entry)
    )
    with pytest.raises(ScenarioError, match=r"plan\.yaml:9:5: attacks\[3\]: steps 30 and restarts"):
        make_plan(load())


def test_costs_add_up(load: Load) -> None:
    plan = make_plan(load())
    found = estimate(plan, 10)
    per_sample = 2 * (20 * 2) + 2 * 2 * 5 + 2 * 2 * 30 * 2
    assert found.gradients == 10 * per_sample
    assert found.images == 10 * len(plan.groups)
    assert found.seconds == pytest.approx(sum(map(unit_cost, plan.units(10))))
    assert found.seconds is not None
    assert estimate(plan, 20).seconds == pytest.approx(2 * found.seconds)


@pytest.mark.parametrize("name", packaged())
def test_every_packaged_scenario_plans_without_a_model_or_data(name: str) -> None:
    plan = make_plan(load_scenario(name))
    scenario = plan.scenario
    methods = len(scenario.targets) * len(scenario.compressions)
    # An adaptive attack meets only the defences it can go through.
    budgets = sum(
        len(one.epsilons) * len(met(scenario, one) if one.adaptive else scenario.defenses)
        for one in scenario.attacks
    )
    assert len(plan.cells) >= methods * budgets  # controls of transfer attacks come on top
    assert any("noise" in attack.type for attack in scenario.attacks)


@pytest.mark.parametrize("name", [name for name in packaged() if name.startswith("published/")])
def test_published_scenarios_hold_their_figures_as_gates(name: str) -> None:
    scenario = load_scenario(name)
    assert {target.type for target in scenario.targets} == {"lvlm"}
    assert all("/" in str(target.options["model"]) for target in scenario.targets)
    paper = name.removeprefix("published/").partition("-")[0]
    assert paper in {attack.type for attack in scenario.attacks}
    assert any(gate.where.get("attack") == paper for gate in scenario.gates)
    assert all(gate.name.startswith("published .") for gate in scenario.gates)
    for gate in scenario.gates:
        figure = float(gate.name.split()[1].rstrip(","))
        assert gate.min is None or gate.min < figure
        assert gate.max is None or figure < gate.max


def test_planning_does_not_need_the_hub(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(*arguments: object) -> None:
        raise DatasetError("lmms-lab/POPE cannot be loaded: no connection")

    monkeypatch.setattr("redteam.datasets.hub.HubTable.__init__", away)
    cli.plan("published/caa", as_json=True)
    said = capsys.readouterr()
    assert json.loads(said.out)["samples"] == 1000
    assert "planned with the 1000 samples asked for; lmms-lab/POPE" in said.err
    with pytest.raises(DatasetError):
        cli.plan("published/caa", ["dataset.samples=null"])
