"""The page of CAA's ablation: differences are paired, verdicts come from their intervals."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from reports.measure import Row

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location(
            "results_caa_ablation", FOLDER / "results_caa_ablation.py"
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


def row(number: int, full: bool, compressed: bool, *, error: bool = False) -> Row:
    outcome = (True, number != 0, full, compressed)  # sample 0 is wrong when compressed, clean
    return Row(
        f"i{number // 2}", "", error, *outcome, None, None, None, None, (), sample=f"s{number}"
    )


def test_the_difference_of_csg_is_paired_and_leaves_errors_out(script: ModuleType) -> None:
    first = [row(n, full=True, compressed=n > 4) for n in range(10)]
    second = [row(n, full=n > 1, compressed=n > 2) for n in range(9)]
    second.append(row(9, full=True, compressed=True, error=True))
    value, low, high = script.difference(first, second, seed=3)
    # Nine common samples, eight of them right when compressed.
    one, two = 9 / 9 - 4 / 8, 7 / 9 - 6 / 8
    assert value == pytest.approx(one - two)
    assert low < value < high
    assert script.difference(first, second, seed=3) == (value, low, high)
    assert script.difference(first, first, seed=3) == (0, 0, 0)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.3, "agree"), (-0.1, 0.3, "not told apart"), (-0.3, -0.1, "disagree")],
)
def test_verdicts(script: ModuleType, low: float, high: float, verdict: str) -> None:
    assert script.Pair("caa", "noise", (low + high) / 2, low, high).verdict == verdict


def test_rows_of_the_scenario_are_those_of_the_published_table(script: ModuleType) -> None:
    scenario = yaml.safe_load((FOLDER.parent / script.SCENARIO).read_text(encoding="utf-8"))
    names = {one.get("name", one["type"]) for one in scenario["attacks"]}
    assert set(script.PUBLISHED) <= names
    ranks = sorted(script.PUBLISHED.values(), key=lambda one: one.csg)
    assert [one.rank for one in ranks] == sorted(one.rank for one in ranks)
