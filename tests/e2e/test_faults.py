"""Never lose, never lie: a run that failed at any write resumes to what it would have been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import stub_place
from faults import KINDS, Faults, Killed, injected
from workplace import ROOT, Workplace, ledger

import reports.artefacts
from reports.errors import LedgerError
from reports.store import RunStore

RUN = ("run", "scenario.yaml", "--out")
TRIALS = stub_place.CELLS * stub_place.SAMPLES


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One writer of images, so that the n-th write is always the same; and a page at once."""
    monkeypatch.setattr("reports.html.render", lambda *_: "<!doctype html>")
    monkeypatch.setattr(reports.artefacts, "_THREADS", 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A place with one uninterrupted run in it, ``whole``."""
    built = stub_place.build(tmp_path_factory.mktemp("faults") / "place")
    assert built.redteam(*RUN, "whole").returncode == 4
    return built


@pytest.fixture(scope="module")
def writes(place: Workplace) -> int:
    """How often a run writes."""
    counted = Faults()
    with mock.patch.object(reports.artefacts, "_THREADS", 1), injected(counted):
        place.redteam(*RUN, "counted")
    assert {"open", "write", "fsync", "mkdir", "chmod", "replace"} <= set(counted.log)
    return len(counted.log)


def summary(run: Path) -> dict[str, Any]:
    """What was found, without how long it took."""
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    del found["timings"]
    return found


def check_images(run: Path) -> None:
    """No line of the ledger names an image that is missing or something else."""
    if not (run / "manifest.json").exists():
        return
    store = RunStore.read(run)
    for trial in store.trials():
        for name in (trial.clean_png, trial.attacked_png):
            assert name is not None
            store.read_png(name)


def temporaries(run: Path) -> list[str]:
    return [path.name for path in run.rglob(".*") if path.is_file() and path.name != ".lock"]


def check_resumed(place: Workplace, name: str, *, killed: bool) -> None:
    run = place.folder / name
    check_images(run)
    if not killed:
        assert not temporaries(run), "whoever can tidy up has to"
    done = place.redteam(*RUN, name)
    assert done.returncode == 4, done.stderr
    assert summary(run) == summary(place.folder / "whole")
    check_images(run)
    assert len(RunStore.read(run).done(errors=False)) == TRIALS
    assert all(trial.error is None for trial in RunStore.read(run).trials())
    assert not [one for one in temporaries(run / "images") if killed]


def strike(place: Workplace, name: str, kind: str, at: int) -> None:
    """One run with one fault, and its resume."""
    faults, killed = Faults(at, **KINDS[kind]), kind == "killed"
    with injected(faults):
        try:
            done = place.redteam(*RUN, name)
        except Killed:
            assert killed
        else:
            assert not killed
            if done.returncode == 4:
                assert faults.log[at - 1] == "mkdir", "only of a folder that is there already"
                return
            assert done.returncode in (2, 3)
            assert done.stderr.splitlines()[-1].startswith("error: cannot "), done.stderr
            assert "Traceback" not in done.stderr
    check_resumed(place, name, killed=killed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_write_may_fail(kind: str, place: Workplace, writes: int) -> None:
    first = list(KINDS).index(kind)
    for at in range(first + 1, writes + 1, len(KINDS)):  # together the kinds strike every write
        strike(place, f"{kind} {at}", kind, at)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_every_write_may_fail_in_every_way(kind: str, place: Workplace, writes: int) -> None:
    for at in range(1, writes + 1):
        strike(place, f"all {kind} {at}", kind, at)


def test_a_process_that_is_gone_at_a_write_resumes(place: Workplace, writes: int) -> None:
    """The same with `os._exit` in processes of their own: nothing at all runs behind it."""
    script = ROOT / "tests" / "support" / "exit_at_write.py"
    points = [str(at) for at in range(2, writes + 1, 9)]
    names = [f"gone {at}" for at in points]
    done = subprocess.run(
        [sys.executable, script, place.folder, *points],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict.fromkeys(points, 99), "the process was not gone"
    for name in names:
        check_resumed(place, name, killed=True)


DAMAGED = {
    "a torn last line": (lambda text: text[:-40], None),
    "a ledger cut to nothing": (lambda text: b"", None),
    "a line that is gone": (lambda text: text[text.index(b"\n") + 1 :], None),
    "a line of zeros": (lambda text: text + b"\0" * 512, None),
    "a changed letter": (lambda text: text.replace(b'"yes"', b'"yez"', 1), "line 1 is damaged"),
    "half a line in the middle": (
        lambda text: text[:200] + text[text.index(b"\n") :],
        "line 1 is damaged: it is not a ledger line.*Delete line 1",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_ledger_is_mended_or_named(case: str, place: Workplace) -> None:
    change, message = DAMAGED[case]
    assert place.redteam(*RUN, case).returncode == 4
    path = place.folder / case / "ledger.jsonl"
    path.write_bytes(change(path.read_bytes()))
    (place.folder / case / "summary.json").unlink()
    if message is not None:
        done = place.redteam(*RUN, case)
        assert done.returncode == 3
        with pytest.raises(LedgerError, match=message):
            list(RunStore.read(place.folder / case).trials())
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[1:]))  # what the message says
    check_resumed(place, case, killed=True)


def test_without_its_manifest_a_folder_is_not_taken(place: Workplace) -> None:
    assert place.redteam(*RUN, "headless").returncode == 4
    run = place.folder / "headless"
    (run / "manifest.json").unlink()
    before = (run / "ledger.jsonl").read_bytes()
    done = place.redteam(*RUN, "headless")
    assert done.returncode == 2
    assert "headless is not empty" in done.stderr
    assert (run / "ledger.jsonl").read_bytes() == before


def test_a_clock_that_jumps_changes_nothing(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1e9

    def backwards() -> float:
        nonlocal now
        now -= 3600
        return now

    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, backwards)
    done = place.redteam(*RUN, "clock")
    monkeypatch.undo()
    assert done.returncode == 4, done.stderr
    assert summary(place.folder / "clock") == summary(place.folder / "whole")


def test_a_second_process_is_refused(place: Workplace) -> None:
    manifest = RunStore.read(place.folder / "whole").manifest
    with RunStore.create(place.folder / "held", manifest):
        done = place.redteam(*RUN, "held")
    assert done.returncode == 3
    assert f"held is being written by another run (process {os.getpid()})" in done.stderr
    check_resumed(place, "held", killed=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_explained(place: Workplace) -> None:
    folder = place.folder / "sealed"
    folder.mkdir(mode=0o500)
    done = place.redteam(*RUN, "sealed/run")
    assert done.returncode == 3
    assert "choose a writable --out folder" in done.stderr


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_once_waits_for_the_unit_and_twice_does_not(times: int, tmp_path: Path) -> None:
    place = stub_place.build(tmp_path / "place")
    place.edit("{type: stub}", "{type: stub, delay: 0.6}")
    run = tmp_path / "place" / "run"
    process = place.start(*RUN, "run")
    while not (run / "ledger.jsonl").exists() or not ledger(run):
        assert process.poll() is None, "it ended before it had begun"
        time.sleep(0.01)
    there = len(ledger(run))
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    assert "press Ctrl-C again to stop now" in err
    assert len(ledger(run)) == there + (2 if times == 1 else 0)
    assert (run / "summary.json").exists() == (times == 1)
    assert ("run again with --out run to resume" in err) == (times == 2)
    done = place.redteam(*RUN, "run")
    assert done.returncode == 4, done.stderr
    check_images(run)
    assert len(ledger(run)) == TRIALS, "nothing was measured twice"


@pytest.mark.slow
def test_runs_that_are_killed_at_random_resume(tmp_path: Path) -> None:
    """A short one of benchmarks/kill_loop.py, with SIGKILL."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kill_loop.py", "--kills", "5", "--delay", "0.05",
         "--data", tmp_path / "found.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["wrong"] == []
    counts = found["counts"]
    assert counts["kills"] == counts["sound after the kill"] == 5
    assert counts["runs"] == counts["summaries equal"] == counts["resumed to the end"] > 0
