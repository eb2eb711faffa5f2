"""A verified and an unverified defence in every reader of one run folder, and what gates do."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from audited import MIDDLE, Run, build

from redteam.cli import main
from reports import Built, build_reports
from reports.gate import Verdict
from reports.marks import marked
from reports.metrics import summarise
from reports.records import GateSpec
from reports.store import RunStore

GOOD = {"attack": "caa adaptive", "defense": "good", "epsilon": MIDDLE}
ORACLE = {"attack": "caa", "defense": "oracle", "epsilon": MIDDLE}
GATES = [
    GateSpec(name="verified", metric="csfr", max=0.3, where=GOOD),
    GateSpec(name="unverified", metric="csfr", max=0.3, where=ORACLE),
    GateSpec(name="taken as it is", metric="csfr", max=0.3, where=ORACLE, allow_unverified=True),
    GateSpec(name="clean", metric="acc_compressed_clean", min=0.9, where=ORACLE),
    GateSpec(name="at least", metric="csfr", min=0.0, where=ORACLE),
    GateSpec(name="fails anyway", metric="csfr", max=0.001, where=ORACLE),
    GateSpec(name="undefended", metric="csfr", max=0.3, where={**GOOD, "defense": "none"}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("audited") / "run", GATES, count=300)


@pytest.fixture(scope="module")
def built(folder: Path) -> Built:
    return build_reports(folder)


@pytest.fixture(scope="module")
def summary(built: Built) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(built.summary.read_text(encoding="utf-8"))
    return found


def command(*arguments: str) -> tuple[int, str]:
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out), mock.patch.object(sys, "argv", ["redteam", *arguments]):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue()


def test_the_summary_has_a_badge_for_each_defence(summary: dict[str, Any]) -> None:
    badges = {one["defense"]: one["badge"] for one in summary["defenses"]}
    assert badges == {"good": "ADAPTIVE-VERIFIED", "oracle": "UNVERIFIED (upper bound)"}
    of_cells = {cell["defense"]: cell["badge"] for cell in summary["cells"]}
    assert of_cells == {**badges, "none": ""}
    assert summary == json.loads(json.dumps(summary))


def test_gates_do_not_pass_on_what_is_unverified(summary: dict[str, Any]) -> None:
    found = {gate["name"]: gate for gate in summary["gates"]}
    verdicts = {name: gate["verdict"] for name, gate in found.items()}
    assert verdicts == {
        "verified": Verdict.PASS,
        "unverified": Verdict.INCONCLUSIVE,
        "taken as it is": Verdict.PASS,
        "clean": Verdict.PASS,
        "at least": Verdict.PASS,
        "fails anyway": Verdict.FAIL,
        "undefended": Verdict.FAIL,
    }
    reason = found["unverified"]["reason"]
    assert "the defence oracle is UNVERIFIED (upper bound) (rule 3" in reason
    assert "allow_unverified: true" in reason
    assert found["unverified"]["cells"][0]["label"].endswith("oracle (unverified) · ε 16/255")


def test_every_reader_carries_the_marks(built: Built) -> None:
    page = built.report.read_text(encoding="utf-8")
    text = built.markdown.read_text(encoding="utf-8")
    column = built.table.columns.index("defense")
    assert {row[column] for row in built.table.rows} == {
        "none",
        "good (adaptive-verified)",
        "oracle (unverified)",
    }
    for shown in (page, text):
        assert "good (adaptive-verified)" in shown
        assert "oracle (unverified)" in shown
        assert "ADAPTIVE-VERIFIED" in shown
        assert "UNVERIFIED (upper bound)" in shown
    assert any(
        "good is ADAPTIVE-VERIFIED" in note and "not checked: none" in note for note in built.notes
    )
    assert any("oracle is UNVERIFIED (upper bound)" in note for note in built.notes)
    assert built.defenses is not None
    rows = {row[0]: row for row in built.defenses.rows}
    assert rows["good"][1] == "ADAPTIVE-VERIFIED"
    assert rows["good"][4].startswith("0.60 → 0.04")
    assert rows["good"][5].startswith("0.60 → 0.15")
    assert rows["good"][-1] == "none"
    assert rows["oracle"][5] == "no attack"
    assert rows["oracle"][-1] == "3"


def test_audit_prints_every_rule(folder: Path) -> None:
    code, text = command("audit", str(folder))
    assert code == 4
    assert "good on scenes-a, fastv K=2 25%: ADAPTIVE-VERIFIED" in text
    assert "oracle on scenes-a, fastv K=2 25%: UNVERIFIED (upper bound)" in text
    for words in ("threat model", "unbounded attack", "not checked", "reproducible"):
        assert text.count(words) >= 2, words
    code, text = command("audit", str(folder), "--json")
    assert code == 4
    assert [one["defense"] for one in json.loads(text)["defenses"]] == ["good", "oracle"]


@pytest.mark.parametrize(
    ("defenses", "expected"), [(("none", "good"), 0), (("none",), 5), (("none", "oracle"), 4)]
)
def test_exit_codes_of_audit(
    defenses: tuple[str, ...], expected: int, folder: Path, tmp_path: Path
) -> None:
    store = RunStore.read(folder)
    cells = [cell for cell in store.manifest.cells if cell.defense in defenses]
    kept = {cell.id for cell in cells}
    manifest = store.manifest.model_copy(update={"cells": cells, "gates": []})
    with RunStore.create(tmp_path / "run", manifest, "") as other:
        other.append(one for one in store.trials() if one.cell in kept)
    assert command("audit", str(tmp_path / "run"))[0] == expected


def test_no_run_folder_is_a_usage_error(tmp_path: Path) -> None:
    assert command("audit", str(tmp_path))[0] == 2


def test_a_run_without_defences_is_as_it_was(tmp_path: Path) -> None:
    run = Run.good(4)
    run.drop(lambda cell: cell.defense != "none")
    summary = summarise(run.manifest, [])
    assert summary["defenses"] == summary["timings"]["defenses"] == []


@pytest.mark.parametrize(
    ("label", "badge", "shown"),
    [
        ("none", "", ""),
        ("tcs", "ADAPTIVE-VERIFIED", "tcs (adaptive-verified)"),
        ("tcs", "UNVERIFIED (upper bound)", "tcs (unverified)"),
        ("tcs (unverified)", "UNVERIFIED (upper bound)", "tcs (unverified)"),
    ],
)
def test_marks_stand_once(label: str, badge: str, shown: str) -> None:
    assert marked(label, badge) == shown
