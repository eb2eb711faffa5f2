"""``redteam replay``: what a run recorded can be asked again, and what differs is said."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from workplace import SAMPLES, Done, Workplace, ledger

DEFENSES = """\
defenses:
  - none
  - {type: random_floor, rho: 0.5}
  - resize_pad
  - oracle
  - gaussian_vote
  - rank_margin
  - stack: [resize_pad, score_smoothing]
  - {type: beam, beams: 2}
gates:"""
STAGES = (
    "{name: both, stages: "
    "[{type: visionzip, retention: 0.5}, {type: fastv, layer: 1, retention: 0.5}]}"
)
CELLS = 2 * 8
FASTV, VISIONZIP = (
    "  - {type: fastv, layer: 2, retention: 0.25}\n",
    "  - {type: visionzip, retention: 0.25}\n",
)
PGD = "  - {type: pgd, steps: 3, epsilons: [32/255]}\n"


def run(place: Workplace) -> Workplace:
    place.edit(PGD, "")
    done = place.redteam("run", "scenario.yaml", "--out", "run")
    assert done.returncode in (0, 1, 4), done.stderr
    assert all(trial["error"] is None for trial in ledger(place.folder / "run"))
    return place


@pytest.fixture(scope="module")
def finished(
    model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Workplace:
    place = Workplace.build(tmp_path_factory.mktemp("replayed"), model_folder, data_folder)
    place.edit(VISIONZIP, "")
    place.edit("gates:", DEFENSES)
    return run(place)


@pytest.fixture
def copied(finished: Workplace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.folder / "run", tmp_path / "run"))


def replay(place: Workplace, folder: Path | str, *arguments: str) -> tuple[Done, dict[str, Any]]:
    done = place.redteam("replay", str(folder), "--json", *arguments)
    return done, json.loads(done.stdout) if done.stdout else {}


def rewrite(folder: Path, change: Any) -> None:
    """Change trials on the disk, checksums made anew."""
    lines = []
    for trial in ledger(folder):
        change(trial)
        payload = json.dumps(trial, separators=(",", ":"))
        digest = hashlib.sha256(payload.encode()).hexdigest()[:16]
        lines.append(f'{{"sha256": "{digest}", "trial": {payload}}}\n')
    (folder / "ledger.jsonl").write_text("".join(lines))


def failure(folder: Path) -> dict[str, Any]:
    """A trial with a swap test."""
    return next(trial for trial in ledger(folder) if trial["swap"] is not None)


def test_every_sample_is_as_recorded(finished: Workplace) -> None:
    compared: Counter[str] = Counter()
    for index in range(SAMPLES):
        done, out = replay(finished, "run", "--sample", f"s{index}")
        assert done.returncode == 0, out or done.stderr
        assert len(out["cells"]) == CELLS
        for cell in out["cells"]:
            assert cell["differences"] == [], cell
            compared.update(cell["compared"])
    trials = ledger(finished.folder / "run")
    assert compared["four answers"] == SAMPLES * CELLS
    assert compared["kept sets"] == sum(trial["tokens"] is not None for trial in trials) > 0
    assert compared["swap test"] == sum(trial["swap"] is not None for trial in trials) > 0


def test_compressors_in_stages_and_merged_tokens(workplace: Workplace) -> None:
    workplace.edit(FASTV, f"  - {STAGES}\n  - {{type: tome, retention: 0.5}}\n")
    run(workplace)
    for index in range(SAMPLES):
        done, out = replay(workplace, "run", "--sample", f"s{index}")
        assert done.returncode == 0, out or done.stderr
        assert len(out["cells"]) == 3 * 2


def test_one_cell_for_people(finished: Workplace) -> None:
    trial = failure(finished.folder / "run")
    done = finished.redteam("replay", "run", "--sample", trial["sample"], "--cell", trial["cell"])
    assert done.returncode == 0
    assert f"as recorded {trial['cell']}" in done.stdout
    assert "four answers, kept sets, swap test" in done.stdout
    assert "1 of 1 cell as recorded" in done.stdout


def test_what_differs_is_said(finished: Workplace, copied: Path) -> None:
    chosen = failure(copied)
    where = (chosen["sample"], chosen["cell"])

    def change(trial: dict[str, Any]) -> None:
        if (trial["sample"], trial["cell"]) == where:
            trial["answers"]["attacked_full"]["text"] = "something else"
            trial["tokens"]["kept_clean"] = trial["tokens"]["kept_clean"][1:]
            trial["swap"]["recovered_text"] = "another thing"

    rewrite(copied, change)
    done, out = replay(finished, copied, "--sample", where[0], "--cell", where[1])
    assert (done.returncode, out["exit_code"]) == (1, 1)
    (cell,) = out["cells"]
    assert [(one["what"], one["recorded"]) for one in cell["differences"]] == [
        ("answer, attacked, full", "something else"),
        ("kept set, clean", f"{len(chosen['tokens']['kept_clean']) - 1} tokens"),
        ("swap test, attacked image, clean kept set", "another thing"),
    ]
    assert cell["differences"][0]["now"] == chosen["answers"]["attacked_full"]["text"]
    text = finished.redteam("replay", str(copied), "--sample", where[0], "--cell", where[1]).stdout
    assert "recorded 'something else', now '" in text
    assert "0 of 1 cell as recorded" in text


def test_another_image_gives_another_answer(finished: Workplace, copied: Path) -> None:
    """The saved images are what is asked about: exchanged, the record no longer holds."""
    chosen = failure(copied)

    def change(trial: dict[str, Any]) -> None:
        if (trial["sample"], trial["cell"]) == (chosen["sample"], chosen["cell"]):
            trial["attacked_png"] = trial["clean_png"]

    rewrite(copied, change)
    done, out = replay(finished, copied, "--sample", chosen["sample"], "--cell", chosen["cell"])
    assert done.returncode == 1
    assert "kept set, attacked" in {one["what"] for one in out["cells"][0]["differences"]}


def test_defences_draw_with_the_seed_of_the_run(finished: Workplace, copied: Path) -> None:
    path = copied / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 4'))
    cells = ("--cell", "random_floor (unverified)", "--cell", "none")
    differing = set()
    for index in range(SAMPLES):
        _, out = replay(finished, copied, "--sample", f"s{index}", *cells)
        differing |= {cell["label"].split(" · ")[3] for cell in out["cells"] if cell["differences"]}
    assert len(differing) == 1, "what draws nothing is as recorded whatever the seed"
    assert differing.pop().startswith("random_floor")


@pytest.mark.parametrize("how", ["missing", "changed"])
def test_an_image_that_is_not_what_it_was(finished: Workplace, copied: Path, how: str) -> None:
    chosen = failure(copied)
    name = chosen["attacked_png"]
    path = copied / "images" / name[:2] / f"{name}.png"
    path.unlink() if how == "missing" else path.write_bytes(b"other")
    done, _ = replay(finished, copied, "--sample", chosen["sample"], "--cell", chosen["cell"])
    assert done.returncode == 3
    assert f"the attacked image of sample {chosen['sample']!r} cannot be used" in done.stderr
    assert str(path) in done.stderr


def test_other_weights_are_refused(finished: Workplace, copied: Path) -> None:
    path = copied / "manifest.json"
    found = json.loads(path.read_text())
    now = found["provenance"]["identity"]["targets"]["tiny"]["weights"]
    found["provenance"]["identity"]["targets"]["tiny"]["weights"] = "0" * 64
    path.write_text(json.dumps(found))
    done, _ = replay(finished, copied, "--sample", "s0")
    assert done.returncode == 3
    assert "target 'tiny' is no longer what the run was made with" in done.stderr
    assert f"weights {'0' * 64} -> {now}" in done.stderr


def test_paths_start_at_the_scenario(finished: Workplace, tmp_path: Path) -> None:
    """From elsewhere the model of a relative path is not found, unless one says where to look."""
    run = str(finished.folder / "run")
    elsewhere = Workplace(tmp_path)
    done = elsewhere.redteam("replay", run, "--sample", "s0", "--cell", "noise")
    assert done.returncode == 3
    assert "target 'tiny' cannot be loaded" in done.stderr
    assert "--relative-to" in done.stderr
    place = str(finished.folder)
    done = elsewhere.redteam(
        "replay", run, "--sample", "s0", "--cell", "noise", "--relative-to", place
    )
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_asked(finished: Workplace, copied: Path) -> None:
    done, _ = replay(finished, "run", "--sample", "s0", "--device", "cuda:99")
    assert done.returncode == 3
    assert "--device" in done.stderr
    done, _ = replay(finished, "run", "--sample", "s99")
    assert done.returncode == 2

    def break_it(trial: dict[str, Any]) -> None:
        if trial["sample"] == "s0":
            trial["answers"] = trial["swap"] = None
            trial["error"] = {"type": "E", "message": "m", "where": "w", "traceback": "t"}

    rewrite(copied, break_it)
    done, _ = replay(finished, copied, "--sample", "s0")
    assert done.returncode == 5
    assert "ended in an error" in done.stderr


def test_options_that_came_later_do_not_change_the_seeds(finished: Workplace, copied: Path) -> None:
    """A run from before an option existed has no value for it; seeds are made of what it had."""
    path = copied / "manifest.json"
    found = json.loads(path.read_text())
    removed = 0
    for cell in found["cells"]:
        removed += cell["spec"]["compression"].pop("positions", None) is not None
    assert removed
    path.write_text(json.dumps(found))
    done, out = replay(finished, copied, "--sample", "s1", "--cell", "none")
    assert done.returncode == 0, out or done.stderr


def test_an_unknown_method_is_named(finished: Workplace, copied: Path) -> None:
    path = copied / "manifest.json"
    found = json.loads(path.read_text())
    for cell in found["cells"]:
        cell["spec"]["compression"]["type"] = "fastw"
    path.write_text(json.dumps(found))
    done, _ = replay(finished, copied, "--sample", "s0")
    assert done.returncode == 3
    assert "cannot be made by this version of redteam" in done.stderr
    assert "did you mean 'fastv'" in done.stderr
