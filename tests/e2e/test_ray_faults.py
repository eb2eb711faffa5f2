"""A run on Ray that is killed, stopped, or has no room: it resumes to what it would have been.

All of these start Ray, most of them twice, so they run when asked for: ``-m exhaustive``.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray_place
from faults import KINDS, Faults, injected
from ray_place import LOCAL, marked, seconds_until_gone, start, wait_until
from test_faults import TRIALS, check_images, summary, temporaries
from workplace import ROOT, Workplace, ledger

import reports.artefacts
from redteam.engines.ray_worker import software
from reports.store import RunStore

ray = pytest.importorskip("ray", reason="needs the extra [ray]")
pytestmark = pytest.mark.exhaustive
RUN = ("run", "scenario.yaml", "--out")
AS_LOCAL = ("--set", f"engine={LOCAL}")
DELAY = 0.3
"""Seconds that an answer takes: a unit is long enough to be caught in."""
ORPHANS = 120.0
"""Seconds in which nothing of a killed run may be left: Ray's own helpers take their time."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an uninterrupted run finds, on one device."""
    place = ray_place.build(tmp_path_factory.mktemp("whole") / "place", DELAY, LOCAL)
    assert place.redteam(*RUN, "whole").returncode == 4
    return summary(place.folder / "whole")


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return ray_place.build(tmp_path / "place", DELAY)


def in_flight(run: Path) -> None:
    """Wait until units are there and others are in hand."""
    path = run / "ledger.jsonl"
    wait_until(lambda: path.exists() and ledger(run), "the first unit")
    assert len(ledger(run)) < TRIALS, "it was over too soon to test anything"


def check_resumed(place: Workplace, whole: dict[str, Any], *how: str) -> None:
    """The run in ``run`` goes on, and finds what the uninterrupted one found."""
    run = place.folder / "run"
    check_images(run)
    process, mark = start(place, *RUN, "run", *how)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 4, err
    assert summary(run) == whole
    check_images(run)
    assert len(ledger(run)) == TRIALS, "nothing was measured twice"
    assert all(trial.error is None for trial in RunStore.read(run).trials())
    assert not temporaries(run / "images")
    assert seconds_until_gone(mark, ORPHANS) is not None, marked(mark)


@pytest.mark.parametrize("how", [(), AS_LOCAL], ids=["ray", "local"])
def test_a_driver_that_is_killed_resumes_and_leaves_no_process(
    place: Workplace, whole: dict[str, Any], how: tuple[str, ...]
) -> None:
    process, mark = start(place, *RUN, "run")
    in_flight(place.folder / "run")
    assert len(marked(mark, "ray::")) >= 2, "the workers are at work"
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert seconds_until_gone(mark, ORPHANS) is not None, marked(mark)
    check_resumed(place, whole, *how)


def test_a_worker_that_is_killed_with_a_unit_in_hand_loses_nothing(
    place: Workplace, whole: dict[str, Any]
) -> None:
    process, mark = start(place, *RUN, "run")
    in_flight(place.folder / "run")
    there = len(ledger(place.folder / "run"))
    victim = min(marked(mark, "ray::Worker.execute"))
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 4, err
    assert "died over noise" in err, "it held a unit"
    assert there < TRIALS
    assert summary(place.folder / "run") == whole
    assert len(ledger(place.folder / "run")) == TRIALS


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_once_waits_for_the_units_and_twice_does_not(
    place: Workplace, whole: dict[str, Any], times: int
) -> None:
    run = place.folder / "run"
    process, mark = start(place, *RUN, "run")
    in_flight(run)
    there = len(ledger(run))
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: Ray's processes get it too
        time.sleep(0.1)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    assert "press Ctrl-C again to stop now" in err
    assert "died" not in err, "the workers finish their units"
    added = len(ledger(run)) - there
    assert (added > 0) == (times == 1)
    assert added <= 4, "two units were in hand"
    assert (run / "summary.json").exists() == (times == 1)
    assert ("run again with --out run to resume" in err) == (times == 2)
    assert seconds_until_gone(mark, ORPHANS) is not None, marked(mark)
    check_resumed(place, whole, *AS_LOCAL)


def test_a_second_run_on_the_folder_is_refused(place: Workplace, whole: dict[str, Any]) -> None:
    process, _ = start(place, *RUN, "run")
    in_flight(place.folder / "run")
    process.send_signal(signal.SIGSTOP)  # so that it is at work however long the others take
    for how in ((), AS_LOCAL):
        second, _ = start(place, *RUN, "run", *how)
        _, err = second.communicate(timeout=200)
        assert second.returncode == 3, err
        assert f"run is being written by another run (process {process.pid})" in err
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 4, err
    assert summary(place.folder / "run") == whole


DIFFERENT = '''
import os
from dataclasses import dataclass
from typing import ClassVar

from stub_target import Stub


@dataclass(frozen=True, kw_only=True)
class Different:
    """Loads other weights in each process."""

    name: ClassVar[str] = "different"
    capabilities: ClassVar[tuple[str, ...]] = ("visual_tokens", "generate")

    def load(self, device):
        model = Stub(0.0)
        model.identity = {"weights": str(os.getpid())}
        return model
'''
SUDDEN = '''
import os
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Sudden:
    """Ends the process that loads it."""

    name: ClassVar[str] = "sudden"
    capabilities: ClassVar[tuple[str, ...]] = ("visual_tokens", "generate")

    def load(self, device):
        os._exit(7)
'''


@pytest.fixture
def ray_here(tmp_path: Path, place: Workplace) -> Iterator[None]:
    """Ray in this process, that sees the plugins of the place."""
    path = os.pathsep.join([str(place.folder / "plugins"), str(ROOT)])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()


def test_a_worker_that_cannot_start_is_explained(place: Workplace, ray_here: None) -> None:
    place.plugin("different", DIFFERENT, targets="different = different:Different")
    place.plugin("sudden", SUDDEN, targets="sudden = sudden:Sudden")
    cases = {
        "type: different": "worker 2 loaded other weights or data than worker 1",
        "type: sudden": "died while it was preparing",
        "type: lvlm, model: nowhere": "nowhere",
    }
    stub = place.scenario.read_text()
    for target, message in cases.items():
        place.scenario.write_text(stub.replace(f"type: stub, delay: {DELAY}", target))
        done = place.redteam(*RUN, "refused")
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not (place.folder / "refused").exists(), "nothing is written before all is ready"


def test_a_full_disk_of_the_driver_stops_the_run_and_it_resumes(
    place: Workplace, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reports.html.render", lambda *_: "<!doctype html>")
    monkeypatch.setattr(reports.artefacts, "_THREADS", 1)
    place.edit(f"delay: {DELAY}", "delay: 0.0")
    assert place.redteam(*RUN, "whole", *AS_LOCAL).returncode == 4
    whole = summary(place.folder / "whole")
    counted = Faults()
    with injected(counted):
        assert place.redteam(*RUN, "counted").returncode == 4
    writes = len(counted.log)
    assert summary(place.folder / "counted") == whole
    for kind in ("full", "full for good"):
        for at in range(5, writes + 1, max(1, writes // 6)):
            name = f"{kind} {at}"
            faults = Faults(at, **KINDS[kind])
            with injected(faults):
                done = place.redteam(*RUN, name)
            if done.returncode == 4:
                assert faults.log[at - 1] == "mkdir", "only of a folder that is there already"
                continue
            assert done.returncode in (2, 3), done.stderr
            assert done.stderr.splitlines()[-1].startswith("error: cannot "), done.stderr
            assert "Traceback" not in done.stderr
            run = place.folder / name
            check_images(run)
            assert not temporaries(run)
            done = place.redteam(*RUN, name)
            assert done.returncode == 4, done.stderr
            assert summary(run) == whole
            assert len(RunStore.read(run).done(errors=False)) == TRIALS


def test_a_worker_with_another_redteam_is_refused(
    place: Workplace, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redteam.engines.ray.software", lambda: {**software(), "torch": "1.0"})
    done = place.redteam(*RUN, "refused")
    assert done.returncode == 2
    assert "instead of 1.0; on a cluster redteam, plugins and data must be" in done.stderr
    assert not (place.folder / "refused").exists()
