"""docs/datasets.md: every scenario in it is valid, and no data set is forgotten."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from redteam.capabilities import mismatches
from redteam.catalog import BUILTIN
from redteam.datasets.scoring import SCORERS
from redteam.scenario import load_scenario

PAGE = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text(encoding="utf-8")
SCENARIOS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("number", range(len(SCENARIOS)))
def test_the_scenarios_can_be_copied(number: int, tmp_path: Path) -> None:
    for name in ("data.jsonl", "data.csv", "data"):
        (tmp_path / name).touch()
    (tmp_path / "s.yaml").write_text(SCENARIOS[number], encoding="utf-8")
    assert mismatches(load_scenario(tmp_path / "s.yaml")) == []


def test_nothing_is_forgotten() -> None:
    types = re.findall(r"type: (\w+)", "".join(SCENARIOS))
    assert set(BUILTIN["datasets"]) <= set(types)
    for scorer in SCORERS:
        assert f"\n| `{scorer}` |" in PAGE
