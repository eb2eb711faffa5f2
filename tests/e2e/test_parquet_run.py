"""A local Parquet file and a filter, from validation to resume, on the embedded LVLM."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from workplace import Workplace, ledger

from redteam.datasets.scenes import Scenes
from redteam.pictures import encode_png

ASKED = 6
SCENARIO = """\
name: parquet
targets: [{type: scenes, checkpoint: scenes-a}]
dataset: {type: parquet, path: data, samples: 6, filter: sighted}
compressions: [{type: uniform, retention: 0.25}]
attacks: [{type: noise}]
epsilons: [8/255]
engine: {batch_size: 4, device: cpu}
"""


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    """Drawn scenes as a table with pictures inside; the first is wrong whatever is said."""
    rows = [
        {
            "image": {"bytes": encode_png(sample.image), "path": f"{sample.image_id}.png"},
            "question": sample.question,
            "answer": "nonsense" if index == 0 else sample.answer,
            "id": sample.id,
            "image_id": sample.image_id,
            "kind": sample.kind,
        }
        for index, sample in enumerate(Scenes(samples=8).open())
    ]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "scenes.parquet")
    (tmp_path / "scenario.yaml").write_text(SCENARIO)
    return Workplace(tmp_path)


def test_a_filtered_parquet_run(place: Workplace) -> None:
    done = place.redteam("validate", "scenario.yaml")
    assert done.returncode == 0, done.stderr
    done = place.redteam("run", "scenario.yaml", "--out", "run", "--json")
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    run = place.folder / "run"
    manifest = json.loads((run / "manifest.json").read_text())
    kept, record = manifest["samples"], manifest["provenance"]["filter"]
    every = list(Scenes(samples=ASKED).open().ids)
    left_out = [name for names in record["left_out"].values() for name in names]
    assert every[0] in record["left_out"]["wrong at full tokens"]
    assert sorted(kept + left_out) == sorted(every), "nobody is lost"
    assert kept == [name for name in every if name in set(kept)]
    assert {trial["sample"] for trial in ledger(run)} == set(kept)
    assert all(trial["answers"]["clean_full"]["correct"] for trial in ledger(run))
    assert out["summary"]["filter"] == {
        "rule": "sighted",
        "asked": ASKED,
        "kept": len(kept),
        "left_out": {why: len(names) for why, names in record["left_out"].items()},
    }
    assert any(f"kept {len(kept)} of {ASKED} samples" in note for note in out["notes"])

    lines = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    (run / "ledger.jsonl").write_text("".join(lines[:-1]))
    done = place.redteam("run", "scenario.yaml", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "manifest.json").read_text()) == manifest
    assert {trial["sample"] for trial in ledger(run)} == set(kept), "resumed on the same samples"


def test_a_filter_that_leaves_nothing(place: Workplace) -> None:
    done = place.redteam("run", "scenario.yaml", "--out", "run", "--limit", "1")
    assert done.returncode == 5
    assert "filter sighted leaves no sample: 1 wrong at full tokens" in done.stderr
    assert not (place.folder / "run").exists()


def test_a_bad_row_is_found_before_the_model(place: Workplace) -> None:
    path = place.folder / "data" / "scenes.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[3]["image"]["bytes"] = b"no picture"
    pq.write_table(pa.Table.from_pylist(rows), path)
    for command in ("validate", "plan", "run"):
        done = place.redteam(command, "scenario.yaml")
        assert done.returncode == 2, command
        assert "scenes.parquet: row 3: image cannot be read: it is none of PNG" in done.stderr


def test_a_benchmark_of_the_hub_is_validated_without_a_download(place: Workplace) -> None:
    place.edit("{type: parquet, path: data, samples: 6, filter: sighted}", "{type: mme}")
    done = place.redteam("validate", "scenario.yaml")
    assert done.returncode == 0, done.stderr
    place.edit("{type: mme}", "{type: mme, path: gone}")
    done = place.redteam("validate", "scenario.yaml")
    assert done.returncode == 2
    assert "dataset.path: 'gone' does not exist" in done.stderr
