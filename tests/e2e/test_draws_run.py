"""Random defences and compressors under several draws of the evaluation, on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from workplace import SAMPLES, Workplace, cells, ledger

Runs = dict[int, Workplace]


@pytest.fixture(scope="module")
def runs(model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The same scenario under one draw and under three."""
    found = {}
    for draws in (1, 3):
        folder = tmp_path_factory.mktemp(f"draws{draws}")
        place = found[draws] = Workplace.build(folder, model_folder, data_folder)
        place.edit("  - {type: fastv, layer: 2, retention: 0.25}\n",
                   "  - {type: random, retention: 0.25}\n")  # fmt: skip
        place.edit("  - {type: noise}\n  - {type: pgd, steps: 3, epsilons: [32/255]}\n", "")
        place.edit("  - {type: caa, steps: 4}\n", "  - {type: noise}\n  - {type: pgd, steps: 2}\n")
        names = "[none, {type: random_floor, rho: 0.5}, resize_pad]"
        checks = (
            f"checks: {{repeat: 0, draws: {draws}}}\n" if draws > 1 else "checks: {repeat: 0}\n"
        )
        place.edit("gates:", f"defenses: {names}\n{checks}gates:")
        done = place.redteam("run", "scenario.yaml", "--out", "run", "--json")
        assert done.returncode in (0, 1, 4), done.stderr
    return found


def trials(place: Workplace) -> dict[tuple[str, str, str], dict[str, Any]]:
    run = place.folder / "run"
    names = {one["id"]: (one["compression"], one["defense"]) for one in cells(run)}
    return {(*names[one["cell"]], one["sample"]): one for one in ledger(run)}


def test_what_is_drawn_is_asked_three_times(runs: Runs) -> None:
    found = trials(runs[3])
    for (compression, defense, _), one in found.items():
        drawing = "random" in compression or "none" not in defense
        assert (one["draws"] is not None) is drawing, (compression, defense)
        if drawing:
            assert one["draws"]["count"] == 3
            assert one["draws"]["failures"] <= one["draws"]["eligible"] <= 3
    assert len({sample for _, _, sample in found}) == SAMPLES
    counts = [one["draws"]["clean"] for one in found.values() if one["draws"]]
    assert any(0 < count < 3 for count in counts), "draws are independent"


def test_the_first_draw_is_what_it_was_before(runs: Runs) -> None:
    one, three = trials(runs[1]), trials(runs[3])
    assert one.keys() == three.keys()
    for key, trial in one.items():
        assert trial["draws"] is None
        for name in ("cell", "seed", "answers", "tokens", "swap", "attacked_png"):
            assert trial[name] == three[key][name], (key, name)


def test_every_report_states_how_many(runs: Runs) -> None:
    run = runs[3].folder / "run"
    summary = json.loads((run / "summary.json").read_text())
    told = [cell["draws"] for cell in summary["cells"] if "draws" in cell]
    assert told
    assert {one["draws"] for one in told} == {3}
    for name in ("summary.md", "report.html"):
        text = (run / name).read_text()
        assert "Over draws" in text
        assert "over draws, expected" in text, "the table of defences"
        assert "worst of 3" in text
    before = runs[1].folder / "run"
    assert "Over draws" not in (before / "summary.md").read_text()
