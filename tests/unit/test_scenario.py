"""Scenarios: what is read, and what is refused with the place and the reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from redteam.document import MAX_BYTES, parse_document
from redteam.errors import ScenarioError
from redteam.scenario import Scenario, find_scenario, load_limited, load_scenario, packaged

GOOD = """\
name: good
targets:
  - {type: scenes}
dataset: {type: scenes, samples: 10}
compressions:
  - {type: fastv, layer: 2, retention: 1/4}
  - {type: fastv, layer: 2, retention: 0.25, positions: reindex}
  - {type: visionzip, keep_tokens: 64}
attacks:
  - {type: noise}
  - {type: caa, steps: 5, alpha: 2/255, epsilons: [4/255, 0.5]}
  - {type: caa, steps: 9, name: strong}
epsilons: [8/255, 16/255, 0.03137254901960784]
gates:
  - {metric: csfr, max: 0.1, where: {attack: caa, epsilon: 4/255}}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str = GOOD, *overrides: str) -> Scenario:
    return load_scenario(write(folder, text), overrides)


def problems(folder: Path, text: str, *overrides: str) -> ScenarioError:
    with pytest.raises(ScenarioError) as caught:
        load(folder, text, *overrides)
    return caught.value


def test_a_good_scenario(tmp_path: Path) -> None:
    scenario = load(tmp_path)
    assert [one.label for one in scenario.compressions] == [
        "fastv K=2 25% keep",
        "fastv K=2 25% reindex",
        "visionzip 64 tokens",
    ]
    assert scenario.compressions[0].options["retention"] == 0.25
    assert [one.label for one in scenario.attacks] == ["noise", "caa", "strong"]
    assert scenario.attacks[0].epsilons == (8 / 255, 16 / 255), "equal budgets are one"
    assert scenario.attacks[1].epsilons == (4 / 255, 0.5)
    assert scenario.attacks[1].options["alpha"] == 2 / 255
    assert [one.label for one in scenario.defenses] == ["none"]
    assert scenario.gates[0].where == {"attack": "caa", "epsilon": 4 / 255}
    assert scenario.gates[0].line == 15


def test_the_hash_is_of_what_decides_results(tmp_path: Path) -> None:
    first = load(tmp_path)
    assert load(tmp_path, GOOD + "description: words\n").hash == first.hash
    assert load(tmp_path, GOOD, "engine.batch_size=1", "engine.device=cuda").hash == first.hash
    assert load(tmp_path, GOOD, "attacks.strong.steps=8").hash != first.hash
    assert load(tmp_path, GOOD, "gates.0.max=0.2").hash != first.hash


def test_a_bare_word_is_a_type(tmp_path: Path) -> None:
    bare = GOOD.replace("{type: noise}", "noise").replace("- {type: scenes}", "- scenes")
    assert load(tmp_path, bare).resolved() == load(tmp_path).resolved()
    assert load(tmp_path, GOOD.replace("{type: noise}", "suite")).attacks[0].type == "suite"
    few = load(tmp_path, bare, "attacks.noise.distribution=sign")
    assert few.attacks[0].options["distribution"] == "sign"


@pytest.mark.parametrize(
    ("word", "message"),
    [("nois", ":10:5: attacks[0].type: there is no attack 'nois'"), ("7", "7 is not allowed")],
)
def test_a_bare_word_that_is_no_type(word: str, message: str, tmp_path: Path) -> None:
    assert message in str(problems(tmp_path, GOOD.replace("{type: noise}", word)))


def test_checks_are_part_of_the_scenario(tmp_path: Path) -> None:
    first = load(tmp_path)
    assert first.checks.repeat == 2
    assert load(tmp_path, GOOD + "checks: {repeat: 2}\n").hash == first.hash
    off = load(tmp_path, GOOD + "checks: {repeat: 0}\n")
    assert off.checks.repeat == 0
    assert off.hash != first.hash, "whether something was looked for decides what is found"
    assert "checks.repeat: -1 is not allowed" in str(problems(tmp_path, GOOD, "checks.repeat=-1"))


def test_a_gate_on_a_type_covers_each_of_its_methods(tmp_path: Path) -> None:
    text = GOOD.replace("where: {attack: caa, epsilon: 4/255}", "where: {compression: fastv}")
    gates = load(tmp_path, text).gates
    assert [gate.where["compression"] for gate in gates] == [
        "fastv K=2 25% keep",
        "fastv K=2 25% reindex",
    ]
    assert len({gate.name for gate in gates}) == 2


def test_yaml_is_core_schema() -> None:
    data = parse_document("{a: no, b: 1e-3, c: 010, d: 1:30, e: ~, f: true, g: '5'}", "x").data
    assert data == {"a": "no", "b": 1e-3, "c": 10, "d": "1:30", "e": None, "f": True, "g": "5"}


def change(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


BAD = {
    "unknown key": (
        change("name: good", "name: good\nsed: 3"),
        ":2:1: sed: ",
        "did you mean 'seed'",
    ),
    "unknown option": (change("steps: 5", "stepz: 5"), ":11:17: attacks[1].stepz", "'steps'"),
    "unknown attack": (change("type: noise", "type: nois"), ":10:12: ", "did you mean 'noise'"),
    "unknown metric": (change("csfr", "csr"), ":15:14: gates[0].metric", "did you mean 'csfr'"),
    "no type": (change("{type: noise}", "{}"), "attacks[0].type: is missing", "noise, pgd"),
    "retention 1.5": (change("1/4", "1.5"), ":6:40: compressions[0].retention: 1.5", "≤ 1"),
    "retention and keep_tokens": (
        change("keep_tokens: 64", "keep_tokens: 64, retention: 0.5"),
        ":8:5: compressions[2]: gives retention and keep_tokens",
        "exactly one",
    ),
    "neither": (change(", keep_tokens: 64", ""), "gives neither", "exactly one"),
    "epsilon 8/0": (change("[8/255,", "[8/0,"), ":13:12: epsilons[0]: '8/0' divides by zero", ""),
    "epsilon 8": (change("[8/255,", "[8,"), "epsilons[0]: 8 is not allowed", "did you mean 8/255?"),
    "epsilon text": (change("[8/255,", "[much,"), "epsilons[0]: 'much' is not", "a number"),
    "own epsilon": (change("0.5]", "3]"), ":11:59: attacks[1].epsilons[1]: 3", "3/255"),
    "no epsilons": (
        GOOD.replace(GOOD.splitlines()[12] + "\n", ""),
        "'noise' has no budget",
        "8/255",
    ),
    "wrong type": (change("steps: 5", "steps: many"), "steps: 'many' is not", "an integer ≥ 0"),
    "bool is no number": (change("steps: 5", "steps: true"), "steps: true is not", "an integer"),
    "infinity": (change("alpha: 2/255", "alpha: .inf"), "alpha: inf is not", "a number > 0"),
    "list for mapping": (change("{type: scenes, samples: 10}", "[1]"), ":4:10: dataset: ", ""),
    "empty list": (change("targets:\n  - {type: scenes}", "targets: []"), "targets: is empty", ""),
    "missing key": (
        change("dataset: {type: scenes, samples: 10}\n", ""),
        "dataset: is missing",
        "",
    ),
    "missing file": (
        change("{type: scenes, samples: 10}", "{type: jsonl, path: none.jsonl}"),
        ":4:30: dataset.path: 'none.jsonl' does not exist",
        "relative to the scenario",
    ),
    "missing model": (
        change("{type: scenes}", "{type: lvlm, model: ./none}"),
        ":3:25: targets[0].model: './none' does not exist",
        "",
    ),
    "name": (change("name: good", "name: ../up"), ":1:7: name: '../up' cannot", "letters"),
    "double name": (
        change("{type: noise}", "{type: noise, name: strong}"),
        "'strong' is taken",
        "another name",
    ),
    "same twice": (
        change("{type: noise}", "{type: noise}\n  - {type: noise}"),
        "is taken by entry 0",
        "remove one",
    ),
    "where": (
        change("attack: caa,", "attack: ca,"),
        "where.attack: no attack",
        "did you mean 'caa'",
    ),
    "where key": (change("attack: caa,", "atack: caa,"), "where.atack: unknown key", "'attack'"),
    "where epsilon": (change("epsilon: 4/255", "epsilon: 5/255"), "where.epsilon", "4/255, 8/255"),
    "no limit": (change("max: 0.1, ", ""), ":15:5: gates[0]: states no limit", "max, min"),
    "crossed limits": (change("max: 0.1", "max: 0.1, min: 0.2"), "nothing can pass", ""),
    "no interval": (change("metric: csfr", "metric: linf"), "'linf' has no interval", ""),
    "tag": (change("name: good", "name: !!python/name:os.system x"), ":1:7: tags", "plain value"),
    "harmless tag": (change("name: good", "name: !!str good"), ":1:7: tags", "plain value"),
    "alias": (change("name: good", "name: &a good\ndescription: *a"), ":1:7: anchors", "write the"),
    "duplicate key": (change("name: good", "name: good\nname: bad"), ":2:1: name: duplicate", ""),
    "not YAML": (change("name: good", "name: {good"), "is not YAML", "indentation"),
    "two documents": (GOOD + "---\nname: x\n", ":16:1: starts a second document", ""),
    "a list": ("- a\n", ":1:1: a list is no scenario", "a mapping"),
    "empty": ("# nothing\n", "is empty", "redteam init"),
    "deep": ("a: " + "[" * 60 + "]" * 60, "is nested deeper than 20", ""),
    "huge": ("# " + "x" * MAX_BYTES, "larger than 1 MiB", ""),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str, tmp_path: Path) -> None:
    text, where, hint = BAD[case]
    message = str(problems(tmp_path, text))
    assert "bad.yaml" in message
    assert where in message
    assert hint in message


def test_all_problems_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = change("1/4", "1.5").replace("steps: 5", "stepz: 5").replace("type: noise", "type: x")
    found = problems(tmp_path, text).problems
    assert [one.key for one in found] == [
        "compressions[0].retention",
        "attacks[0].type",
        "attacks[1].stepz",
    ]


def test_not_utf8_and_not_there(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ScenarioError, match=r"latin\.yaml:1: is not UTF-8"):
        load_scenario(path)
    with pytest.raises(ScenarioError, match="did you mean 'quickstart'"):
        load_scenario("quickstar")


OVERRIDES = {
    "steps": "is not key=value",
    "attacks.fgsm.steps=3": "has no item 'fgsm'",
    "attacks.caa.steps=3": "'caa' is the type of 2 items",
    "attacks.0.type=fgms": "there is no attack 'fgms'; allowed: ",
    "name.x=3": "holds no 'x'",
    "sed=3": "did you mean 'seed'",
    "seed=!!int 3": "tags",
}


@pytest.mark.parametrize("assignment", OVERRIDES)
def test_a_bad_override_names_itself(assignment: str, tmp_path: Path) -> None:
    message = str(problems(tmp_path, GOOD, assignment))
    assert "--set" in message
    assert OVERRIDES[assignment] in message


def test_overrides_and_limits(tmp_path: Path) -> None:
    scenario = load(tmp_path, GOOD, "attacks.strong.steps=50", "epsilons=[1/255]", "seed=7")
    assert scenario.attacks[2].options["steps"] == 50
    assert scenario.attacks[0].epsilons == (1 / 255,)
    assert scenario.seed == 7
    assert scenario.text.startswith("# --set attacks.strong.steps=50\n")
    path = write(tmp_path, GOOD)
    assert load_limited(path, (), 3).dataset.options["samples"] == 3
    assert load_limited(path, (), 300).dataset.options["samples"] == 10


def test_packaged_scenarios_are_found_and_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"quickstart", "ci-gate", "published/caa"} <= set(packaged())
    for name, path in packaged().items():
        assert find_scenario(name) == path
        assert load_scenario(name).name == name.replace("/", "-")
    assert find_scenario("scenarios/published/caa.yaml") == packaged()["published/caa"]
    assert find_scenario("scenarios/quickstart.yaml") == packaged()["quickstart"]


def test_reading_scenarios_imports_no_torch() -> None:
    code = (
        "import sys; from redteam.scenario import load_scenario; "
        "from redteam.capabilities import mismatches; "
        "assert not mismatches(load_scenario('quickstart')); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_override_may_name_methods_by_a_bare_word(tmp_path: Path) -> None:
    scenario = load(tmp_path, GOOD, "attacks=[noise, suite]", "gates=[]")
    assert [attack.type for attack in scenario.attacks] == ["noise", "suite"]


def test_gates_on_a_change_and_families(tmp_path: Path) -> None:
    text = GOOD + "  - {metric: csfr, max_increase: 0.02, baseline: runs/main, family: release}\n"
    gate = load(tmp_path, text).gates[-1]
    assert (gate.baseline, gate.family, gate.max_increase) == ("runs/main", "release", 0.02)
    assert gate.baseline_folder == str((tmp_path / "runs" / "main").resolve())
    assert gate.name == "csfr rises by ≤ 0.02"


def test_a_gate_is_resolved_to_what_decides_and_to_nothing_of_this_machine(tmp_path: Path) -> None:
    text = GOOD + "  - {metric: csfr, max_decrease: 0.02, baseline: runs/main}\n"
    old, new = load(tmp_path, text).resolved()["gates"]
    # As before these keys were there, so that runs from then can be resumed.
    assert set(old) == {"name", "metric", "max", "min", "where", "confidence"}
    assert set(new) - set(old) == {"baseline", "max_decrease"}


def test_a_baseline_that_is_not_there_is_a_caution_and_no_error(tmp_path: Path) -> None:
    from redteam.capabilities import cautions

    text = GOOD + "  - {metric: csfr, max_increase: 0.02, baseline: base}\n"
    (said,) = [one for one in cautions(load(tmp_path, text)) if "baseline" in one]
    assert said.startswith("gate 'csfr rises by ≤ 0.02' cannot pass: its baseline base is not")
    (tmp_path / "base").mkdir()
    assert not [one for one in cautions(load(tmp_path, text)) if "baseline" in one]
