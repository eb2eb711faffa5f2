"""Start runs that leave by `os._exit` at their n-th write: ``exit_at_write.py PLACE N...``.

Writes the exit codes to standard output, as JSON by N; the run folders are called ``gone N``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import forked
from faults import Faults, injected
from workplace import Workplace

import reports.artefacts


def gone(place: Workplace, at: str) -> int:
    """Exit code of a run that leaves at a write."""
    faults = Faults(int(at), die=lambda: os._exit(99))
    name = f"gone {at}"
    pid = forked.start(
        place,
        "run", "scenario.yaml", "--out", name,
        log=place.folder / f"{name}.log",
        within=lambda: injected(faults),
    )  # fmt: skip
    return forked.wait(pid)


if __name__ == "__main__":
    forked.warm()
    reports.artefacts._THREADS = 1
    where = Workplace(Path(sys.argv[1]))
    json.dump({at: gone(where, at) for at in sys.argv[2:]}, sys.stdout)
