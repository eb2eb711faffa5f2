"""The shipped gate on the shipped model: the effect this tool exists for, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from workplace import Workplace


@pytest.mark.slow
def test_the_ci_gate_fails_on_the_undefended_model(tmp_path: Path) -> None:
    done = Workplace(tmp_path).redteam("run", "ci-gate", "--out", "run", "--json")
    assert done.returncode == 1, done.stderr
    summary = json.loads(done.stdout)["summary"]
    assert summary["verdict"] == "fail"
    verdicts = {gate["name"]: gate["verdict"] for gate in summary["gates"]}
    assert verdicts["compression opens no hole"] == "fail"
    assert verdicts["noise is harmless"] != "fail"
    noise, caa = (
        next(cell for cell in summary["cells"] if cell["attack"] == name)
        for name in ("noise", "caa")
    )
    assert caa["metrics"]["csfr"]["low"] > noise["metrics"]["csfr"]["high"]
    assert caa["diagnosis"]["ranking"] + caa["diagnosis"]["ranking_partial"] > caa["failures"] / 2
