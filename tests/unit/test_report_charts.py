"""Charts against the budget: every attack is drawn, controls beside it, norms apart."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from judged_run import ATTACKS, EPSILONS, build
from report_data import cell

import reports
from reports.html.charts import budget_charts, series_of, survival_charts
from reports.records import GateSpec


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gates = [
        GateSpec(name="caa", metric="csfr", max=0.95, where={"attack": "caa"}),
        GateSpec(name="weak", metric="csfr", max=0.2, where={"attack": "weak"}),
    ]
    folder = build(tmp_path_factory.mktemp("runs") / "run", gates)
    reports.build_reports(folder)
    return folder


@pytest.fixture(scope="module")
def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def test_every_attack_with_several_budgets_has_a_curve(summary: dict[str, Any]) -> None:
    charts = budget_charts(summary["cells"])
    assert [one.title for one in charts] == ["fastv (1 of 2)", "fastv (2 of 2)"]
    names = [[name for _, name in one.legend] for one in charts]
    assert {name for legend in names for name in legend} >= set(ATTACKS)
    assert all("noise" in legend for legend in names), "the control stands in every chart"
    for chart in charts:
        kinds = [kind for kind, _ in chart.legend]
        assert len(kinds) == len(set(kinds)), "two curves look alike"
        assert str(chart.drawing).count("<polygon") == len(kinds), "a band each"


def test_the_curve_says_what_the_summary_says(summary: dict[str, Any]) -> None:
    chart = budget_charts(summary["cells"])[0]
    csfr = next(c for c in summary["cells"] if c["id"] == "caa1")["metrics"]["csfr"]
    assert f"caa at ε 8/255: {csfr['value']:.2f} [{csfr['low']:.2f}, {csfr['high']:.2f}]" in (
        chart.description
    )


def test_norms_have_charts_of_their_own(summary: dict[str, Any]) -> None:
    few = [one for one in summary["cells"] if one["attack"] in ("caa", "noise")]
    l2 = [{**one, "norm": "l2", "epsilon": 40 * one["epsilon"]} for one in few]
    assert [one.title for one in budget_charts([*few, *l2])] == ["fastv, ℓ∞", "fastv, ℓ2"]


def test_a_single_budget_makes_no_curve(summary: dict[str, Any]) -> None:
    few = [one for one in summary["cells"] if one["epsilon"] == EPSILONS[0]]
    assert budget_charts(few) == []


def test_colours_are_those_of_the_attack() -> None:
    cells = [
        cell(str(i), attack=f"a{i}", knowledge="none" if i < 2 else "encoder").model_dump()
        for i in range(9)
    ]
    kinds = [one.kind for one in series_of(cells).values()]
    assert kinds == ["s0 dash0", "s0 dash1", "s1", "s2", "s3", "s4", "s5", "s1", "s2"]
    assert [one.panel for one in series_of(cells).values()] == [None, None, 0, 0, 0, 0, 0, 1, 1]


def test_minimal_epsilons_are_drawn(summary: dict[str, Any], run: Path) -> None:
    (chart,) = survival_charts(summary["cells"])
    assert chart.description.startswith("Half of 40 samples break at 7/255 (95 % interval ")
    assert "10 hold at 16/255" in chart.description
    page = (run / "report.html").read_text()
    assert "Minimal epsilon" in page
    assert chart.description in page
    assert chart.description in (run / "summary.md").read_text().replace("\\", "")


def test_the_table_has_a_median_where_there_is_a_search(run: Path) -> None:
    table = reports.build_reports(run).table
    assert table.columns[-1] == "median ε"
    assert [row[-1] for row in table.rows][-2:] == ["—", "7/255"]


def test_the_page_says_what_was_declared_used_and_by_whom(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "60 gradient steps, 22 queries" in page
    assert re.search(r"suite <small>ε 4/255</small></th><td>white_box</td>", page)
    assert re.search(r">60</td>\s*<td class=\"num\">30</td><td class=\"num\">31</td>", page)
    assert "noise 20, caa 20" in page or "caa 20, noise 20" in page
    assert "unknown, asked through" in page


def test_a_doubted_gate_is_inconclusive_everywhere(summary: dict[str, Any], run: Path) -> None:
    verdicts = {gate["name"]: gate["verdict"] for gate in summary["gates"]}
    assert verdicts == {"caa": "pass", "weak": "inconclusive"}
    assert [(check["code"], check["cells"]) for check in summary["checks"]] == [
        ("no-progress", ["weak0", "weak1", "weak2"]),
        ("no-gain", ["weak0", "weak1", "weak2"]),
        ("no-gain", ["pgd0", "pgd1", "pgd2"]),
    ]
    page, markdown = (run / "report.html").read_text(), (run / "summary.md").read_text()
    for words in ("no-progress", "try a margin loss"):
        assert words in page
        assert words in markdown
    notes = reports.build_reports(run).notes
    assert sum("no-gain" in note for note in notes) == 1, "one sentence for both attacks"
    assert any("'no-gain' on weak, pgd: " in note for note in notes)
    assert reports.build_reports(run).doubted
