# ruff: noqa: E501 - sentences of a page
"""Make docs/sizing.md, what a real audit takes: ``python benchmarks/sizing.py``.

Measured here, on the embedded LVLM: what a gradient step and an answer cost in units of one forward
pass with all tokens. Computed: that forward pass on a 7B model, from its multiply-accumulates and an
assumed share of a GPU's peak. Nothing was run on a 7B model; the page says so.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from targets.costs import Dimensions, prefill_macs

PAGE: Final = Path("docs/sizing.md")
STEPS: Final = Path("benchmarks/results/attack_steps.json")
LLAVA: Final = Dimensions(
    width=4096, query_width=4096, key_width=4096, inner=11008, gated=True, layers=32
)
COLUMNS: Final = 576 + 64
"""Visual tokens and a short question of LLaVA-1.5."""
TOWER_MACS: Final = 0.19e12
"""Of CLIP ViT-L/14 at 336 pixels. [computed: 24 layers of width 1024 on 577 tokens]"""
PEAK: Final = 989e12
"""FLOP/s of an H100 in bf16, dense, by its data sheet."""
SHARE: Final = 0.35
"""Share of the peak that a forward pass reaches at a good batch. [assumed]"""
SAMPLES, COMPRESSORS, DEFENSES, BUDGETS = 1_000, 10, 5, 1
RETENTION: Final = 0.25

ATTACKS: Final = {
    # name: attacks of that kind, gradients each, step in units of a PGD step, runs per compressor?
    "noise and other controls": (2, 0, 0.0, False),
    "PGD, APGD and the like, all tokens": (4, 100, 1.0, False),
    "PGD, APGD through the compressor": (4, 100, 1.0, True),
    "CAA and its kind, ranking alone": (4, 100, "CAA on FastV K=2 ÷ PGD on the full path", True),
    "CAA preserving the full path": (3, 100, "CAA preserving the full path, FastV ÷ PGD", True),
    "attacks on the tower (FATA, CIRA, VEAttack)": (3, 100, "VEAttack", False),
}


def main() -> None:
    """Measure, compute, write."""
    measured = measure()
    PAGE.write_text(page(measured), encoding="utf-8")
    print(f"written: {PAGE}")


def measure(samples: int = 8, repeats: int = 5) -> dict[str, float]:
    """A PGD step and an answer in units of a forward pass with all tokens."""
    from attacks.pgd import PGD
    from redteam.batching import Batcher
    from redteam.calibrating import batch_of
    from redteam.evaluation import Asker, Shot
    from redteam.scenario import load_limited

    scenario = load_limited("scenarios/quickstart.yaml", [], samples)
    data = scenario.dataset.create().open()
    target = scenario.targets[0].create().load("cpu")
    asker = Asker(target, Batcher(samples), 0, 16)
    shots = {i: Shot(data[i], data[i].image, "") for i in range(samples)}
    images = asker.images(list(shots.values()))
    batch = batch_of([shot.sample for shot in shots.values()], images)
    seeds = list(range(samples))

    def steps(count: int) -> Callable[[], object]:
        attack = PGD(steps=count)
        view = target.view(attack.needs, None, max_new_tokens=16)
        return lambda: attack(view, batch, 8 / 255, seeds)

    @torch.no_grad()
    def forward() -> None:
        view = target.view(PGD().needs, None, max_new_tokens=16)
        view.answer_nll(batch.images, batch.questions, batch.answers)

    few, many = _seconds(steps(2), repeats), _seconds(steps(8), repeats)
    one = _seconds(forward, repeats)
    answer = _seconds(lambda: asker.ask(shots, None, scenario.defenses[0], "x"), repeats)
    return {"step": (many - few) / 6 / one, "answer": answer / one}


def _seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def forward_seconds() -> float:
    """One picture through the tower and all tokens through the language model, on an H100."""
    macs = prefill_macs([COLUMNS] * LLAVA.layers, LLAVA) + TOWER_MACS
    return 2 * macs / (PEAK * SHARE)


def hours(measured: dict[str, float]) -> dict[str, tuple[float, float]]:
    """GPU-hours by kind of attack: making the images, and answering about them."""
    ratios = json.loads(STEPS.read_text(encoding="utf-8"))
    milliseconds = ratios["milliseconds_per_image"]
    tower = milliseconds["veattack"] / milliseconds["pgd full"]
    unit = forward_seconds() / 3600
    answer = measured["answer"]
    compressed = answer * (1 + RETENTION) / 2  # between all tokens and a quarter of them
    found = {}
    for name, (number, gradients, cost, each) in ATTACKS.items():
        relative = tower if cost == "VEAttack" else ratios["ratios"].get(cost, cost)
        runs = number * (COMPRESSORS if each else 1) * BUDGETS
        making = runs * gradients * measured["step"] * float(relative) * SAMPLES * unit
        full = runs * answer
        through = number * COMPRESSORS * BUDGETS * (1 + DEFENSES) * compressed
        found[name] = making, (full + through) * SAMPLES * unit
    return found


def page(measured: dict[str, float]) -> str:
    """The page."""
    rows = hours(measured)
    making, answering = (sum(one[i] for one in rows.values()) for i in (0, 1))
    kinds = sum(int(one[0]) for one in ATTACKS.values())
    lines = [
        "# What a real audit takes",
        "",
        "Made by `python benchmarks/sizing.py`; do not edit.",
        "",
        "**Nothing here was run on a 7B model.** Measured on the embedded LVLM (CPU, one thread, "
        f"batch 8, median of 5): a PGD step costs {measured['step']:.2f} forward passes with all "
        f"tokens, an answer {measured['answer']:.2f}; what a step of the other attacks costs in PGD "
        "steps is from `benchmarks/results/attack_steps.json`. Computed: a forward pass of "
        f"LLaVA-1.5-7B on {COLUMNS} columns, {1000 * forward_seconds():.0f} ms a picture on one H100, "
        f"if a batch reaches {SHARE:.0%} of its {PEAK / 1e12:.0f} bf16 TFLOP/s, which is an "
        "assumption. Time an hour of your own first: `redteam run SCENARIO --limit 8 --profile`, and "
        "`redteam plan SCENARIO` counts steps and answers.",
        "",
        f"{SAMPLES:,} samples, {kinds} attacks at one budget with 100 gradients, {COMPRESSORS} "
        f"compressors that keep {RETENTION:.0%}, {DEFENSES} defences that cost nothing themselves and "
        "the control; attacks do not adapt to the defences:",
        "",
        "| attacks | how many | H100-hours making images | H100-hours answering |",
        "|---|---|---|---|",
        *(
            f"| {name} | {ATTACKS[name][0]} | {one[0]:.1f} | {one[1]:.1f} |"
            for name, one in rows.items()
        ),
        f"| **together** | {kinds} | **{making:.0f}** | **{answering:.0f}** |",
        "",
        "## How it grows",
        "",
        *growth(making, answering),
    ]
    return "\n".join(lines) + "\n"


def growth(making: float, answering: float) -> list[str]:
    """One line for each axis."""
    return [
        "| twice as many … | making images | answering | because |",
        "|---|---|---|---|",
        "| samples | × 2 | × 2 | nothing is shared between pictures |",
        "| attacks | × 2 | × 2 | clean answers are shared, and they are few |",
        "| budgets | × 2 | × 2 | clean answers are shared |",
        "| gradient steps | × 2 | × 1 | |",
        "| compressors | up to × 2 | × 2 | attacks that do not know the compressor make one image "
        "for all of them |",
        f"| defences | × 1 | up to × {(1 + 2 * DEFENSES) / (1 + DEFENSES):.1f} | one image serves "
        "all defences |",
        f"| defences, with `adaptive: true` | × 2 | × 2 | an adaptive attack is made anew against each: "
        f"{DEFENSES} of them take the {making:.0f} hours to {making * (1 + DEFENSES):.0f} |",
        "",
        "What to leave out first: attacks through the compressor that do not spare the full path say "
        "little about compression, and steps beyond the point where twice as many break no more (rule "
        "9 of [the honesty gate](defenses.md)) say nothing. With Ray ([engine](engine.md)) the hours "
        "divide by the number of GPUs.",
    ]


if __name__ == "__main__":
    main()
