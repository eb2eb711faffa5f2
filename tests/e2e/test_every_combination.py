"""Attacks × compressors × defences, generated from the catalogue: right, or refused with a reason.

By default compressors of every kind meet every defence: defence j on compressor i is attacked by
attack i + j, in its adaptive form where it has one, so that no attack and no defence is left out.
All of attack × compressor × defence take hours: ``pytest -m exhaustive tests/e2e``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from workplace import Workplace

from redteam.calibrating import open_calibration
from redteam.catalog import BUILTIN
from redteam.engines.local import LocalEngine
from redteam.errors import ScenarioError
from redteam.plan import ImageGroup, Plan, make_plan, merged
from redteam.runner import make_manifest
from redteam.scenario import Method, Scenario, load_scenario
from reports.store import RunStore

COMPRESSORS = list(BUILTIN["compressors"])
KINDS = (
    "fastv",  # inside the language model
    "pyramiddrop",  # at several layers
    "visionzip",  # behind the tower, merging
    "prumerge",  # as many as its scores say
    "divprune",  # without attention
    "tome",  # inside the tower
    "pool",  # without a choice
    "token_sparse_attention",  # inside attention
    "quecc",  # trained, reads the question
    "pipeline",  # several
)
"""Compressors of every kind; the others differ from one of them in how they score."""
ATTACKS = [*BUILTIN["attacks"], "torchattacks.FGSM"]
DEFENSES = list(BUILTIN["defenses"])
SAMPLES = 2

TRAINED = ("explainability", "quecc", "tokenflex", "sparsifiner")
"""Compressors with weights of their own, which only the embedded LVLM has."""
COMPRESSOR_OPTIONS: dict[str, dict[str, Any]] = {
    "pipeline": {
        "stages": [{"type": "visionzip", "retention": 0.5}, {"type": "fastv", "keep_tokens": 9}]
    },
    "drop_all": {"layer": 2},
}
ATTACK_OPTIONS: dict[str, dict[str, Any]] = {
    "square": {"queries": 2},
    "query": {"queries": 2},
    "suite": {"members": ["fgsm", "cage"], "steps": 1},
    "minimal": {"attack": "fgsm", "steps": 1},
    "verbose": {"length": 2, "steps": 1},
    "v_attack": {"source": "red", "target": "blue", "steps": 1},
    "noise": {},
    "fgsm": {},
    "torchattacks.FGSM": {},
}
DEFENSE_OPTIONS: dict[str, dict[str, Any]] = {"stack": {"stack": ["hybrid", "sid"]}}


def defense_options(defense: str, place: Workplace, *, trained: bool) -> dict[str, Any]:
    """Options of a defence; weights that fit the target."""
    if defense == "robust_encoder" and not trained:
        return {"weights": str(place.folder / "model")}
    return DEFENSE_OPTIONS.get(defense, {})


def everything(names: Sequence[str], place: Workplace) -> Scenario:
    """Some compressors with all attacks, in both forms, and all defences."""
    trained = set(names) <= set(TRAINED)
    tiny = {"type": "lvlm", "model": str(place.folder / "model"), "name": "tiny"}
    data = {"type": "jsonl", "path": str(place.folder / "data.jsonl"), "samples": SAMPLES}
    scenes = {"type": "scenes", "split": "test", "samples": SAMPLES}
    attacks = [{"type": one, **ATTACK_OPTIONS.get(one, {"steps": 1})} for one in ATTACKS]
    adaptive = [
        {**copy.deepcopy(one), "name": f"{one['type']} adaptive", "adaptive": True, "draws": 2}
        for one in attacks
    ]
    path = place.folder / "everything.yaml"
    head = {
        "name": "everything",
        "seed": 0,
        "targets": [{"type": "scenes"} if trained else tiny],
        "surrogates": [{"type": "scenes", "checkpoint": "scenes-b"}],
        "dataset": scenes if trained else data,
        "calibration": {"type": "scenes", "split": "validation", "samples": 6},
        "epsilons": [0.06],
        "checks": {"repeat": 0},  # that attacks repeat is tested elsewhere; here it costs thrice
        "compressions": [
            {"type": one, **COMPRESSOR_OPTIONS.get(one, {"retention": 0.25})} for one in names
        ],
        "attacks": [*attacks, *adaptive],
        "defenses": [
            {"type": one, **defense_options(one, place, trained=trained)} for one in DEFENSES
        ],
    }
    path.write_text(yaml.safe_dump(head, sort_keys=False))
    return load_scenario(path)


def planned(whole: Scenario, attack: Method, defense: Method) -> tuple[tuple[ImageGroup, ...], str]:
    """The plan of one combination, or why it is refused."""
    try:
        return make_plan(replace(whole, attacks=(attack,), defenses=(defense,))).groups, ""
    except ScenarioError as error:
        return (), error.problems[0].message


def check(folder: Path, whole: Scenario, pairs: Sequence[tuple[str, str]]) -> int:
    """Plan each pair of attack and defence, run those that are accepted, look for errors."""
    plain = {one.type: one for one in whole.attacks if not one.adaptive}
    adapting = {one.type: one for one in whole.attacks if one.adaptive}
    guards = {one.type: one for one in whole.defenses}
    groups: list[ImageGroup] = []
    for hit, guard in pairs:
        for form in (adapting[hit], plain[hit]):
            found, why = planned(whole, form, guards[guard])
            if found:
                groups += found
                break
            assert len(why) > 30, "a refusal says why"
    run(folder, whole, groups)
    return len(groups)


def run(folder: Path, whole: Scenario, groups: Sequence[ImageGroup]) -> None:
    """All cells of these groups; none may end in an error."""
    used = {cell.defense.label for group in groups for cell in group.cells}
    some = replace(whole, defenses=tuple(one for one in whole.defenses if one.label in used))
    plan = Plan(some, tuple(merged(groups)))
    samples = some.dataset.create().open()
    engine = LocalEngine(plan, samples, "cpu", calibration=open_calibration(some, samples))
    identity = engine.prepare()
    with RunStore.create(folder, make_manifest(plan, samples, identity)) as store:
        for unit in plan.units(len(samples)):
            names = {one.cell.id: one.cell for one in unit.group.cells}
            for trial in engine.execute(unit, store):
                cell = names[trial.cell]
                where = f"{cell.compression} × {cell.attack} × {cell.defense}"
                assert trial.error is None, f"{where}: {trial.error}"
                assert trial.answers is not None


@pytest.fixture(scope="module")
def scenarios(
    model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Scenario]:
    """By compressor, a scenario with it and all else."""
    place = Workplace.build(tmp_path_factory.mktemp("combined"), model_folder, data_folder)
    found = {}
    for some in ([one for one in COMPRESSORS if one not in TRAINED], TRAINED):
        whole = everything(some, place)
        for one in whole.compressions:
            found[one.type] = replace(whole, compressions=(one,))
    return found


@pytest.mark.parametrize("name", KINDS)
def test_every_defence(name: str, scenarios: dict[str, Scenario], tmp_path: Path) -> None:
    index = KINDS.index(name)
    pairs = [
        (ATTACKS[(index + place) % len(ATTACKS)], guard) for place, guard in enumerate(DEFENSES)
    ]
    assert check(tmp_path / "run", scenarios[name], pairs) > 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("hit", ATTACKS)
@pytest.mark.parametrize("name", COMPRESSORS)
def test_everything(name: str, hit: str, scenarios: dict[str, Scenario], tmp_path: Path) -> None:
    check(tmp_path / "run", scenarios[name], [(hit, guard) for guard in DEFENSES])


def test_nothing_is_left_out() -> None:
    """What the rotation promises."""
    met = {
        (ATTACKS[(i + j) % len(ATTACKS)], one, other)
        for i, one in enumerate(KINDS)
        for j, other in enumerate(DEFENSES)
    }
    assert {hit for hit, _, _ in met} == set(ATTACKS)
    assert len({(one, other) for _, one, other in met}) == len(KINDS) * len(DEFENSES)
    assert all(len({hit for hit, _, other in met if other == name}) >= 10 for name in DEFENSES)
