"""The Ray engine through the command line: the same run, whoever dies."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from workplace import ROOT, SAMPLES, Workplace, cells, ledger

from redteam.cache import NOTE

ray = pytest.importorskip("ray", reason="needs the extra [ray]")
ENGINE = "engine: {type: ray, workers: 2, batch_size: 2, device: cpu}"
MORTAL = '''
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Ge

from redteam import Attack, Knowledge


@dataclass(frozen=True, kw_only=True)
class Mortal(Attack):
    """Kills the process it runs in on one sample, and breaks on another.

    Args:
        deaths: how often, at least 0.
    """

    name: ClassVar[str] = "mortal"
    knowledge: ClassVar[Knowledge] = Knowledge.NONE

    deaths: Annotated[int, Ge(0)] = 1

    def propose(self, view, batch, budget, rng):
        if "s3" in batch.ids:
            for number in range(self.deaths):
                try:
                    (Path(os.environ["MORTAL"]) / str(number)).touch(exist_ok=False)
                except FileExistsError:
                    continue
                os.kill(os.getpid(), signal.SIGKILL)
        if "s1" in batch.ids:
            raise ArithmeticError("s1 is too much for me")
        return batch.images
'''


@pytest.fixture(scope="module", autouse=True)
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One Ray for all tests of this file, that sees plugins and where they leave marks."""
    plugins, marks = tmp_path_factory.mktemp("plugins"), tmp_path_factory.mktemp("marks")
    places = [str(plugins), str(ROOT), str(ROOT / "tests" / "support"), *filter(None, sys.path)]
    variables = {
        "PYTHONPATH": os.pathsep.join(places),
        "MORTAL": str(marks),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    try:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": variables},
        )
    except Exception as error:
        pytest.skip(f"Ray does not start on this machine: {error}")
    yield plugins
    ray.shutdown()


def compared(trial: dict[str, Any]) -> dict[str, Any]:
    """A trial without what may differ: how long things took."""
    kept = {key: value for key, value in trial.items() if key not in ("timings", "demands")}
    kept["checks"] = [check for check in trial["checks"] if check != NOTE]
    tokens = {
        name: (one["tokens"], one["generated"]) for name, one in (trial["demands"] or {}).items()
    }
    return {**kept, "demands": tokens}


def test_it_finds_what_the_local_engine_finds(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace.edit("batch_size: 4", "batch_size: 2")
    assert workplace.redteam("run", "scenario.yaml", "--out", "local").returncode == 4
    workplace.edit("engine: {type: local, batch_size: 2, device: cpu}", ENGINE)
    monkeypatch.setenv("REDTEAM_CACHE", str(tmp_path / "cache"))
    done = workplace.redteam("run", "scenario.yaml", "--out", "ray", "--profile")
    assert done.returncode == 4, done.stderr
    assert "worker 1: " in done.stderr
    assert "worker 2: " in done.stderr
    check_equal(workplace, "local", "ray")
    check_profile(workplace, done.stderr)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.image")}
    images = 3 * SAMPLES  # of PGD one a sample, of CAA one for each compression
    assert len(kept) == images
    done = workplace.redteam("run", "scenario.yaml", "--out", "again")
    assert done.returncode == 4, done.stderr
    assert f"{images} attacked images from the cache of earlier runs" in done.stderr
    check_equal(workplace, "local", "again")
    recalled = [t for t in ledger(workplace.folder / "again") if NOTE in t["checks"]]
    assert len(recalled) == 4 * SAMPLES
    assert not any(NOTE in t["checks"] for t in ledger(workplace.folder / "ray"))
    assert {path.name for path in (tmp_path / "cache").rglob("*.image")} == {p.name for p in kept}


@pytest.mark.exhaustive
def test_no_cache_is_none_for_the_workers_too(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace.edit("engine: {type: local, batch_size: 4, device: cpu}", ENGINE)
    monkeypatch.setenv("REDTEAM_CACHE", str(tmp_path / "cache"))
    assert workplace.redteam("run", "scenario.yaml", "--out", "first").returncode == 4
    done = workplace.redteam("run", "scenario.yaml", "--out", "second", "--no-cache")
    assert "from the cache" not in done.stderr
    assert not any(NOTE in t["checks"] for t in ledger(workplace.folder / "second"))
    check_equal(workplace, "first", "second")


def check_equal(place: Workplace, first: str, second: str) -> None:
    one, other = (
        {(t["cell"], t["sample"]): compared(t) for t in ledger(place.folder / name)}
        for name in (first, second)
    )
    assert one == other
    images = [
        {path.name for path in (place.folder / name / "images").rglob("*.png")}
        for name in (first, second)
    ]
    assert images[0] == images[1]


def check_profile(place: Workplace, said: str) -> None:
    """Every second of every worker counts once, and so does every second of the driver."""
    assert "where the workers' time went" in said
    assert "where the driver's time went" in said
    (session,) = json.loads((place.folder / "ray" / "profile.json").read_text())["sessions"]
    assert session["workers"] == 2
    for phases, whole in (("phases", "worker_seconds"), ("driver", "wall_seconds")):
        total = sum(one["seconds"] for one in session[phases].values())
        assert total == pytest.approx(session[whole], abs=0.05), phases
    for name in ("vision tower", "LLM prefill", "token selection", "attack backward", "harness"):
        assert session["phases"][name]["seconds"] > 0, name
    for name in ("loading", "images and ledger", "waiting", "harness"):
        assert session["driver"][name]["seconds"] > 0, name
    assert session["worker_seconds"] < 2 * session["wall_seconds"]
    page = (place.folder / "ray" / "report.html").read_text()
    assert "s of 2 workers on cpu" in page


@pytest.mark.parametrize("deaths", [1, 3])
def test_a_worker_that_dies_is_replaced(
    workplace: Workplace, local_ray: Path, deaths: int, tmp_path: Path
) -> None:
    for folder in (None, local_ray):
        workplace.plugin("mortal", MORTAL, folder=folder, attacks="mortal = mortal:Mortal")
    marks = Path(ray.get_runtime_context().runtime_env["env_vars"]["MORTAL"])
    for mark in marks.iterdir():
        mark.unlink()
    workplace.edit("  - {type: pgd, steps: 3, epsilons: [32/255]}\n  - {type: caa, steps: 4}\n", "")
    workplace.edit(
        "  - {type: noise}\n", f"  - {{type: noise}}\n  - {{type: mortal, deaths: {deaths}}}\n"
    )
    workplace.edit("engine: {type: local, batch_size: 4, device: cpu}", ENGINE)
    done = workplace.redteam("run", "scenario.yaml", "--out", "run")
    assert f"time {deaths} of 3" in done.stderr
    trials = ledger(workplace.folder / "run")
    keys = [(trial["cell"], trial["sample"]) for trial in trials]
    assert len(keys) == len(set(keys)) == len(cells(workplace.folder / "run")) * SAMPLES
    broken = [t for t in trials if t["error"] and t["error"]["type"] == "ArithmeticError"]
    assert [trial["sample"] for trial in broken] == ["s1", "s1"], "once for each compression"
    for trial in broken:
        assert trial["error"]["where"] == "attack mortal"
        assert "s1 is too much for me" in trial["error"]["traceback"]
        assert "mortal.py" in trial["error"]["traceback"]
    failed = [trial for trial in trials if trial["error"] and trial not in broken]
    if deaths < 3:
        assert failed == [], "the unit was done again"
    else:
        assert {trial["sample"] for trial in failed} == {"s2", "s3"}, "the unit, and no other"
        assert {trial["error"]["type"] for trial in failed} == {"WorkerDied"}
