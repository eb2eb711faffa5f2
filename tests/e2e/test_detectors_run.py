"""Detectors through the command line, on the tiny random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from workplace import SAMPLES, Workplace, cells, ledger

CALIBRATION = 8
DETECTORS = ("disagreement_monitor", "rank_volatility", "mahalanobis", "activation_trajectory")


def calibration(folder: Path, count: int = CALIBRATION) -> None:
    """Clean pictures of their own beside the data."""
    from redteam.pictures import encode_png, to_pixels
    from tests.conformance import tiny

    lines = []
    for index, pixels in enumerate(to_pixels(tiny.pictures(count, seed=77))):
        name = f"images/c{index}.png"
        (folder / name).write_bytes(encode_png(pixels))
        lines.append(
            {"id": f"c{index}", "image": name, "question": tiny.QUESTIONS[0], "answer": "yes"}
        )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "calibration.jsonl").write_text(text)


@pytest.fixture(scope="module")
def finished(
    model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Workplace:
    place = Workplace.build(tmp_path_factory.mktemp("watched"), model_folder, data_folder)
    calibration(place.folder)
    place.edit("  - {type: visionzip, retention: 0.25}\n", "")
    place.edit("  - {type: noise}\n  - {type: pgd, steps: 3, epsilons: [32/255]}\n", "")
    place.edit(
        "  - {type: caa, steps: 4}\n",
        "  - {type: noise}\n  - {type: caa, steps: 2}\n  - {type: caa, steps: 2, adaptive: true}\n",
    )
    place.edit(
        "gates:",
        "defenses: [none, disagreement_monitor, rank_volatility, "
        "{type: mahalanobis, dimensions: 2}, activation_trajectory]\n"
        "calibration: {type: jsonl, path: calibration.jsonl}\ngates:",
    )
    done = place.redteam("run", "scenario.yaml", "--out", "run", "--json")
    assert done.returncode in (0, 1, 4), done.stderr
    (place.folder / "out.json").write_text(done.stdout)
    return place


def by_cell(place: Workplace) -> dict[tuple[str, str], dict[str, Any]]:
    run = place.folder / "run"
    names = {cell["id"]: (cell["attack"], cell["defense"]) for cell in cells(run)}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for trial in ledger(run):
        assert trial["error"] is None, trial["error"]
        found.setdefault(names[trial["cell"]], {})[trial["sample"]] = trial
    return found


def test_answers_are_the_undefended_ones_and_only_scores_are_new(finished: Workplace) -> None:
    trials = by_cell(finished)
    assert len(trials) == 3 * (1 + len(DETECTORS))
    for (attack, defense), rows in trials.items():
        assert len(rows) == SAMPLES
        for sample, trial in rows.items():
            assert (trial["detection"] is None) == (defense == "none")
            if attack != "caa adaptive":
                plain = trials[attack, "none"][sample]
                assert trial["answers"] == plain["answers"]
                assert trial["attacked_png"] == plain["attacked_png"]
            if defense != "none":  # clean pictures are the same in front of every attack
                other = trials["noise", defense][sample]["detection"]
                assert trial["detection"]["clean"] == other["clean"]


def test_calibrations_are_kept_apart(finished: Workplace) -> None:
    found = json.loads((finished.folder / "run" / "calibration.json").read_text())["detectors"]
    assert [one["detector"] for one in found] == list(DETECTORS)
    for one in found:
        learns = one["detector"] in ("mahalanobis", "activation_trajectory")
        assert len(one["scores"]) == len(one["samples"]) == CALIBRATION // (1 + learns)
        assert len(one["learnt_from"]) == learns * CALIBRATION // 2
        assert not set(one["samples"]) & set(one["learnt_from"])
        assert all(name.startswith("c") for name in one["samples"])
        assert (one["state"] is not None) == learns
        if learns:
            assert (finished.folder / "run/calibration" / f"{one['state']}.safetensors").is_file()
    costs = {one["detector"]: one["language"] for one in found}
    assert costs["disagreement_monitor"] > 1
    assert costs["mahalanobis"] == 0


def test_every_report_shows_them(finished: Workplace) -> None:
    out = json.loads((finished.folder / "out.json").read_text())
    section = out["summary"]["detectors"]
    assert len(section["cells"]) == 3 * len(DETECTORS)
    trials = by_cell(finished)
    for one in section["cells"]:
        assert one["negatives"] == one["positives"] == SAMPLES
        rows = trials[one["attack"], one["detector"]].values()
        limit = one["rates"]["0.05"]["threshold"]
        flagged = sum(row["detection"]["attacked"] > limit for row in rows)
        assert one["rates"]["0.05"]["tpr"]["value"] == pytest.approx(flagged / SAMPLES, abs=1e-6)
        assert one["adaptive"] == (one["attack"] == "caa adaptive")
        assert bool(one["curve"]) == (one["detector"] == "disagreement_monitor")
    notes = " ".join(out["notes"])
    assert "fewer than 1,000 cannot tell a false-positive rate of 1 %" in notes
    assert "disagreement_monitor is UNVERIFIED (upper bound)" in notes
    for one in out["summary"]["defenses"]:
        assert one["badge"] == "UNVERIFIED (upper bound)"
        for place in one["places"]:
            states = {rule["rule"]: rule["state"] for rule in place["rules"]}
            assert states[2] == states[22] == states[23] == "passed"
            assert states[25] == "failed"  # nothing makes a detector spend more
    for name in ("summary.md", "report.html"):
        text = (finished.folder / "run" / name).read_text()
        assert "Detectors" in text
        assert "AUROC" in text
    shown = finished.redteam("report", "run")
    assert "AUROC" in shown.stdout


def test_the_effort_of_evading_is_declared_and_counted(finished: Workplace) -> None:
    trials = by_cell(finished)
    run = finished.folder / "run"
    declared = {(cell["attack"], cell["defense"]): cell["declared"]["steps"] for cell in cells(run)}
    knowledge = {(cell["attack"], cell["defense"]): cell["knowledge"] for cell in cells(run)}
    plain = declared["caa", "mahalanobis"]
    for detector, passes in zip(DETECTORS, (2, 4, 1, 1), strict=True):
        key = ("caa adaptive", detector)
        assert declared[key] == 4 * plain + 3 * 2 * passes
        assert knowledge[key] == "white_box"
        for trial in trials[key].values():
            assert 0 < trial["effort"]["backwards"] <= declared[key]
            assert trial["effort"]["queries"] == 4


def test_a_resumed_run_judges_by_the_same_calibration(finished: Workplace) -> None:
    run = finished.folder / "run"
    before = (run / "calibration.json").read_bytes()
    lines = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    names = {cell["id"]: (cell["attack"], cell["defense"]) for cell in cells(run)}
    again_please = {("noise", "mahalanobis"), ("caa", "activation_trajectory")}
    kept = [one for one in lines if names[json.loads(one)["trial"]["cell"]] not in again_please]
    assert len(kept) == len(lines) - 2 * SAMPLES
    (run / "ledger.jsonl").write_text("".join(kept))
    done = finished.redteam("run", "scenario.yaml", "--out", "run", "--json")
    assert done.returncode in (0, 1, 4), done.stderr
    assert (run / "calibration.json").read_bytes() == before
    again = {(one["cell"], one["sample"]): one["detection"] for one in ledger(run)}
    for line in (json.loads(one)["trial"] for one in lines):
        found, wanted = again[line["cell"], line["sample"]], line["detection"]
        if wanted is not None:
            assert found["clean"] == pytest.approx(wanted["clean"], abs=1e-5)
            assert found["attacked"] == pytest.approx(wanted["attacked"], abs=1e-5)


def test_what_has_no_threshold_is_refused(finished: Workplace) -> None:
    def refused(*overrides: str) -> str:
        sets = [part for one in overrides for part in ("--set", one)]
        done = finished.redteam("run", "scenario.yaml", "--out", "other", *sets)
        assert done.returncode == 2
        assert not (finished.folder / "other").exists()
        return done.stderr

    without = refused("calibration=null")
    assert "the scenario names none" in without
    assert "calibration: {type: scenes, split: validation" in without
    assert "6 of 6 samples are also in `dataset` (s0, s1, s2 …)" in refused(
        "calibration.path=data.jsonl"
    )
    text = (finished.folder / "data.jsonl").read_text().replace('"id": "s', '"id": "t')
    (finished.folder / "copy.jsonl").write_text(text)
    assert "the pictures of 6 samples are also in `dataset`" in refused(
        "calibration.path=copy.jsonl"
    )
    none = refused("compressions=[{type: divprune, retention: 0.25}]")
    assert "'rank_volatility" in none
