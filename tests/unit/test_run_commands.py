"""``runs``, ``show`` and ``export``: on good runs, on damaged ones, and on hostile ones."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import synthetic_run
from command import imported, redteam
from hostile_run import FORBIDDEN, HOSTILE, build, samples
from report_data import cell, manifest, swap, tokens, trial

from reports import build_reports, listing
from reports.store import RunStore


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = synthetic_run.build(tmp_path_factory.mktemp("runs") / "drawn", samples=8)
    build_reports(folder)
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("runs") / "hostile")


def small(folder: Path, outcomes: str = "1110", created: str = "2026-01-02T03:04:05+00:00") -> Path:
    with RunStore.create(folder, manifest(2, created=created)) as store:
        store.append(trial(f"s{i}", outcomes) for i in range(2))
    return folder


# runs


def test_runs_are_listed_newest_first(tmp_path: Path) -> None:
    for name, day in (("a", 2), ("b", 4), ("c", 3)):
        build_reports(small(tmp_path / name, created=f"2026-01-0{day}T03:04:05+00:00"))
    rows = json.loads(redteam("runs", tmp_path, "--json").out)
    assert [Path(row["folder"]).name for row in rows] == ["b", "c", "a"]
    assert rows[0] == {
        "folder": str(tmp_path / "b"), "state": "complete", "name": "test",
        "created": "2026-01-04T03:04:05+00:00", "verdict": "not_gated", "exit_code": 0,
        "cells": 1, "samples": 2, "progress": {"expected": 2, "done": 2, "errors": 0},
        "problem": None,
    }  # fmt: skip
    done = redteam("runs", tmp_path)
    lines = done.out.splitlines()
    assert done.code == 0
    assert re.fullmatch(r"2026-01-04 03:04 +test +not gated +1 +2 of 2 +\S+/b *", lines[1])
    assert len(lines) == 5


def test_a_run_in_progress_shows_how_far_it_is(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", manifest(4)) as store:
        store.append([trial("s0")])
        (row,) = json.loads(redteam("runs", tmp_path, "--json").out)
        assert (row["state"], row["verdict"]) == ("incomplete", None)
        assert row["progress"] == {"expected": 4, "done": 1, "errors": None}
        build_reports(tmp_path / "run")
        (row,) = json.loads(redteam("runs", tmp_path, "--json").out)
        assert (row["state"], row["verdict"], row["exit_code"]) == ("incomplete", "not_gated", 3)
        store.append([trial("s1")])
        later = (tmp_path / "run" / "summary.json").stat().st_mtime + 10
        os.utime(tmp_path / "run" / "ledger.jsonl", (later, later))
        (row,) = json.loads(redteam("runs", tmp_path, "--json").out)
        assert row["progress"]["done"] == 2, "the ledger, not the report of before"
        assert row["verdict"] is None


def test_copied_files_keep_their_verdict(tmp_path: Path) -> None:
    """Copying sets times anew; a report that saw every trial is still the report."""
    build_reports(small(tmp_path / "run"))
    later = (tmp_path / "run" / "summary.json").stat().st_mtime + 10
    os.utime(tmp_path / "run" / "ledger.jsonl", (later, later))
    (row,) = json.loads(redteam("runs", tmp_path, "--json").out)
    assert row["verdict"] == "not_gated"


def damage(folder: Path, how: str) -> None:
    path, ledger = folder / "manifest.json", folder / "ledger.jsonl"
    if how == "cut manifest":
        path.write_bytes(path.read_bytes()[:40])
    elif how == "empty manifest":
        path.write_bytes(b"")
    elif how == "binary manifest":
        path.write_bytes(bytes(range(256)))
    elif how == "other version":
        path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    elif how == "no manifest":
        path.unlink()
    elif how == "changed ledger":
        ledger.write_bytes(ledger.read_bytes().replace(b'"yes"', b'"no"'))
    else:
        payload = b"{not json"
        digest = hashlib.sha256(payload).hexdigest()[:16].encode()
        ledger.write_bytes(b'{"sha256": "' + digest + b'", "trial": ' + payload + b"}\n")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut manifest", "manifest.json cannot be read"),
        ("empty manifest", "manifest.json cannot be read"),
        ("binary manifest", "manifest.json cannot be read"),
        ("other version", "another version of redteam"),
        ("no manifest", "has no manifest.json"),
        ("changed ledger", "line 1 is damaged: its checksum does not match"),
        ("ledger of no JSON", "line 1 is damaged: it is no JSON"),
    ],
)
def test_damaged_runs_are_listed_as_such(tmp_path: Path, how: str, says: str) -> None:
    damage(small(tmp_path / "bad"), how)
    build_reports(small(tmp_path / "good"))
    done = redteam("runs", tmp_path, "--json")
    rows = {Path(row["folder"]).name: row for row in json.loads(done.out)}
    assert done.code == 0
    assert rows["good"]["state"] == "complete"
    assert rows["bad"]["state"] == "damaged"
    assert says in rows["bad"]["problem"]
    text = redteam("runs", tmp_path).out
    assert re.search(r"\bdamaged\b.*/bad", text)
    assert says in text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"verdict": "maybe"}', '{"verdict": "pass"}'])
def test_a_summary_that_is_none_counts_as_missing(tmp_path: Path, text: str) -> None:
    (small(tmp_path / "run") / "summary.json").write_text(text)
    (found,) = listing.runs(tmp_path)
    assert (found.state, found.verdict, found.done) == ("complete", "", 2)


def test_what_is_no_run_is_passed_over(tmp_path: Path) -> None:
    small(tmp_path / "run")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured" / "measurement.json").write_text("{}")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    assert [one.folder.name for one in listing.runs(tmp_path)] == ["run"]
    assert [one.folder for one in listing.runs(tmp_path / "run")] == [tmp_path / "run"]


def test_where_there_is_no_run(tmp_path: Path) -> None:
    done = redteam("runs", cwd=tmp_path)
    assert (done.code, "no run in runs" in done.out) == (0, True)
    assert json.loads(redteam("runs", "--json", cwd=tmp_path).out) == []
    done = redteam("runs", "nowhere", cwd=tmp_path)
    assert done.code == 2
    assert "nowhere" in done.err


# show


def test_show_tells_the_whole_story(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", manifest(1)) as store:
        store.append([trial("s0", swap=swap(), tokens=tokens(), checks=["unfinished: raise steps"],
                            clean_png="a" * 64, attacked_png="b" * 64)])  # fmt: skip
    done = redteam("show", tmp_path / "run", "--sample", "s0")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[:3] == ["s0", "question   is there a red circle?", "truth      yes"]
    assert lines[4] == "c1   scenes-a · fastv · caa · ε 8/255"
    assert [line.split() for line in lines[5:8]] == [
        ["all", "tokens", "compressed"],
        ["clean", "yes", "(right)", "yes", "(right)"],
        ["attacked", "yes", "(right)", "no", "(WRONG)"],
    ]
    for said in (
        "finding    a compression-specific failure: wrong only attacked and compressed",
        "distance   linf 8/255, l2 3.00, PSNR 31.0 dB",
        "kept       2 tokens clean, 2 attacked, 1 in both (Jaccard 0.33, Spearman 0.20)",
        "evidence   1 of 1 tokens kept clean, 0 attacked",
        "swap test  attacked image, clean kept set: yes (right again)",
        "           clean image, attacked kept set: no (WRONG too)",
        "check      unfinished: raise steps",
        f"attacked   images/bb/{'b' * 64}.png",
        f"replay     redteam replay {tmp_path / 'run'} --sample s0 --cell c1",
    ):
        assert said in lines
    assert any(line.startswith("diagnosis  Ranking. ") for line in lines)


def test_show_chooses_cells(drawn: Path) -> None:
    sample = "scenes-test-0003"

    def shown(*wanted: str) -> list[str]:
        cells = [part for one in wanted for part in ("--cell", one)]
        done = redteam("show", drawn, "--sample", sample, "--json", *cells)
        return [one["cell"] for one in json.loads(done.out)["trials"]]

    every = [f"{i:08x}" for i in range(18)]
    assert shown() == every
    assert shown("00000004") == ["00000004"]
    assert shown("0000001") == every[16:], "the beginning of an id"
    assert shown("visionzip") == every[9:]
    assert shown("noise", "00000004") == [*every[:3], every[4], *every[9:12]]


def test_show_says_what_is_not_there(drawn: Path, tmp_path: Path) -> None:
    done = redteam("show", drawn, "--sample", "scenes-tst-0003")
    assert done.code == 2
    assert "did you mean 'scenes-test-0003'?" in done.err
    done = redteam("show", drawn, "--sample", "scenes-test-0003", "--cell", "visionzp")
    assert done.code == 2
    assert "did you mean 'visionzip'?" in done.err
    RunStore.create(tmp_path / "run", manifest(1)).close()
    done = redteam("show", tmp_path / "run", "--sample", "s0")
    assert done.code == 5
    assert "was not run in any cell" in done.err
    assert redteam("show", tmp_path, "--sample", "s0").code == 2
    damage(small(tmp_path / "bad"), "changed ledger")
    assert redteam("show", tmp_path / "bad", "--sample", "s0").code == 3


def test_show_tells_an_error(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", manifest(1)) as store:
        store.append([trial("s0", "error")])
    lines = redteam("show", tmp_path / "run", "--sample", "s0").out.splitlines()
    assert "error      RuntimeError in attack: out of memory" in lines
    assert not [line for line in lines if line.startswith(("finding", "replay"))]


def test_the_last_line_of_a_sample_counts(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", manifest(2)) as store:
        quote = '"sample":"s1"'
        store.append([trial("s0", question=quote), trial("s1", "error"), trial("s1", "1111")])
        assert [one.error for one in store.trials_of("s1")] == [None]
        assert [one.question for one in store.trials_of("s0")] == [quote]
        assert store.trials_of("s") == []


# hostile strings


def inert(text: str) -> None:
    for character in FORBIDDEN:
        assert character not in text, f"U+{ord(character):04X}"
    assert not {c for c in text if ord(c) < 32 or 127 <= ord(c) < 160} - {"\n"}


@pytest.mark.parametrize("index", range(len(HOSTILE)))
def test_show_is_inert(hostile: Path, index: int) -> None:
    done = redteam("show", hostile, "--sample", samples()[index])
    assert done.code == 0, done.err
    inert(done.out)
    assert redteam("show", hostile, "--sample", samples()[index], "--json").out.isascii()


def test_show_keeps_what_looks_like_markup(hostile: Path) -> None:
    out = redteam("show", hostile, "--sample", samples()[20]).out
    assert "question   [bold red]markup[/bold red] [link=https://evil.example]x[/link]" in out


def test_errors_of_show_are_inert(hostile: Path) -> None:
    for text in HOSTILE:
        if "\0" not in text:  # no process can be given such an argument
            inert(redteam("show", hostile, "--sample", f"{text}?").err)
            inert(redteam("show", hostile, "--sample", "e", "--cell", f"{text}?").err)


def test_runs_is_inert(tmp_path: Path) -> None:
    for text in HOSTILE:
        name = re.sub(r"[/\0]", "-", text)
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(text)
    small(tmp_path / "x")
    path = tmp_path / "x" / "manifest.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "name": HOSTILE[7], "created": HOSTILE[7]}))
    done = redteam("runs", tmp_path)
    assert done.code == 0
    inert(done.out)
    assert done.out.count("damaged") >= len(HOSTILE)
    assert redteam("runs", tmp_path, "--json").out.isascii()


def test_a_command_with_hidden_characters_is_not_offered(tmp_path: Path) -> None:
    for sample, offered in (("it's", True), ("a\u202eb", False)):
        planned = manifest(0).model_copy(update={"samples": [sample]})
        folder = tmp_path / str(offered)
        with RunStore.create(folder, planned) as store:
            store.append([trial(sample)])
        (line,) = [
            line
            for line in redteam("show", folder, "--sample", sample).out.splitlines()
            if line.startswith("replay")
        ]
        assert ("--sample" in line) == offered


# export and weight


def test_export_says_what_it_wrote(drawn: Path, tmp_path: Path) -> None:
    done = redteam("export", drawn, "--format", "csv", "--out", tmp_path / "t.csv")
    assert (done.code, done.out) == (0, f"wrote {tmp_path / 't.csv'}\n")
    assert (tmp_path / "t.csv").stat().st_size > 10_000
    assert redteam("export", drawn, "--format", "pdf").code == 2
    assert redteam("export", tmp_path, "--format", "csv").code == 2
    done = redteam("export", drawn, "--format", "csv", "--out", tmp_path / "t.csv" / "x")
    assert done.code == 3
    assert "t.csv" in done.err


def test_replay_misses_an_image_before_it_loads_anything(tmp_path: Path) -> None:
    spec = {
        "target": {"type": "scenes", "checkpoint": "scenes-a"},
        "compression": {"type": "fastv", "layer": 2, "retention": 0.25},
        "defense": {"type": "none"},
    }
    with RunStore.create(tmp_path / "run", manifest(1, cells=[cell(spec=spec)])) as store:
        store.append([trial("s0", clean_png="a" * 64, attacked_png="b" * 64)])
    done = redteam("replay", tmp_path / "run", "--sample", "s0", "--device", "cpu")
    assert done.code == 3
    assert "the clean image of sample 's0' cannot be used" in done.err
    assert "needs the folder images/" in done.err


@pytest.mark.parametrize("command", ["runs", "show", "export"])
def test_no_torch(drawn: Path, tmp_path: Path, command: str) -> None:
    arguments = {
        "runs": ("runs", str(drawn.parent)),
        "show": ("show", str(drawn), "--sample", "scenes-test-0003"),
        "export": ("export", str(drawn), "--format", "csv", "--out", str(tmp_path / "t.csv")),
    }[command]
    assert not imported(tmp_path, *arguments) & {"torch", "transformers"}
