"""``redteam measure`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from redteam.cli import app
from redteam.errors import RedteamError

SCENARIO = """\
name: clean
targets: [{type: scenes}]
dataset: {type: scenes, samples: 6}
attacks: [{type: noise, epsilons: [8/255]}]
compressions:
  - {type: fastv, retention: 0.25}
  - {type: random, retention: 0.25}
  - stages: [{type: visionzip, retention: 0.5}, {type: fastv, layer: 2, retention: 0.25}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("measure")
    (here / "clean.yaml").write_text(SCENARIO)
    options = [
        "--retention",
        "0.5,0.11",
        "--evidence",
        "1",
        "--layers",
        "0,3",
        "--horizon",
        "4",
        "--repeats",
        "1",
    ]
    done = CliRunner().invoke(
        app, ["measure", str(here / "clean.yaml"), "--out", str(here / "out"), *options]
    )
    assert done.exit_code == 0, done.output
    (here / "printed.txt").write_text(done.output)
    return here


def test_every_setting_is_measured(folder: Path) -> None:
    found = json.loads((folder / "out" / "measurement.json").read_text())
    names = [one["compression"] for one in found["settings"]]
    assert names == [
        "",
        "fastv K=2 50%",
        "fastv K=2 11%",
        "random 50%",
        "random 11%",
        "visionzip 50% + fastv K=2 25%",
    ]
    for one in found["settings"]:
        assert one["n"] == 6
        assert one["speed"]["macs"] > 0
        assert one["tokens"] == 144
    full, half = found["settings"][0], found["settings"][1]
    assert (full["kept"], half["kept"]) == (144, 72)
    assert full["right"] == 6
    assert half["speed"]["visual"] == [144, 144, 72, 72, 72, 72]
    assert half["speed"]["macs"] < full["speed"]["macs"]
    assert half["speed"]["cache_bytes"] < full["speed"]["cache_bytes"]
    assert sum(half["frequency"]) == pytest.approx(72, abs=0.1)
    composed = found["settings"][-1]
    assert composed["speed"]["visual"] == [72, 72, 36, 36, 36, 36]
    assert composed["left"] == 36
    assert composed["kept"] <= 36
    assert {one["layer"] for one in found["evidence"]} == {0, 3}
    assert len(found["evidence"][0]["only"]) == 144
    assert len(found["horizons"][0]["loss"]) == 6
    pairs = {(one["first"], one["second"]) for one in found["overlaps"]}
    assert ("fastv K=2 50%", "random 50%") in pairs
    assert all(0 <= one["jaccard"] <= 1 for one in found["overlaps"])


def test_it_ends_by_saying_where_and_what_next(folder: Path) -> None:
    printed = (folder / "printed.txt").read_text()
    assert "fastv K=2 11%" in printed
    assert "measurement.html" in printed
    assert "next" in printed
    page = (folder / "out" / "measurement.html").read_text()
    assert "Accuracy against tokens kept" in page
    assert page.count("<svg") == 3 + 5 + 4  # curves, maps of kept tokens, maps of evidence


@pytest.mark.parametrize("value", ["1.5", "0", "x", "0.5,,-1", "nan"])
def test_budgets_that_are_none_are_refused(folder: Path, value: str) -> None:
    done = CliRunner().invoke(app, ["measure", str(folder / "clean.yaml"), "--retention", value])
    assert isinstance(done.exception, RedteamError)
    assert "--retention" in str(done.exception)


def test_a_benchmark_reports_its_own_scores(tmp_path: Path) -> None:
    """POPE reports precision, recall and F1, which the accuracy alone does not show."""
    import numpy as np
    from PIL import Image

    levels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    lines = [
        {"image": "a.png", "question": f"is there a {word} circle ?", "answer": "yes"}
        for word in ("red", "blue")
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "pairs.yaml").write_text(
        "name: pairs\n"
        "targets: [{type: scenes}]\n"
        "dataset: {type: jsonl, path: pairs.jsonl, scoring: pope}\n"
        "attacks: [{type: noise, epsilons: [8/255]}]\n"
        "compressions: [{type: fastv, retention: 0.25}]\n"
    )
    out = tmp_path / "out"
    words = ["measure", str(tmp_path / "pairs.yaml"), "--out", str(out), "--repeats", "0"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads((out / "measurement.json").read_text())["settings"]
    assert {"accuracy", "precision", "recall", "f1"} <= {key.lower() for key in found[0]["scores"]}
    assert "recall" in done.output
    assert "own scores" in (out / "measurement.html").read_text()


def measured(folder: Path, out: Path, *options: str) -> dict[str, object]:
    words = ["measure", str(folder / "clean.yaml"), "--out", str(out), "--repeats", "0", *options]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads((out / "measurement.json").read_text())
    return {key: found[key] for key in ("settings", "overlaps")}


def test_blocks_change_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many samples are held at a time, and they are all counted."""
    whole = measured(folder, tmp_path / "whole")
    monkeypatch.setattr("redteam.measuring.BLOCK", 4)
    assert measured(folder, tmp_path / "parts") == whole


def test_what_is_there_is_not_written_over(folder: Path) -> None:
    words = ["measure", str(folder / "clean.yaml"), "--out", str(folder / "out")]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, RedteamError)
    assert "holds measurement.json already" in str(done.exception)


def test_stopping_keeps_what_was_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from redteam import measuring
    from redteam.errors import InterruptedRun

    monkeypatch.setattr(measuring, "BLOCK", 4)
    real, calls = measuring._Target._read, []

    def stop(self: object, start: int, tallies: object) -> object:
        calls.append(start)
        if start:
            raise KeyboardInterrupt
        return real(self, start, tallies)  # type: ignore[arg-type]

    monkeypatch.setattr(measuring._Target, "_read", stop)
    words = ["measure", str(folder / "clean.yaml"), "--out", str(tmp_path), "--repeats", "0"]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, InterruptedRun)
    assert calls == [0, 4]
    found = json.loads((tmp_path / "measurement.json").read_text())
    assert [one["n"] for one in found["settings"]] == [4] * 4
    assert (tmp_path / "measurement.html").is_file()


def test_a_picture_that_cannot_be_read_is_an_error_of_its_sample(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    for name in ("good.png", "bad.png"):
        Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(tmp_path / name)
    bad = tmp_path / "bad.png"
    bad.write_bytes(bad.read_bytes()[:60])
    lines = [
        {"image": n, "question": "how many ?", "answer": "one"} for n in ("good.png", "bad.png")
    ]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "clean.yaml").write_text(
        SCENARIO.replace("{type: scenes, samples: 6}", "{type: jsonl, path: two.jsonl}")
    )
    found = measured(tmp_path, tmp_path / "out")["settings"]
    assert isinstance(found, list)
    assert [(one["n"], one["errors"]) for one in found] == [(1, 1)] * 4
    assert "bad.png" in found[0]["error"]
