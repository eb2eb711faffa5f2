"""Every compressor in one scenario, attacked by its ranking and through it, without an error."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from redteam.catalog import BUILTIN
from redteam.cli import app

OPTIONS = {
    "pipeline": "stages: [{type: visionzip, retention: 0.5}, {type: fastv, retention: 0.25}]",
    "drop_all": "type: drop_all, layer: 2",
}
REFUSED = {"downsample"}  # the scenes LVLM brings all pictures to one size
ATTACKS = "[{type: caa, steps: 1}, {type: pgd, steps: 1, path: compressed}]"


def test_all_of_them(tmp_path: Path) -> None:
    names = [name for name in BUILTIN["compressors"] if name not in REFUSED]
    entries = [OPTIONS.get(name, f"type: {name}, retention: 0.25") for name in names]
    scenario = tmp_path / "all.yaml"
    scenario.write_text(
        "name: all\n"
        "targets: [{type: scenes}]\n"
        "dataset: {type: scenes, samples: 2}\n"
        f"attacks: {ATTACKS}\n"
        "epsilons: [16/255]\n"
        "compressions:\n" + "".join(f"  - {{{entry}}}\n" for entry in entries)
    )
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["run", str(scenario), "--out", str(out)])
    assert done.exit_code == 0, done.output
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["cells"]) == 2 * len(names) == 2 * 30
    for cell in summary["cells"]:
        assert cell["n"] == 2, cell
        assert not cell.get("errors"), cell


def test_the_one_that_cannot_work_is_refused_before_anything_runs(tmp_path: Path) -> None:
    scenario = tmp_path / "one.yaml"
    scenario.write_text(
        "name: one\n"
        "targets: [{type: scenes}]\n"
        "dataset: {type: scenes, samples: 2}\n"
        "attacks: [{type: noise, epsilons: [8/255]}]\n"
        "compressions: [{type: downsample, retention: 0.25}]\n"
    )
    done = CliRunner().invoke(app, ["run", str(scenario), "--out", str(tmp_path / "out")])
    assert done.exception is not None
    assert "use pool" in str(done.exception)
    assert not (tmp_path / "out" / "ledger.jsonl").exists()
