"""The property docs/results/gate-calibration.md measures, on fewer runs, and that page itself."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from reports.exact import lower_bound

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "benchmarks" / "gate_calibration.py"
    spec = importlib.util.spec_from_file_location("gate_calibration", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def too_often(events: int, runs: int) -> bool:
    """More often than 5 %, beyond what chance in the simulation explains once in 10,000 times."""
    return lower_bound(events, runs, 0.9999) > 0.05


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        ("single", (64,)),
        ("minimum", (100,)),
        ("shared", (20, 5, "copies")),
        ("shared", (40, 3, "mild")),
        ("family", (60, 8)),
        ("weakest", (60, 8)),
        ("ratio", (80,)),
        ("change", (120, 0.3, 0.1, 0.05)),
    ],
)
def test_at_the_limit_hardly_any_run_is_decided(
    script: ModuleType, make: str, arguments: tuple[object, ...]
) -> None:
    found = script.simulate(getattr(script, make)(*arguments), 200, seed=1)
    if found.kind != "fail":
        assert not too_often(found.passes, found.runs)
        assert too_often(found.point_passes, found.runs)
    if found.kind != "pass":
        assert not too_often(found.fails, found.runs)
        assert too_often(found.point_fails, found.runs)


def test_without_the_addition_to_the_design_effect_few_images_pass_too_often(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reports.design.FEW", 0.0)
    found = script.simulate(script.shared(20, 5, "copies"), 300, seed=1)
    assert too_often(found.passes, found.runs)


def test_without_correction_a_family_fails_too_often(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reports.deciding.holm", lambda p_values, levels: list(p_values))
    found = script.simulate(script.family(60, 8), 100, seed=1)
    assert too_often(found.fails, found.runs)


def test_the_page_is_of_its_data_and_holds_what_it_says(script: ModuleType) -> None:
    data = json.loads((ROOT / "benchmarks" / "results" / "gate_calibration.json").read_text())
    found = [script.Rates(**one) for one in data["cases"]]
    page = script.page(found, data["runs"], data["seed"])
    assert (ROOT / "docs" / "results" / "gate-calibration.md").read_text() == page
    assert [one.case for one in found] == [one.name for one in script.cases()]
    assert data["runs"] >= 2_000
    for one in found:
        assert one.kind == "fail" or not too_often(one.passes, one.runs), one.case
        assert one.kind == "pass" or not too_often(one.fails, one.runs), one.case
