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
    text = script._settings(script._settings_of([manifest, manifest], None))
    assert text.count("- deep: `") == 1


def test_of_a_part_that_was_stopped_the_finished_cells_stand(script: ModuleType) -> None:
    stopped = summary(0.1)
    stopped["progress"] = {"missing": 50}
    cells = stopped["cells"]
    stopped["cells"] = [*cells, {**cells[0], "compression": "visionzip", "n": 250}]
    found = script.measured(stopped, manifest("2026-01-01", name="noise", type="noise"))
    assert [key[0] for key in found] == ["fastv 25%"]


def summary(csfr: float, attack: str = "noise") -> dict[str, object]:
    """What a run of one cell leaves, as far as the page reads it."""
    one = {"value": csfr, "low": csfr - 0.1, "high": csfr + 0.1}
    names = "acc_full_clean acc_full_attacked acc_compressed_clean acc_compressed_attacked"
    names += " upr cae csg csfr cbr full_asr"
    cell = {
        "attack": attack,
        "compression": "fastv 25%",
        "epsilon": 4 / 255,
        "knowledge": "none",
        "n": 300,
        "metrics": dict.fromkeys(names.split(), one),
        "diagnosis": {"ranking": 3},
    }
    return {"cells": [cell], "progress": {"missing": 0}}


def manifest(day: str, **attack: object) -> dict[str, object]:
    """Of the same run."""
    return {
        "created": f"{day}T01:02:03+00:00",
        "seed": 0,
        "samples": [f"s{i}" for i in range(300)],
        "provenance": {"identity": {"device": "cpu"}},
        "scenario": {"attacks": [attack]},
    }


def test_rows_that_were_not_run_again_stay_with_their_day(script: ModuleType) -> None:
    pgd = {"name": "pgd", "type": "pgd", "steps": 3, "alpha": 3 / 255}
    first = script.page(
        [summary(0.1), summary(0.6, "pgd")],
        [manifest("2026-01-01", name="noise", type="noise"), manifest("2026-01-01", **pgd)],
        "command",
        [],
        order=["noise", "pgd"],
    )
    attacks = {"noise": {"type": "noise"}, "pgd": {"type": "pgd", "steps": 3, "alpha": "3/255"}}
    rows, settings = script.carry(first, attacks)
    assert [key[1] for key in rows] == ["noise", "pgd"]
    new = [manifest("2026-02-02", name="noise", type="noise")]
    second = script.page([summary(0.2)], new, "command", [], rows, settings, ["noise", "pgd"])
    assert "2026-02-02 |" in line_of(second, "noise")
    assert "**0.20**" in line_of(second, "noise")
    assert line_of(second, "pgd") == line_of(first, "pgd"), "carried to the letter"
    assert second.index("| noise |") < second.index("| pgd | none")
    assert "- pgd: `" in second


def test_rows_of_an_attack_with_other_options_are_dropped(script: ModuleType) -> None:
    run = [manifest("2026-01-01", name="noise", type="noise", kind="uniform")]
    text = script.page([summary(0.1)], run, "command", [])
    assert script.carry(text, {"noise": {"type": "noise", "kind": "uniform"}})[0]
    assert not script.carry(text, {"noise": {"type": "noise", "kind": "gaussian"}})[0]
    assert not script.carry(text, {})[0], "an attack that is no longer in the scenario"


def test_above_noise_is_read_from_the_intervals(script: ModuleType) -> None:
    runs = [
        manifest("2026-01-01", name=name, type=name) for name in ("noise", "pgd", "margin_split")
    ]
    cells = [summary(0.1), summary(0.29, "pgd"), summary(0.45, "margin_split")]
    text = script.page(cells, runs, "command", [])
    assert "| no | 2026" in line_of(text, "pgd")
    assert "| yes | 2026" in line_of(text, "margin_split")
    assert "| pgd | **0.29** [0.19, 0.39] | 0.29 | margin_split |" in text
    assert "| 1.55 |" in text


def test_what_was_not_run_is_said_budget_by_budget(script: ModuleType) -> None:
    rows = [("fastv K=2", "noise", "2"), ("visionzip", "noise", "2"), ("fastv K=2", "noise", "4")]
    assert script.lacking(rows, SCENARIO) == ["noise at 4/255", "deep"]


def line_of(page: str, attack: str) -> str:
    """The row of an attack in the table of its compression."""
    (found,) = [line for line in page.splitlines() if line.startswith(f"| {attack} | none |")]
    return found
