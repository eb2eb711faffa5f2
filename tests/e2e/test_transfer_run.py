"""A transfer attack through the command line: made on one model, tried on another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from workplace import Workplace, cells, ledger

from attacks.transfer_caa import TransferCAA
from redteam.pictures import decode_png
from targets.passes import Passes

ATTACK = "steps: 2, judge_every: 1, template: 12, crops: 1"


@pytest.fixture(scope="module")
def place(
    model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Workplace:
    """The tiny model, and another of more layers to make attacks on."""
    from tests.conformance import tiny

    found = Workplace.build(tmp_path_factory.mktemp("transfer"), model_folder, data_folder)
    other = tiny.build_model(seed=1)
    other.generation_config.eos_token_id = list(range(2, len(tiny.WORDS)))
    other.save_pretrained(found.folder / "other")
    tiny.build_processor().save_pretrained(found.folder / "other")
    text = found.scenario.read_text()
    head, rest = text.split("dataset:")
    rest = rest.split("attacks:")[0]
    models = "[{type: lvlm, model: model, name: tiny}, {type: lvlm, model: other, name: other}]"
    found.scenario.write_text(
        head.split("targets:")[0]
        + f"targets: {models}\nsurrogates: {models}\ndataset:{rest}"
        + "attacks:\n"
        + f"  - {{type: transfer_caa, {ATTACK}}}\n"
        + f"  - {{type: transfer_caa, {ATTACK}, frame: added, name: framed}}\n"
        + f"  - {{type: transfer_caa, {ATTACK}, surrogates: [other], name: from other}}\n"
        + "epsilons: [16/255]\nchecks: {repeat: 0}\nengine: {batch_size: 6, device: cpu}\n"
    )
    return found


@pytest.fixture(scope="module")
def used(place: Workplace) -> list[tuple[str, set[str]]]:
    """Run it; which models were run while an attack was made, beside those it was given."""
    seen: list[tuple[str, set[str]]] = []
    names: dict[int, str] = {}
    propose, inputs = TransferCAA.propose, Passes.inputs
    running: list[set[str]] = []

    def watched(self: Any, view: Any, *rest: Any) -> Any:
        running.append(set())
        made = propose(self, view, *rest)
        seen.append((", ".join(one.name for one in view.surrogates), running.pop()))
        return made

    def noted(self: Any, *rest: Any, **options: Any) -> Any:
        for models in running:
            models.add(names.setdefault(id(self.family.model), _name(self.family.model)))
        return inputs(self, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransferCAA, "propose", watched)
        patch.setattr(Passes, "inputs", noted)
        done = place.redteam("run", "scenario.yaml", "--out", "run", "--json")
    assert done.returncode == 0, done.stderr
    return seen


def _name(model: Any) -> str:
    return Path(str(model.config.name_or_path)).resolve().name


def test_no_target_is_run_while_an_attack_on_it_is_made(
    used: list[tuple[str, set[str]]], model_folder: Path
) -> None:
    folders = {"tiny": model_folder.resolve().name, "other": "other"}
    assert {names for names, _ in used} == {"tiny", "other"}
    for names, run in used:
        assert run == {folders[names]}


def test_images_are_the_same_for_every_target(place: Workplace, used: object) -> None:
    run = place.folder / "run"
    attack = {cell["id"]: (cell["attack"], cell["target"]) for cell in cells(run)}
    images: dict[tuple[str, str], dict[str, str]] = {}
    for trial in ledger(run):
        assert trial["error"] is None
        images.setdefault(attack[trial["cell"]], {})[trial["sample"]] = trial["attacked_png"]
    assert images["from other", "tiny"] == images["from other", "other"]
    assert images["transfer_caa", "other"] != images["transfer_caa", "tiny"]


def test_only_the_frame_differs_from_what_the_budget_counts_from(
    place: Workplace, used: object
) -> None:
    run = place.folder / "run"
    added = ("framed", "added-border noise (control)")
    framed = {cell["id"] for cell in cells(run) if cell["attack"] in added}
    for trial in ledger(run):
        base = trial["base_png"] if trial["cell"] in framed else trial["clean_png"]
        pictures = [
            decode_png((run / "images" / name[:2] / f"{name}.png").read_bytes()).astype(int)
            for name in (base, trial["attacked_png"])
        ]
        change = abs(pictures[0] - pictures[1])
        assert change.max() == 16
        assert change[6:-6, 6:-6].max() == 0


def test_the_matrix_has_its_controls_and_its_diagonal(place: Workplace, used: object) -> None:
    summary = json.loads((place.folder / "run" / "summary.json").read_text())
    matrix = summary["transfer"]
    assert matrix["targets"] == ["tiny", "other"]
    assert {
        (table["frame"], table["compression"], table["control"]) for table in matrix["tables"]
    } == {
        (frame, compression, f"{kind} (control)")
        for frame, kind in (("inside", "border noise"), ("added", "added-border noise"))
        for compression in ("fastv K=2 25%", "visionzip 25%")
    }
    own = {
        (row["attack"], target): one["own"]
        for table in matrix["tables"]
        for row in table["rows"]
        for target, one in row["cells"].items()
    }
    assert own == {
        ("transfer_caa", "tiny"): False,
        ("transfer_caa", "other"): False,
        ("framed", "tiny"): False,
        ("framed", "other"): False,
        ("from other", "tiny"): False,
        ("from other", "other"): True,
    }
    assert "### Transfer" in (place.folder / "run" / "summary.md").read_text()
    assert 'id="transfer"' in (place.folder / "run" / "report.html").read_text()
