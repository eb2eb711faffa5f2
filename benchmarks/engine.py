"""What the engine costs and saves: ``python benchmarks/engine.py [--only overhead sweep …]``.

- *overhead*: share of a run's time, loading and report aside, that is neither model nor attack;
  from ``redteam run --profile`` on the quickstart.
- *loop*: images a second of our engine against a plain transformers loop (``generate`` on clean and
  attacked images, with all tokens) that answers the same questions, at batch one and at our batch.
- *sweep*: one run over R budgets against R runs of one budget each, loading aside.
- *retentions*: one run over six retentions, whose attack does not know them, against six runs.
- *shared*: answers of one unit through six compressions, the vision tower run once for all of them
  against once for each.
- *ray*: Ray with two workers against one, one thread each; starting Ray and loading aside.
- *start*: seconds of ``redteam --help``, best of five, and whether torch was imported.
- *growth*: seconds of a unit as the number of samples, attacks, budgets and pixels grows, and peak
  memory of the process as the ledger grows.

Everything of one part is measured in one process, one after the other; ratios are what to read.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

OUT: Final = Path("benchmarks/results/engine.json")
PLOT: Final = Path("docs/results/engine-growth.svg")
SCENARIO: Final = "scenarios/quickstart.yaml"
BUDGETS: Final = tuple(f"{n}/255" for n in (1, 2, 4, 8, 12, 16))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=sorted(PARTS), default=sorted(PARTS))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name in arguments.only:
        print(f"{name} …", file=sys.stderr)
        found[name] = {
            "command": f"python benchmarks/engine.py --only {name} --samples {arguments.samples}",
            **_machine(arguments.device),
            **PARTS[name](arguments.samples, arguments.device),
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({name: found[name]}, indent=1))


def _machine(device: str) -> dict[str, Any]:
    import torch

    return {
        "device": device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu"),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


class _Silent:
    """Watches nothing, and keeps the time of the units."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0

    def prepared(self, folder: Path, units: list[Any], resumed: int) -> None:
        del folder, units, resumed
        self.began = self.ended = time.perf_counter()

    def finished(self, unit: Any, trials: list[Any]) -> None:
        del unit, trials
        self.ended = time.perf_counter()

    def working(self, event: Any) -> None:
        del event

    def say(self, message: str) -> None:
        del message


def _run(overrides: Sequence[str], samples: int, *, profile: bool = False) -> tuple[float, Any]:
    """Seconds of the units of a run, and its profile."""
    from redteam.profiling import Profile
    from redteam.runner import run
    from redteam.scenario import load_limited

    scenario = load_limited(SCENARIO, ["checks.repeat=0", *overrides], samples)
    watch, clocks = _Silent(), Profile() if profile else None
    with tempfile.TemporaryDirectory() as folder:
        if clocks is None:
            run(scenario, Path(folder) / "run", watch)
        else:
            with clocks:
                run(scenario, Path(folder) / "run", watch, profile=clocks)
    return watch.ended - watch.began, None if clocks is None else clocks.as_json()


def overhead(samples: int, device: str) -> dict[str, Any]:
    """Share of the time that is the tool's own."""
    batch = min(samples, 32)
    given = [f"engine.device={device}", f"engine.batch_size={batch}"]
    _run(given, 4)  # the first run of a process imports and warms up
    _, found = _run(given, samples, profile=True)
    return {"samples": samples, "batch": batch, **found}


def loop(samples: int, device: str) -> dict[str, Any]:
    """Answers with all tokens: ours, and a plain loop at two batch sizes."""
    import torch

    from redteam.batching import Batcher
    from redteam.evaluation import Asker, Shot
    from redteam.scenario import load_limited

    scenario = load_limited(SCENARIO, [f"engine.device={device}"], samples)
    data = scenario.dataset.create().open()
    target = scenario.targets[0].create().load(device)
    batch = min(samples, 32)
    asker = Asker(target, Batcher(batch), scenario.seed, scenario.answers.max_new_tokens)
    shots = {i: Shot(data[i], data[i].image, "") for i in range(samples)}
    images = asker.images(list(shots.values()))
    questions = [shot.sample.question for shot in shots.values()]

    def plain(size: int) -> Callable[[], None]:
        def answer() -> None:
            with torch.no_grad():
                for start in range(0, samples, size):
                    part = slice(start, start + size)
                    target.answer(images[part], questions[part])

        return answer

    def ours() -> None:
        asker.ask(shots, None, scenario.defenses[0], "benchmark")

    seconds = _interleaved(
        {"plain, batch 1": plain(1), "plain, our batch": plain(batch), "ours": ours}
    )
    return {
        "samples": samples,
        "batch": batch,
        "images_per_second": {name: round(samples / took, 2) for name, took in seconds.items()},
        "ours ÷ plain at batch 1": round(seconds["plain, batch 1"] / seconds["ours"], 2),
        "ours ÷ plain at our batch": round(seconds["plain, our batch"] / seconds["ours"], 2),
    }


def _interleaved(runs: dict[str, Callable[[], None]], repeats: int = 5) -> dict[str, float]:
    """Median seconds of each, taken in turns after one warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, call in runs.items():
            started = time.perf_counter()
            call()
            if repeat:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


def sweep(samples: int, device: str) -> dict[str, Any]:
    """One run of all budgets against a run each."""
    return {"budgets": len(BUDGETS), **_swept("epsilons", BUDGETS, samples, device)}


def _swept(
    key: str, choices: Sequence[str], samples: int, device: str, *more: str
) -> dict[str, Any]:
    """One run over all choices of a key against a run for each; images of a cheap attack."""
    attacks = "attacks=[{type: noise}, {type: pgd, steps: 4}]"
    fixed = [attacks, f"engine.device={device}", f"engine.batch_size={min(samples, 32)}", *more]
    _run([*fixed, f"{key}=[{choices[0]}]"], 2)  # the first run of a process imports and warms up
    together, _ = _run([*fixed, f"{key}=[{', '.join(choices)}]"], samples)
    apart = [_run([*fixed, f"{key}=[{one}]"], samples)[0] for one in choices]
    return {
        "samples": samples,
        "seconds_together": round(together, 2),
        "seconds_apart": [round(one, 2) for one in apart],
        "together ÷ apart": round(together / sum(apart), 3),
    }


def retentions(samples: int, device: str) -> dict[str, Any]:
    """One run through all compressions against a run each; one image serves all of them."""
    shares = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    options = [f"{{type: fastv, layer: 2, retention: {share}}}" for share in shares]
    found = _swept("compressions", options, samples, device, "epsilons=[8/255]")
    return {"retentions": list(shares), **found}


def shared(samples: int, device: str) -> dict[str, Any]:
    """A run that mostly answers, with and without what the vision tower remembers."""
    import contextlib

    import targets.remembering as memory

    kinds = ("fastv", "visionzip", "hiprune", "divprune", "random", "fastervlm")
    options = ", ".join(f"{{type: {kind}, retention: 0.25}}" for kind in kinds)
    given = ["attacks=[{type: noise}]", f"compressions=[{options}]", "epsilons=[8/255]"]
    given += [f"engine.device={device}", f"engine.batch_size={min(samples, 32)}"]
    remembering = memory.remembering

    def once(*, apart: bool) -> None:
        memory.remembering = (  # type: ignore[assignment]
            (lambda families: contextlib.nullcontext()) if apart else remembering
        )
        _run(given, samples)

    try:
        took = _interleaved(
            {"once": lambda: once(apart=False), "each": lambda: once(apart=True)}, repeats=3
        )
    finally:
        memory.remembering = remembering
    return {
        "samples": samples,
        "compressions": list(kinds),
        "seconds": {name: round(value, 2) for name, value in took.items()},
        "once ÷ each": round(took["once"] / took["each"], 3),
    }


def ray(samples: int, device: str) -> dict[str, Any]:
    """Two workers against one."""
    cores = os.cpu_count() or 1
    taken: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(2):
        for workers in (1, 2):
            engine = f"engine={{type: ray, workers: {workers}, batch_size: 8, device: {device}}}"
            taken[workers].append(_run([engine], samples)[0])
    one, two = (min(taken[workers]) for workers in (1, 2))
    return {
        "samples": samples,
        "seconds": {str(workers): [round(t, 2) for t in times] for workers, times in taken.items()},
        "two workers ÷ one": round(two / one, 3),
        "note": f"{cores} cores; a lone worker has all of them, each of two has half",
    }


def start(samples: int, device: str) -> dict[str, Any]:
    """Start-up of the command line."""
    del samples, device
    command = [sys.executable, "-m", "redteam", "--help"]
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)  # noqa: S603
        taken.append(time.perf_counter() - began)
    script = (
        "import sys, contextlib, io\nfrom redteam.cli import app\nsys.argv=['redteam','--help']\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): app()\n"
        "print('torch' in sys.modules)"
    )
    shown = subprocess.run(  # noqa: S603
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    return {
        "seconds": [round(one, 3) for one in taken],
        "best": round(min(taken), 3),
        "imports_torch": shown.stdout.strip() == "True",
    }


def growth(samples: int, device: str) -> dict[str, Any]:
    """Seconds along each axis, and memory as the ledger grows."""
    fixed = [f"engine.device={device}", "engine.batch_size=8"]
    noise, pgd = "{type: noise}", "{type: pgd, steps: 2}"
    _run([*fixed, f"attacks=[{noise}]"], 2)

    def seconds(count: int, attacks: str, budgets: int = 1) -> float:
        epsilons = ", ".join(BUDGETS[:budgets])
        given = [*fixed, f"attacks=[{attacks}]", f"epsilons=[{epsilons}]"]
        return round(statistics.median(_run(given, count)[0] for _ in range(3)), 2)

    few = max(8, samples // 4)
    # Attacks alike share their images, so these differ.
    named = [f"{{type: pgd, steps: 2, momentum: {i / 10}, name: p{i}}}" for i in range(4)]
    found: dict[str, Any] = {
        "samples": {n: seconds(n, pgd) for n in (few, 2 * few, 4 * few)},
        "attacks": {n: seconds(few, ", ".join(named[:n])) for n in (1, 2, 4)},
        "budgets": {n: seconds(few, pgd, n) for n in (1, 2, 4, 6)},
    }
    peaks = {}
    for n in (few, 4 * few, 16 * few):
        _run([*fixed, f"attacks=[{noise}]"], n)
        peaks[n * 4] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    result = {"seconds": found, "peak_MiB_by_trials": peaks}
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    PLOT.write_text(drawn({**found, "trials (MiB of memory)": peaks}), encoding="utf-8")
    return result


def drawn(axes: dict[str, dict[int, float]]) -> str:
    """Panels side by side as SVG: what is counted across, seconds (or MiB) upwards, from 0."""
    panels = []
    for place, (name, points) in enumerate(axes.items()):
        wide, high = max(points), max(points.values())
        spots = [(20 + 160 * x / wide, 150 - 120 * y / high) for x, y in points.items()]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        marks = "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/><text x="{x:.1f}" y="{y - 8:.1f}" '
            f'text-anchor="middle">{value:g}</text><text x="{x:.1f}" y="166" '
            f'text-anchor="middle">{count}</text>'
            for (x, y), (count, value) in zip(spots, points.items(), strict=True)
        )
        panels.append(
            f'<g transform="translate({place * 210} 0)"><path d="M20 20V150H190" fill="none" '
            f'stroke="#888"/><polyline points="{line}" fill="none" stroke="#1667b7" '
            f'stroke-width="2"/>{marks}<text x="100" y="185" text-anchor="middle">{name}</text></g>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {210 * len(axes)} 200" '
        'font-family="sans-serif" font-size="11"><title>Seconds of a run along each axis, and '
        f"memory</title><rect width='100%' height='100%' fill='#fff'/>{''.join(panels)}</svg>\n"
    )


PARTS: Final[dict[str, Callable[[int, str], dict[str, Any]]]] = {
    "overhead": overhead,
    "loop": loop,
    "sweep": sweep,
    "retentions": retentions,
    "shared": shared,
    "ray": ray,
    "start": start,
    "growth": growth,
}

if __name__ == "__main__":
    main()
