"""The pages of results: how a long table is split into runs, and what its page says of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCENARIO = {
    "name": "table",
    "compressions": [{"type": "fastv", "layer": 2}, {"type": "visionzip"}],
    "attacks": [{"type": "noise"}, {"type": "pgd", "name": "deep", "epsilons": ["8/255"]}],
    "epsilons": ["2/255", "4/255"],
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location(
            "results_attacks", FOLDER / "results_attacks.py"
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(SCENARIO), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("by", "labels"),
    [
        (None, ["noise", "deep"]),
        ("budget", ["noise@2", "noise@4", "deep@8"]),
        ("compression", ["noise@fastv", "noise@visionzip", "deep@fastv", "deep@visionzip"]),
    ],
)
def test_parts_together_are_the_whole_table(
    script: ModuleType, scenario: Path, by: str | None, labels: list[str]
) -> None:
    parts = script.split(scenario, scenario.parent / "runs", by)
    assert list(parts) == labels
    cells = set()
    for path in parts.values():
        part = yaml.safe_load(path.read_text(encoding="utf-8"))
        (attack,) = part["attacks"]
        assert "epsilons" not in part, "an attack's own budgets are all there is"
        found = {
            (script.label_of(attack), compression["type"], epsilon)
            for compression in part["compressions"]
            for epsilon in attack["epsilons"]
        }
        assert not found & cells
        cells |= found
    assert len(cells) == 2 * 2 + 2 * 1


def test_parts_are_read_in_the_order_of_the_scenario(script: ModuleType, scenario: Path) -> None:
    runs = scenario.parent / "runs"
    for label in ("deep@visionzip", "noise@4", "noise@2", "deep@fastv", "stranger"):
        (runs / label).mkdir(parents=True)
        (runs / label / "summary.json").write_text("{}", encoding="utf-8")
    found = [folder.name for folder in script._folders(scenario, runs)]
    assert found == ["noise@2", "noise@4", "deep@fastv", "deep@visionzip"]
    (runs / "noise").mkdir()
    (runs / "noise" / "summary.json").write_text("{}", encoding="utf-8")
    assert next(iter(script._folders(scenario, runs))).name == "noise"


def test_settings_of_an_attack_in_parts_are_said_once(script: ModuleType) -> None:
    manifest = {"scenario": {"attacks": [{"name": "deep", "type": "pgd", "steps": 3}]}}
    text = script._settings([manifest, manifest])
    assert text.count("- deep: `") == 1
