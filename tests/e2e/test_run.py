"""From a scenario file to reports, through the command line, on the tiny random model."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest
from workplace import SAMPLES, Workplace, cells, ledger

from redteam.pictures import decode_png

CELLS = 6


@pytest.fixture(scope="module")
def finished(
    model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Workplace:
    """One run to the end, looked at by several tests."""
    place = Workplace.build(tmp_path_factory.mktemp("run"), model_folder, data_folder)
    done = place.redteam("run", "scenario.yaml", "--out", "run", "--json")
    assert done.returncode == 4, done.stderr
    (place.folder / "out.json").write_text(done.stdout)
    return place


def wait_for_lines(folder: Path, count: int) -> None:
    path = folder / "ledger.jsonl"
    limit = time.monotonic() + 200
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < limit, "the run did not get going"
        time.sleep(0.01)


def test_everything_is_there(finished: Workplace) -> None:
    run = finished.folder / "run"
    expected = {
        "manifest.json",
        "scenario.yaml",
        "ledger.jsonl",
        "images",
        "summary.json",
        "summary.md",
        "report.html",
        "junit.xml",
        "results.sarif",
    }
    assert {path.name for path in run.iterdir() if not path.name.startswith(".")} == expected
    out = json.loads((finished.folder / "out.json").read_text())
    assert (out["verdict"], out["exit_code"]) == ("inconclusive", 4)
    assert all((finished.folder / path).is_file() for path in out["files"])
    assert out["summary"]["cells"] == cells(run)
    assert (run / "scenario.yaml").read_text() == finished.scenario.read_text()


def test_every_trial_is_whole(finished: Workplace) -> None:
    run = finished.folder / "run"
    trials = ledger(run)
    assert len(trials) == CELLS * SAMPLES
    for trial in trials:
        assert trial["error"] is None
        assert trial["answers"]["clean_full"]["correct"], "true by construction of the data"
        assert trial["tokens"]["evidence"] == [0, 1, 6, 7]
        pictures = [
            decode_png((run / "images" / name[:2] / f"{name}.png").read_bytes())
            for name in (trial["clean_png"], trial["attacked_png"])
        ]
        change = abs(pictures[0].astype(int) - pictures[1].astype(int)).max()
        assert change == round(255 * trial["distance"]["linf"]) <= 32
        bits = [trial["answers"][key]["correct"] for key in trial["answers"]]
        assert (trial["swap"] is not None) == (bits == [True, True, True, False])


def test_images_are_shared_where_the_attack_is_blind(finished: Workplace) -> None:
    run = finished.folder / "run"
    manifest = json.loads((run / "manifest.json").read_text())
    attack = {cell["id"]: cell["attack"] for cell in manifest["cells"]}
    images: dict[tuple[str, str], set[str]] = {}
    for trial in ledger(run):
        key = (attack[trial["cell"]], trial["sample"])
        images.setdefault(key, set()).add(trial["attacked_png"])
    counts = {name: {len(v) for k, v in images.items() if k[0] == name} for name, _ in images}
    assert counts == {"noise": {1}, "pgd": {1}, "caa": {2}}


def test_provenance_is_complete_and_not_private(finished: Workplace) -> None:
    manifest = json.loads((finished.folder / "run" / "manifest.json").read_text())
    made = manifest["provenance"]
    assert re.fullmatch("[0-9a-f]{64}", made["identity"]["targets"]["tiny"]["weights"])
    assert re.fullmatch("[0-9a-f]{64}", made["identity"]["data"])
    assert made["versions"]["torch"] != "absent"
    assert made["identity"]["targets"]["tiny"]["attention"] == "sdpa"
    assert made["command"] == "redteam run scenario.yaml --out run --json"
    text = json.dumps(manifest)
    assert str(Path.home()) + "/" not in text
    assert str(finished.folder) not in text


def test_a_finished_run_is_not_run_again(finished: Workplace) -> None:
    run = finished.folder / "run"
    before = (run / "ledger.jsonl").read_bytes()
    done = finished.redteam("run", "scenario.yaml", "--out", "run")
    assert done.returncode == 4, done.stderr
    assert (run / "ledger.jsonl").read_bytes() == before
    assert done.stdout.strip().startswith("Inconclusive"), "the verdict comes first"
    for words in ("fastv K=2 25%", "visionzip 25%", "CSFR", "run/report.html", "next "):
        assert words in done.stdout


def test_another_scenario_is_refused_with_the_difference(finished: Workplace) -> None:
    before = (finished.folder / "run" / "ledger.jsonl").read_bytes()
    done = finished.redteam(
        "run", "scenario.yaml", "--out", "run", "--seed", "9", "--set", "attacks.caa.steps=5"
    )
    assert done.returncode == 2
    assert "seed: 3 -> 9" in done.stderr
    assert "attacks[2].steps: 4 -> 5" in done.stderr
    assert "Traceback" not in done.stderr
    assert (finished.folder / "run" / "ledger.jsonl").read_bytes() == before


def test_killed_and_resumed_equals_uninterrupted(finished: Workplace, workplace: Workplace) -> None:
    run = workplace.folder / "run"
    process = workplace.start("run", "scenario.yaml", "--out", "run")
    wait_for_lines(run, 8)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    there = len(ledger(run))
    assert 0 < there < CELLS * SAMPLES, "the kill came too late to test anything"
    with (run / "ledger.jsonl").open("ab") as file:
        file.write(b'{"sha256": "0123')  # what a kill in the middle of a write leaves
    done = workplace.redteam("run", "scenario.yaml", "--out", "run")
    assert done.returncode == 4, done.stderr
    assert f"resuming run: {there} trials there" in done.stderr
    assert cells(run) == cells(finished.folder / "run")
    assert len(ledger(run)) == CELLS * SAMPLES, "nothing was measured twice"


def test_ctrl_c_finishes_the_unit_and_resumes(finished: Workplace, workplace: Workplace) -> None:
    run = workplace.folder / "run"
    workplace.edit("batch_size: 4", "batch_size: 1")
    process = workplace.start("run", "scenario.yaml", "--out", "run")
    wait_for_lines(run, 1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    assert "stopping after this unit" in err
    assert "Incomplete" in out
    assert "to continue" in out
    assert 0 < len(ledger(run)) < CELLS * SAMPLES
    assert (run / "report.html").is_file()
    done = workplace.redteam("run", "scenario.yaml", "--out", "run")
    assert done.returncode == 4, done.stderr
    answers = {(t["cell"], t["sample"]): t["seed"] for t in ledger(finished.folder / "run")}
    again = {(t["cell"], t["sample"]): t["seed"] for t in ledger(run)}
    assert again == answers, "seeds depend on the batch size"


def test_parts_that_are_merged_equal_one_run(finished: Workplace, workplace: Workplace) -> None:
    for part in ("1/3", "2/3", "3/3"):
        done = workplace.redteam(
            "run", "scenario.yaml", "--shard", part, "--out", f"part-{part[0]}"
        )
        assert done.returncode == 0, done.stderr
        assert f"Part {part} finished" in done.stdout
        assert "redteam merge" in done.stdout
        assert not (workplace.folder / f"part-{part[0]}" / "report.html").exists()
    done = workplace.redteam("merge", "merged", "part-1", "part-2", "part-3")
    assert done.returncode == 4, done.stderr
    assert done.stdout.strip().startswith("Inconclusive")
    merged, whole = workplace.folder / "merged", finished.folder / "run"
    assert cells(merged) == cells(whole)
    pictures = {(t["cell"], t["sample"]): t["attacked_png"] for t in ledger(whole)}
    assert {(t["cell"], t["sample"]): t["attacked_png"] for t in ledger(merged)} == pictures
    made = json.loads((merged / "manifest.json").read_text())["provenance"]["merged"]
    assert [one["folder"] for one in made] == ["part-1", "part-2", "part-3"]


def test_a_part_that_is_not_there_leaves_the_run_incomplete(workplace: Workplace) -> None:
    workplace.redteam("run", "scenario.yaml", "--shard", "1/2", "--out", "part")
    done = workplace.redteam("merge", "merged", "part", "--json")
    assert done.returncode == 3
    assert any("a part is missing" in note for note in json.loads(done.stdout)["notes"])


def test_results_do_not_depend_on_the_batch_size(finished: Workplace, workplace: Workplace) -> None:
    workplace.edit("batch_size: 4", "batch_size: 1")
    workplace.edit("  - {type: pgd, steps: 3, epsilons: [32/255]}\n  - {type: caa, steps: 4}\n", "")
    workplace.redteam("run", "scenario.yaml", "--out", "run")
    first = {(t["cell"], t["sample"]): t for t in ledger(finished.folder / "run")}
    trials = ledger(workplace.folder / "run")
    assert len(trials) == 2 * SAMPLES
    for trial in trials:
        other = first[trial["cell"], trial["sample"]]
        for key in ("seed", "answers", "attacked_png", "clean_png", "swap"):
            assert trial[key] == other[key], key
        assert trial["tokens"]["kept_attacked"] == other["tokens"]["kept_attacked"]


PLUGIN = '''
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from redteam import Attack, Knowledge


@dataclass(frozen=True, kw_only=True)
class Fragile(Attack):
    """Adds one level, and breaks on one sample.

    Args:
        levels: grey levels added, at least 0.
    """

    name: ClassVar[str] = "fragile"
    knowledge: ClassVar[Knowledge] = Knowledge.NONE

    levels: Annotated[int, Ge(0)] = 1

    def propose(self, view, batch, budget, rng):
        if "s2" in batch.ids:
            raise ArithmeticError("s2 is too much for me")
        return batch.images + self.levels / 255
'''


def test_a_plugin_that_breaks_on_one_sample(workplace: Workplace) -> None:
    workplace.plugin("fragile_attack", PLUGIN, attacks="fragile = fragile_attack:Fragile")
    workplace.edit("{type: noise}\n", "{type: fragile, levels: 3}\n")
    workplace.edit("attack: noise", "attack: fragile")
    assert (
        "levels: an integer ≥ 0; default 1"
        in workplace.redteam("list", "attacks", "fragile").stdout
    )
    wrong = workplace.redteam("validate", "scenario.yaml", "--set", "attacks.fragile.levels=-1")
    assert "attacks[0].levels: -1 is not allowed; allowed: an integer ≥ 0" in wrong.stderr
    done = workplace.redteam("run", "scenario.yaml", "--out", "run", "--json")
    assert done.returncode in (1, 4), done.stderr
    trials = [t for t in ledger(workplace.folder / "run") if t["loss"] == []]
    errors = [t for t in trials if t["error"]]
    assert {t["sample"] for t in errors} == {"s2"}
    assert len(errors) == 2, "one in each compression"
    assert errors[0]["error"]["type"] == "ArithmeticError"
    assert errors[0]["error"]["where"] == "attack fragile"
    assert errors[0]["answers"] is None
    assert len(trials) - len(errors) == 2 * (SAMPLES - 1)
    summary = json.loads(done.stdout)["summary"]
    assert summary["progress"]["errors"] == 2
    assert summary["progress"]["missing"] == 0
    assert any("--retry-errors" in note for note in json.loads(done.stdout)["notes"])
    before = (workplace.folder / "run" / "ledger.jsonl").read_bytes()
    assert workplace.redteam("run", "scenario.yaml", "--out", "run").returncode == done.returncode
    assert (workplace.folder / "run" / "ledger.jsonl").read_bytes() == before, "an error is kept"
    again = workplace.redteam("run", "scenario.yaml", "--out", "run", "--retry-errors")
    assert "36 trials" not in again.stderr, "only what failed is tried again"
    assert len(ledger(workplace.folder / "run")) == CELLS * SAMPLES + 2


DEFENSE = '''
from dataclasses import dataclass
from typing import ClassVar

from redteam import AdaptiveRoute, InputDefense


@dataclass(frozen=True, kw_only=True)
class Blind(InputDefense):
    """Shows the model a grey wall.

    Args:
        level: of grey.
    """

    name: ClassVar[str] = "blind"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.BPDA

    level: float = 0.5

    def transform(self, images, generators):
        return images * 0 + self.level
'''


def test_a_defence_stands_in_front_of_both_images(workplace: Workplace) -> None:
    workplace.plugin("blind_defense", DEFENSE, defenses="blind = blind_defense:Blind")
    workplace.edit("gates:", "defenses: [{type: none}, {type: blind}]\ngates:")
    workplace.edit("  - {type: pgd, steps: 3, epsilons: [32/255]}\n  - {type: caa, steps: 4}\n", "")
    done = workplace.redteam("run", "scenario.yaml", "--out", "run", "--json")
    assert done.returncode in (0, 1, 4), done.stderr
    notes = json.loads(done.stdout)["notes"]
    assert any("blind is UNVERIFIED (upper bound)" in note for note in notes)
    found = {(cell["compression"], cell["defense"]) for cell in cells(workplace.folder / "run")}
    assert len(found) == 4
    assert {defense for _, defense in found} == {"none", "blind (unverified)"}
    manifest = json.loads((workplace.folder / "run" / "manifest.json").read_text())
    blind = {cell["id"] for cell in manifest["cells"] if cell["defense"] != "none"}
    for trial in ledger(workplace.folder / "run"):
        answers = trial["answers"]
        if trial["cell"] in blind:
            assert answers["clean_full"]["text"] == answers["attacked_full"]["text"]
            assert answers["clean_compressed"]["text"] == answers["attacked_compressed"]["text"]


def test_no_sample_is_nothing_selected(workplace: Workplace) -> None:
    source = (
        "from dataclasses import dataclass\nfrom typing import ClassVar\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Void:\n"
        '    """Nothing."""\n\n    name: ClassVar[str] = "void"\n'
        "    def open(self):\n        return ()\n"
    )
    workplace.plugin("void_data", source, datasets="void = void_data:Void")
    workplace.edit("{type: jsonl, path: data.jsonl}", "{type: void}")
    done = workplace.redteam("run", "scenario.yaml", "--out", "run")
    assert done.returncode == 5
    assert "scenario.yaml:5:10: dataset: the data set holds no sample" in done.stderr
    limited = workplace.redteam("validate", "scenario.yaml", "--limit", "2")
    assert "no option `samples`" in limited.stderr


REFUSED = {
    "layer": ("layer: 2", "layer: 9", "layer 9 does not exist"),
    "tokens": (
        "retention: 0.25}\n  - {type: v",
        "keep_tokens: 99}\n  - {type: v",
        "36 visual tokens",
    ),
    "device": ("device: cpu", "device: gpu", "device"),
    "data": ("data.jsonl", "model/config.json", "config.json:1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_written(
    case: str, workplace: Workplace
) -> None:
    old, new, message = REFUSED[case]
    text = workplace.scenario.read_text()
    assert old in text
    workplace.scenario.write_text(text.replace(old, new, 1))
    done = workplace.redteam("run", "scenario.yaml", "--out", "run")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (workplace.folder / "run").exists()


def test_a_profile_says_where_the_time_went(workplace: Workplace) -> None:
    workplace.edit("  - {type: caa, steps: 4}\n", "")
    done = workplace.redteam("run", "scenario.yaml", "--out", "run", "--profile")
    assert done.returncode == 4, done.stderr
    assert "where the time went" in done.stderr
    (session,) = json.loads((workplace.folder / "run" / "profile.json").read_text())["sessions"]
    phases = session["phases"]
    for name in ("vision tower", "LLM prefill", "token selection", "attack backward", "loading"):
        assert phases[name]["seconds"] > 0, name
        assert phases[name]["calls"] > 0, name
    total = sum(one["seconds"] for one in phases.values())
    assert total == pytest.approx(session["wall_seconds"], abs=0.05)
    page = (workplace.folder / "run" / "report.html").read_text()
    assert "Where the time went" in page
    assert "attack backward" in page
