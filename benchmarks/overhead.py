"""What share of a run is spent outside the model.

``python benchmarks/overhead.py`` runs the quickstart (or another scenario) in this process, with a
clock around every call into the target: answers, rankings, gradients. The rest is the tool:
start-up, loading, drawing and saving pictures, the ledger, metrics, the report.

Outside the model means outside ``LVLM.answer`` and outside the attack's call; the attack's own
arithmetic (losses, projection) is counted to the attack and given apart.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenario", default="scenarios/quickstart.yaml")
    parser.add_argument("--limit", type=int, default=None, help="samples; default: all")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overhead.json"))
    arguments = parser.parse_args()

    import torch

    from attacks.base import Attack
    from redteam import cli
    from targets.lvlm import LVLM
    from targets.passes import Passes

    clock = Clock()
    clock.wrap(LVLM, "answer", "answers")
    clock.wrap(LVLM, "load", "loading the model")
    clock.wrap(Attack, "__call__", "attacks")
    for name in ("rank", "nll", "answer_logprobs", "full_and_rank", "encode"):
        clock.wrap(Passes, name, "forward passes inside attacks")
    imports = time.perf_counter() - STARTED
    with tempfile.TemporaryDirectory() as folder:
        words = ["run", arguments.scenario, "--out", str(Path(folder) / "run")]
        if arguments.limit is not None:
            words += ["--limit", str(arguments.limit)]
        sys.argv = ["redteam", *words]
        begin = time.perf_counter()
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        wall = time.perf_counter() - begin
    model = clock.seconds["answers"] + clock.seconds["attacks"]
    result = {
        "command": "python benchmarks/overhead.py",
        "scenario": arguments.scenario,
        "limit": arguments.limit,
        "exit_code": code,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": {
            "imports": round(imports, 2),
            "wall after imports": round(wall, 2),
            **{k: round(v, 2) for k, v in sorted(clock.seconds.items())},
        },
        "share_outside_answers_and_attacks": round(1 - model / wall, 4),
        "share_outside_with_imports": round(1 - model / (wall + imports), 4),
    }
    text = json.dumps(result, indent=1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


class Clock:
    """Adds up wall time by name; nested calls of one name count once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: set[str] = set()

    def wrap(self, owner: type, attribute: str, name: str) -> None:
        """Time every call of a method of a class."""
        raw = owner.__dict__[attribute]
        is_class = isinstance(raw, classmethod)
        function: Callable[..., Any] = raw.__func__ if is_class else raw
        self.seconds.setdefault(name, 0.0)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if name in self._open:
                return function(*args, **kwargs)
            self._open.add(name)
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - begin
                self._open.discard(name)

        setattr(owner, attribute, classmethod(timed) if is_class else timed)


if __name__ == "__main__":
    main()
