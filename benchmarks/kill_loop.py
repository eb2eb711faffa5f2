"""Kill runs at random moments and resume them: ``python benchmarks/kill_loop.py --kills 200``.

Every run is the whole command line (plan, engine, store, reports) in a process of its own, on a
target that answers by a hash, so that a run takes long enough to be killed anywhere and hundreds of
them are affordable. The processes are forked from one that has imported torch. SIGKILL comes after
a random part of the time that an uninterrupted run takes; then the same command is started again,
and killed again, until all trials are there; the last one ends by itself. What it then says has to
be what the uninterrupted run says. Writes benchmarks/results/kill_loop.json.

With ``--engine ray`` every run starts a Ray of two workers, which takes most of its time; what is
killed is the driver. Every second run is resumed to its end by the local engine instead. Looked at
is also how long processes of Ray outlive their driver. ``--data`` says where the figures go.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import forked  # noqa: E402 - from tests/support
import ray_place  # noqa: E402
import stub_place  # noqa: E402
from workplace import Workplace  # noqa: E402

from reports.errors import LedgerError  # noqa: E402
from reports.store import RunStore  # noqa: E402

ENGINES: Final = {"local": ray_place.LOCAL, "ray": ray_place.ENGINE}
ORPHANS: Final = 60.0
"""Seconds in which the processes of a killed driver have to end."""
TRIALS: Final = stub_place.CELLS * stub_place.SAMPLES


def summary(run: Path) -> dict[str, Any]:
    """What a run found, without how long it took."""
    found: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    del found["timings"]
    return found


def state(run: Path) -> str:
    """How far a run had come when it was killed."""
    if not run.exists():
        return "before the run folder"
    if not (run / "manifest.json").exists():
        return "run folder without manifest"
    ledger = (run / "ledger.jsonl").read_bytes()
    if ledger and not ledger.endswith(b"\n"):
        return "in the middle of a ledger line"
    lines = ledger.count(b"\n")
    if lines < TRIALS:
        return "manifest, no trial" if not lines else "some trials"
    return "all trials, reports begun" if (run / "summary.json").exists() else "all trials"


def faults(run: Path) -> list[str]:
    """What must not be after any kill: a damaged ledger, or a line whose image is missing."""
    if not (run / "manifest.json").exists():
        return []
    found, store = [], RunStore.read(run)
    try:
        for trial in store.trials():
            for name in (trial.clean_png, trial.attacked_png):
                if name is None or not store.image_path(name).exists():
                    found.append(f"{trial.sample}: an image of a recorded trial is missing")
    except LedgerError as error:
        found.append(str(error))
    return found


class Loop:
    """Runs, kills and resumes.

    Args:
        place: with the scenario.
        seed: of the moments.
        engine: of the runs, a name of `ENGINES`.
    """

    def __init__(self, place: Workplace, seed: int, engine: str) -> None:
        self._place, self._rng = place, random.Random(seed)  # noqa: S311 - no secret
        self._engine, self._mark = engine, ""
        self.outlived: list[float] = []
        self.killed: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        started = time.monotonic()
        code = forked.wait(self._start("whole"))
        self.seconds = time.monotonic() - started
        if code != 4:
            raise SystemExit(f"the uninterrupted run ended with {code}: see {place.folder}")
        self._whole = summary(place.folder / "whole")

    def _start(self, name: str, engine: str = "") -> int:
        log = self._place.folder / f"{name}.log"
        self._mark = os.environ[ray_place.MARK] = uuid.uuid4().hex
        how = ("--set", f"engine={ENGINES[engine or self._engine]}")
        return forked.start(self._place, "run", "scenario.yaml", "--out", name, *how, log=log)

    def round(self, name: str, kills: int) -> None:
        """One run, killed until it has all trials or survives, or there have been enough kills."""
        run = self._place.folder / name
        while self.counts["kills"] < kills and self._killed(name):
            if self._look(run):
                break  # from here on there are only reports to kill
        last = "local" if self.counts["runs"] % 2 else self._engine
        code = forked.wait(self._start(name, last))
        self.counts[f"resumed by {last}"] += 1
        self._require(code == 4, f"{name}: the last resume ended with {code}")
        self.counts["resumed to the end"] += code == 4
        self.counts["runs"] += 1
        self._require(not faults(run), f"{name}: {faults(run)}")
        equal = (run / "summary.json").exists() and summary(run) == self._whole
        self.counts["summaries equal"] += equal
        self._require(equal, f"{name}: another summary than without kills")
        shutil.rmtree(run)

    def _killed(self, name: str) -> bool:
        """Whether a process was killed before it ended; else it has to have ended well."""
        pid = self._start(name)
        time.sleep(self._rng.uniform(0, 1.05) * self.seconds)
        os.kill(pid, signal.SIGKILL)
        code = forked.wait(pid)
        if code == -signal.SIGKILL:
            self._wait_for_orphans(name)
            return True
        self._require(code == 4, f"{name}: a resume ended with {code}")
        self.counts["ended before the kill"] += 1
        return False

    def _wait_for_orphans(self, name: str) -> None:
        """How long what the driver had started lives on."""
        if self._engine == "local":
            return
        seconds = ray_place.seconds_until_gone(self._mark, ORPHANS)
        self._require(seconds is not None, f"{name}: {ray_place.marked(self._mark)} live on")
        self.outlived.append(ORPHANS if seconds is None else seconds)

    def _look(self, run: Path) -> bool:
        """Look at what a kill has left; whether all trials are there."""
        found = state(run)
        self.counts["kills"] += 1
        self.killed[found] += 1
        self.counts["left temporary files"] += any(run.rglob(".*.????????"))
        wrong = faults(run)
        self.counts["sound after the kill"] += not wrong
        self._require(not wrong, f"{run.name}: {wrong}")
        return found.startswith("all trials")

    def _require(self, fine: bool, message: str) -> None:
        if not fine:
            self.wrong.append(message)
            print(message, flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that an answer takes")
    parser.add_argument("--engine", choices=ENGINES, default="local")
    parser.add_argument("--data", type=Path, default=Path("benchmarks/results/kill_loop.json"))
    arguments = parser.parse_args()
    forked.warm()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = stub_place.build(Path(folder) / "place")
        place.edit("{type: stub}", f"{{type: stub, delay: {arguments.delay}}}")
        loop, number = Loop(place, arguments.seed, arguments.engine), 0
        while loop.counts["kills"] < arguments.kills:
            number += 1
            loop.round(f"run {number}", arguments.kills)
    data = {
        "command": f"python benchmarks/kill_loop.py --kills {arguments.kills} "
        f"--seed {arguments.seed} --delay {arguments.delay} --engine {arguments.engine}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}",
        "seconds of an uninterrupted run": round(loop.seconds, 2),
        "seconds in all": round(time.monotonic() - started, 1),
        "counts": dict(sorted(loop.counts.items())),
        "state at the kill": dict(loop.killed.most_common()),
        "wrong": loop.wrong,
    }
    if loop.outlived:
        data["seconds that processes of Ray outlived their driver"] = {
            "most": round(max(loop.outlived), 1),
            "median": round(statistics.median(loop.outlived), 1),
        }
    arguments.data.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(data, indent=1))
    raise SystemExit(bool(loop.wrong))


if __name__ == "__main__":
    main()
