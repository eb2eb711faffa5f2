"""How long a report of many trials takes, how much memory, and how fast a browser opens it.

``python benchmarks/report_scale.py`` draws run folders of 10,000, 30,000 and 100,000 trials, builds
summary.json, summary.md and report.html of each in a process of its own, and opens a report of
1,000 findings in a headless Chromium, if there is one. No model is needed: the trials are those of
`tests/support/synthetic_run.py`, about 2 kB a line as a real run's, and share a pool of pictures,
because only those of the findings in the page are ever read.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import synthetic_run  # noqa: E402

from reports.records import Cell, Demand, Demands, Effort, Manifest, Trial  # noqa: E402
from reports.store import RunStore  # noqa: E402

POOL = 600
"""Measured trials with pictures that the others are copies of, under names of their own."""
OPENED = 6_000
"""Trials of the run whose report is opened, each with pictures of its own: over 1,000 findings."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/report_scale.json")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, help="keep the drawn runs in this folder")
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measured(arguments.measure)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        place = arguments.keep or Path(temporary)
        found = [scaled(place / f"run-{trials}", trials) for trials in arguments.trials]
        result = {
            "command": "python benchmarks/report_scale.py",
            "machine": f"{platform.machine()}, Python {platform.python_version()}",
            "cores": os.cpu_count(),
            "load_average": round(os.getloadavg()[0], 1),
            "builds": found,
            "opening": opening(place / "opened"),
        }
    text = json.dumps(result, indent=1)
    arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def scaled(folder: Path, trials: int) -> dict[str, Any]:
    """Draw a run of that many trials and build its reports in a fresh process."""
    if not folder.exists():
        draw(folder, trials)
    words = [sys.executable, __file__, "--measure", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)  # noqa: S603
    return {"trials": trials, **json.loads(done.stdout)}


def measured(folder: Path) -> dict[str, Any]:
    """Build the reports here; seconds, memory and sizes."""
    wall, processor = time.perf_counter(), time.process_time()
    from reports import build_reports

    built = build_reports(folder)
    processor, wall = time.process_time() - processor, time.perf_counter() - wall
    summary = json.loads(built.summary.read_text(encoding="utf-8"))
    return {
        "cells": len(summary["cells"]),
        "failures": sum(cell["failures"] for cell in summary["cells"]),
        "wall_seconds": round(wall, 2),
        "processor_seconds": round(processor, 2),
        "peak_mebibytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "ledger_megabytes": round((folder / "ledger.jsonl").stat().st_size / 1e6, 1),
        "report_megabytes": round(built.report.stat().st_size / 1e6, 2),
    }


def opening(folder: Path) -> dict[str, Any] | None:
    """Open a report of 1,000 findings with pictures of their own."""
    import browser

    if browser.CHROMIUM is None:
        return None
    if not folder.exists():
        draw(folder, OPENED, pool=OPENED)
    built = measured(folder)
    return {"report_megabytes": built["report_megabytes"], **opened(folder / "report.html")}


def opened(page: Path) -> dict[str, Any]:
    """Milliseconds until Chromium has loaded and laid out a report, median and range of five.

    First in a browser that has only just started, with an empty profile; then once more in it.
    """
    import browser

    taken: dict[str, list[int]] = {"fresh": [], "again": []}
    for _ in range(5):
        with (
            tempfile.TemporaryDirectory() as profile,
            browser.opened(Path(profile), network=False) as tab,
        ):
            for times in taken.values():
                start = time.perf_counter()
                tab.go(page)
                tab.evaluate("new Promise(f => requestAnimationFrame(() => setTimeout(f)))")
                times.append(round(1000 * (time.perf_counter() - start)))
            findings = tab.evaluate("document.querySelectorAll('.finding').length")
    return {
        "findings": findings,
        "milliseconds": {name: sorted(times)[2] for name, times in taken.items()},
        "range": {name: [min(times), max(times)] for name, times in taken.items()},
    }


def draw(folder: Path, trials: int, pool: int = POOL) -> None:
    """Write a run folder of 18 cells, every cell on the same samples."""
    planned = synthetic_run.manifest(trials // 18 + 1)
    with RunStore.create(folder, planned, "name: report-scale\n") as store:
        for cell in planned.cells:
            store.append(copies(planned, cell, store, max(2, pool // len(planned.cells))))


def copies(planned: Manifest, cell: Cell, store: RunStore, count: int) -> Iterator[Trial]:
    """The trials of a cell: `count` drawn ones over and over."""
    drawn = [full(synthetic_run.trial(cell, "", index, store)) for index in range(count)]
    for index, sample in enumerate(planned.samples):
        yield drawn[index % count].model_copy(
            update={"sample": sample, "image": f"scene-{index // 2}", "seed": index}
        )


def full(trial: Trial) -> Trial:
    """With everything that a run of today records."""
    rng = random.Random(trial.seed)  # noqa: S311
    demands = {
        name: Demand(tokens=tokens, generated=2, seconds=round(rng.uniform(0.004, 0.009), 6))
        for name, tokens in (
            ("clean_full", 144), ("clean_compressed", 36),
            ("attacked_full", 144), ("attacked_compressed", 36),
        )
    }  # fmt: skip
    effort = Effort(forwards=31, backwards=30, queries=0)
    return trial.model_copy(update={"demands": Demands(**demands), "effort": effort})


if __name__ == "__main__":
    main()
