"""The same scenario twice on one machine is the same run, byte for byte, but for how long it took.

A gradient attack, a defence that draws, and a detector: what could differ is in here. The second
run is a process of its own with other hashes of strings, so that no order of a set can hide.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_detectors_run import calibration
from workplace import SAMPLES, Workplace, ledger

from redteam.pictures import decode_png
from reports.records import Manifest

CELLS = 2 * 3
DIFFERS = ("timings", "demands")
"""Of a trial: seconds and memory; the token counts beside them are compared."""


def build(folder: Path, model_folder: Path, data_folder: Path) -> Workplace:
    place = Workplace.build(folder, model_folder, data_folder)
    calibration(place.folder)
    place.edit("  - {type: visionzip, retention: 0.25}\n", "")
    place.edit("  - {type: noise}\n", "")
    place.edit("attack: noise", "attack: pgd")
    place.edit(
        "gates:",
        "defenses: [none, {type: random_floor, rho: 0.5}, disagreement_monitor]\n"
        "calibration: {type: jsonl, path: calibration.jsonl}\ngates:",
    )
    return place


@pytest.fixture(scope="module")
def place(
    model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Workplace:
    """With one run in it, ``first``."""
    place = build(tmp_path_factory.mktemp("twice"), model_folder, data_folder)
    assert place.redteam("run", "scenario.yaml", "--out", "first").returncode in (0, 1, 4)
    return place


def timeless(trial: dict[str, Any]) -> dict[str, Any]:
    demands = {
        path: {key: value for key, value in one.items() if key in ("tokens", "generated")}
        for path, one in (trial["demands"] or {}).items()
    }
    kept = {key: value for key, value in trial.items() if key not in DIFFERS}
    if trial["detection"] is not None:
        kept["detection"] = {k: v for k, v in trial["detection"].items() if k != "seconds"}
    return {**kept, "demands": demands}


def lines(run: Path) -> list[str]:
    """The ledger, line by line, without timings."""
    return [json.dumps(timeless(trial)) for trial in ledger(run)]


def files(run: Path, pattern: str) -> dict[str, bytes]:
    found = {str(path.relative_to(run)): path.read_bytes() for path in run.glob(pattern)}
    assert found
    return found


def test_the_same_scenario_twice_is_the_same_run(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "12345")
    process = place.start("run", "scenario.yaml", "--out", "second")
    _, err = process.communicate(timeout=300)
    assert process.returncode in (0, 1, 4), err
    first, second = place.folder / "first", place.folder / "second"
    assert len(lines(first)) == CELLS * SAMPLES
    assert lines(second) == lines(first), "in the same order, too"
    for trial in ledger(first):
        assert trial["error"] is None
    for pattern in ("images/*/*.png", "calibration.json", "scenario.yaml"):
        assert files(second, pattern) == files(first, pattern), pattern
    found = [json.loads((run / "summary.json").read_text()) for run in (first, second)]
    for one in found:
        del one["timings"]
        for cell in one["detectors"]["cells"]:
            assert set(cell["cost"]) >= {"answers", "seconds"}
            del cell["cost"]["answers"], cell["cost"]["seconds"]  # both are times
    assert found[0] == found[1]
    made = [json.loads((run / "manifest.json").read_text()) for run in (first, second)]
    for one in made:
        del one["created"], one["provenance"]["command"]
    assert made[0] == made[1]


def test_another_batch_size_gives_the_same_up_to_rounding(place: Workplace) -> None:
    """Sums of other batches are rounded otherwise; images and answers have to stay."""
    done = place.redteam("run", "scenario.yaml", "--out", "small", "--set", "engine.batch_size=1")
    assert done.returncode in (0, 1, 4), done.stderr
    first = {(t["cell"], t["sample"]): t for t in ledger(place.folder / "first")}
    trials = ledger(place.folder / "small")
    assert len(trials) == len(first)
    for trial in trials:
        other = first[trial["cell"], trial["sample"]]
        for key in ("seed", "clean_png", "attacked_png", "answers", "swap", "distance"):
            assert trial[key] == other[key], key
        for key in ("kept_clean", "kept_attacked"):
            assert trial["tokens"][key] == other["tokens"][key], key
        assert trial["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-5)


def test_images_differ_only_where_something_is_drawn_otherwise(place: Workplace) -> None:
    """The tests above would pass on attacks that do nothing."""
    done = place.redteam("run", "scenario.yaml", "--out", "seed", "--seed", "4", "--limit", "1")
    assert done.returncode in (0, 1, 4), done.stderr
    pictures = [
        next(
            decode_png((place.folder / run / "images" / name[:2] / f"{name}.png").read_bytes())
            for name in [trial["attacked_png"] for trial in ledger(place.folder / run)]
        )
        for run in ("first", "seed")
    ]
    assert np.abs(pictures[0].astype(int) - pictures[1].astype(int)).max() > 0


def test_the_manifest_says_what_could_differ_elsewhere(place: Workplace) -> None:
    run = place.folder / "first"
    made = Manifest.model_validate_json((run / "manifest.json").read_text()).provenance
    assert {"python", "torch", "transformers", "numpy", "pillow"} <= made["versions"].keys()
    assert {"platform", "cpu", "cpu_count", "threads", "device"} <= made["hardware"].keys()
    assert made["hardware"]["cpu"]
    assert made["hardware"]["arithmetic"].keys() >= {
        "instructions", "onednn", "mkl", "float32_matmul_precision", "deterministic_algorithms",
    }  # fmt: skip
    assert made["engine"]["batch_size"] == 4
    assert {"dtype", "attention", "weights"} <= made["identity"]["targets"]["tiny"].keys()
    page = (run / "report.html").read_text()
    for key in ("hardware.arithmetic.instructions", "hardware.cpu", "hardware.threads"):
        assert f"<dt>{key}</dt>" in page


def test_a_run_that_goes_on_elsewhere_says_so(place: Workplace) -> None:
    stopped = place.folder / "stopped"
    shutil.copytree(place.folder / "first", stopped)
    rows = (stopped / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (stopped / "ledger.jsonl").write_bytes(b"".join(rows[:SAMPLES]))
    manifest = json.loads((stopped / "manifest.json").read_text())
    manifest["provenance"]["hardware"]["arithmetic"]["instructions"] = "NEON\u001b[31m"
    manifest["provenance"]["versions"]["numpy"] = "0.1"
    (stopped / "manifest.json").write_text(json.dumps(manifest))
    done = place.redteam("run", "scenario.yaml", "--out", "stopped")
    assert done.returncode in (0, 1, 4), done.stderr
    assert "this run was begun otherwise, now instructions " in done.stderr
    assert " instead of NEON⟨U+001B⟩[31m, numpy " in done.stderr
    assert lines(stopped) == lines(place.folder / "first")
