"""Alarms raised on purpose, through the command line, on the tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_detectors_run import calibration
from workplace import SAMPLES, Workplace, cells, ledger


@pytest.fixture(scope="module")
def finished(
    model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Workplace:
    place = Workplace.build(tmp_path_factory.mktemp("alarm"), model_folder, data_folder)
    calibration(place.folder)
    place.edit("  - {type: visionzip, retention: 0.25}\n", "")
    place.edit("  - {type: noise}\n  - {type: pgd, steps: 3, epsilons: [32/255]}\n", "")
    place.edit(
        "  - {type: caa, steps: 4}\n",
        "  - {type: noise, epsilons: [32/255]}\n"
        "  - {type: force_fallback, steps: 8, adaptive: true, epsilons: [32/255]}\n",
    )
    place.edit(
        "gates:",
        "defenses: [none, {type: mahalanobis, dimensions: 2}, disagreement_monitor]\n"
        "calibration: {type: jsonl, path: calibration.jsonl}\ngates:",
    )
    done = place.redteam("run", "scenario.yaml", "--out", "run", "--json")
    assert done.returncode in (0, 1, 4), done.stderr
    (place.folder / "out.json").write_text(done.stdout)
    return place


def flagged(place: Workplace, attack: str, defense: str) -> int:
    run = place.folder / "run"
    ids = {one["id"] for one in cells(run) if (one["attack"], one["defense"]) == (attack, defense)}
    rows = [one["detection"] for one in ledger(run) if one["cell"] in ids]
    assert len(rows) == SAMPLES
    assert all(one["limit"] is not None for one in rows)
    return sum(one["attacked"] > one["limit"] for one in rows)


@pytest.mark.parametrize("detector", ["mahalanobis", "disagreement_monitor"])
def test_more_are_flagged_than_under_noise(finished: Workplace, detector: str) -> None:
    raised = flagged(finished, "force_fallback adaptive", detector)
    assert raised >= flagged(finished, "noise", detector)
    assert raised > 0


def test_rule_25_tells_what_they_cost(finished: Workplace) -> None:
    summary = json.loads((finished.folder / "out.json").read_text())["summary"]
    for one in summary["defenses"]:
        (rule,) = [r for r in one["places"][0]["rules"] if r["rule"] == 25]
        assert rule["state"] == "passed", rule
        raised = flagged(finished, "force_fallback adaptive", one["defense"])
        assert f" {raised} of {SAMPLES} samples raise the alarm" in rule["message"]
        assert "times as long" in rule["message"]


def test_whoever_raises_alarms_evades_nothing(finished: Workplace) -> None:
    summary = json.loads((finished.folder / "out.json").read_text())["summary"]
    assert not any(one["adaptive"] for one in summary["detectors"]["cells"])
    (note,) = [one for one in summary["detectors"]["notes"] if "on purpose" in one]
    assert "mahalanobis" in note
