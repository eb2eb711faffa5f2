"""What early exit saves: attacks on the answer with and without `stop_when_broken`.

``python benchmarks/early_exit.py`` attacks validation samples of the scenes LVLM that it answers
right on both paths, on one machine in one run, each attack with and without early exit in turns.
Printed are the ratio of seconds, of forward passes and of gradients, the questions that early exit
asks, and the attack success rate of both, judged by the target's own answers to the 8-bit images.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from attack_steps import validation_batch

from attacks.apgd import APGD
from attacks.base import AttackResult
from attacks.goal import Judge
from attacks.pgd import PGD
from targets.base import Batch, Knowledge
from targets.compression.fastv import FastV
from targets.lvlm import LVLM
from targets.scenes import WEIGHTS


@dataclass(frozen=True, slots=True)
class Case:
    """One attack, and when it has succeeded."""

    attack: PGD | APGD
    aim: Any


def cases(steps: int) -> dict[str, Case]:
    """By name."""
    through: dict[str, Any] = {"path": "compressed"}
    return {
        "pgd full": Case(PGD(steps=steps), "full"),
        "pgd compressed": Case(PGD(steps=steps, **through), "compressed"),
        "pgd both": Case(PGD(steps=steps, path="both"), "both"),
        "pgd sparing": Case(PGD(steps=steps, preserve_weight=1.0, **through), "compression_only"),
        "apgd compressed, margin": Case(APGD(steps=steps, loss="margin", **through), "compressed"),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", default="scenes-a")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--epsilon", type=float, default=8, help="in levels of 1/255")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/early_exit.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    target = LVLM.load(WEIGHTS / arguments.checkpoint, device=arguments.device)
    view: Any = target.view(Knowledge.WHITE_BOX, FastV(layer=2, retention=0.25))
    batch = validation_batch(arguments.samples, arguments.device)
    left = Judge(view, "compressed").open(batch) & Judge(view, "full").open(batch)
    batch = batch.rows(left.nonzero()[:, 0].tolist())
    seeds = [arguments.seed * 1000 + row for row in range(len(batch.ids))]
    result = {
        "command": "python " + " ".join(sys.argv),
        "checkpoint": arguments.checkpoint,
        "split": "validation",
        "compression": "fastv, layer 2, retention 0.25",
        "samples": len(batch.ids),
        "steps": arguments.steps,
        "epsilon": f"{arguments.epsilon:g}/255",
        "seed": arguments.seed,
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "device": arguments.device
        if arguments.device == "cpu"
        else torch.cuda.get_device_name(arguments.device),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "attacks": {
            name: _compared(case, view, batch, arguments.epsilon / 255, seeds, arguments.repeats)
            for name, case in cases(arguments.steps).items()
        },
    }
    text = json.dumps(result, indent=1, ensure_ascii=False)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def _compared(
    case: Case,
    view: Any,
    batch: Batch,
    epsilon: float,
    seeds: list[int],
    repeats: int,
) -> dict[str, float]:
    """One attack both ways, in turns."""
    times: dict[bool, list[float]] = {False: [], True: []}
    results: dict[bool, AttackResult] = {}
    replace(case.attack, steps=1)(view, batch, epsilon, seeds)  # warms up
    for _ in range(repeats):
        for stop in (False, True):
            attack = replace(case.attack, stop_when_broken=stop)
            start = time.perf_counter()
            results[stop] = attack(view, batch, epsilon, seeds)
            if batch.images.is_cuda:
                torch.cuda.synchronize()
            times[stop].append(time.perf_counter() - start)
    judge = Judge(view, case.aim)
    broken = {
        stop: float(judge.broken(replace(batch, images=found.images)).float().mean())
        for stop, found in results.items()
    }
    before, after = (statistics.median(times[stop]) for stop in (False, True))
    return {
        "seconds without": round(before, 3),
        "seconds with": round(after, 3),
        "seconds with ÷ without": round(after / before, 3),
        "forwards with ÷ without": round(results[True].forwards / results[False].forwards, 3),
        "gradients with ÷ without": round(results[True].backwards / results[False].backwards, 3),
        "questions a sample": results[True].queries,
        "success without": round(broken[False], 3),
        "success with": round(broken[True], 3),
    }


if __name__ == "__main__":
    main()
