"""Measure a scenes checkpoint and write its card: ``python -m targets.scenes.evaluate DIR``.

Everything goes through `LVLM.answer`, the road every scenario takes; nothing of the training code
is used. The figures are written to ``evaluation.json`` and, with the recipe, into the model card
``README.md`` beside the weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from targets.scenes import world

if TYPE_CHECKING:
    from targets.compression.base import Compressor
    from targets.lvlm import LVLM

QUARTER: Final = 0.25
NINTH: Final = 16 / 144
NOISE: Final = 8 / 255


@dataclass(frozen=True, slots=True)
class Score:
    """Right answers of a setting: overall and by kind, as (right, asked)."""

    by_kind: dict[str, tuple[int, int]]

    @property
    def accuracy(self) -> float:
        """Share of right answers over all kinds."""
        right, asked = (sum(v[i] for v in self.by_kind.values()) for i in (0, 1))
        return right / asked


def settings(late: int) -> dict[str, Compressor | None]:
    """The compressors a card reports, by name; `late` is the layer FastV is meant for."""
    from targets.compression.divprune import DivPrune
    from targets.compression.fastv import FastV
    from targets.compression.random import Random
    from targets.compression.uniform import Uniform
    from targets.compression.visionzip import VisionZip

    out: dict[str, Compressor | None] = {"full tokens": None}
    for label, retention in (("25 %", QUARTER), ("11 %", NINTH)):
        out |= {
            f"FastV K={late}, {label}": FastV(layer=late, retention=retention),
            f"FastV K=1, {label}": FastV(layer=1, retention=retention),
            f"VisionZip, {label}": VisionZip(retention=retention),
            f"DivPrune, {label}": DivPrune(retention=retention),
            f"uniform, {label}": Uniform(retention=retention),
            f"random before the LLM, {label}": Random(retention=retention),
            f"random at K={late}, {label}": Random(layer=late, retention=retention),
        }
    return out


def measure(
    target: LVLM,
    samples: Sequence[world.SceneSample],
    compressor: Compressor | None,
    *,
    noise: float = 0.0,
    batch: int = 64,
) -> Score:
    """Answer every sample and count.

    Args:
        target: the loaded checkpoint.
        samples: what to ask.
        compressor: None for full tokens.
        noise: amplitude of uniform pixel noise in [0, 1], rounded to 8 bits; seeded by place.
        batch: samples a pass.
    """
    counts = {kind: [0, 0] for kind in world.KINDS}
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        images = torch.from_numpy(np.stack([s.image for s in part])).permute(0, 3, 1, 2) / 255
        if noise:
            images = _noisy(images, noise, start)
        answered = target.answer(
            images,
            [s.question for s in part],
            compressor=compressor,
            seeds=list(range(start, start + len(part))),
        )
        for sample, text in zip(part, answered.texts, strict=True):
            counts[sample.kind][0] += text.strip() == sample.answer
            counts[sample.kind][1] += 1
    return Score({kind: (right, asked) for kind, (right, asked) in counts.items() if asked})


def _noisy(images: Tensor, amplitude: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(images.shape, generator=generator) * 2 - 1
    return ((images + amplitude * noise).clamp(0, 1) * 255).round() / 255


def evaluate(folder: Path, split: world.Split, questions: int, late: int) -> dict[str, Any]:
    """All settings of a checkpoint folder on the first `questions` questions of a split."""
    from targets.lvlm import LVLM

    target = LVLM.load(folder)
    samples = world.samples(split, questions, questions_per_image=len(world.KINDS))
    scores: dict[str, Score] = {}
    for name, compressor in settings(late).items():
        scores[name] = measure(target, samples, compressor)
        sys.stdout.write(f"{name:32s} {scores[name].accuracy:.4f}\n")
        sys.stdout.flush()
    noisy = measure(target, samples, None, noise=NOISE)
    scores["full tokens, uniform noise 8/255"] = noisy
    return {
        "split": split,
        "questions": len(samples),
        "images": len({s.image_id for s in samples}),
        "late": late,
        "torch": torch.__version__.split("+")[0],
        "machine": platform.machine(),
        "accuracy": {name: round(s.accuracy, 4) for name, s in scores.items()},
        "by_kind": {name: s.by_kind for name, s in scores.items()},
        "acceptance": acceptance({n: s.accuracy for n, s in scores.items()}, scores, late),
    }


def acceptance(
    accuracy: dict[str, float], scores: dict[str, Score], late: int
) -> list[dict[str, Any]]:
    """What the checkpoint must reach, each with the figure and whether it does."""
    full = accuracy["full tokens"]
    worst = min(right / asked for right, asked in scores["full tokens"].by_kind.values())
    fastv, zipped = accuracy[f"FastV K={late}, 25 %"], accuracy["VisionZip, 25 %"]
    before, inside = accuracy["random before the LLM, 25 %"], accuracy[f"random at K={late}, 25 %"]
    noisy = accuracy["full tokens, uniform noise 8/255"]
    rows = [
        ("full tokens, all kinds", full, ">=", 0.90),
        ("full tokens, worst kind", worst, ">=", 0.80),
        (f"FastV K={late} at 25 % over full", fastv / full, ">=", 0.95),
        ("VisionZip at 25 % over full", zipped / full, ">=", 0.95),
        ("random before the LLM at 25 % over full", before / full, "<=", 0.80),
        (f"random at K={late} minus random before the LLM, 25 %", inside - before, "<=", 0.08),
        ("uniform noise 8/255 over clean, full tokens", noisy / full, ">=", 0.95),
    ]
    return [
        {
            "what": what,
            "value": round(value, 4),
            "limit": f"{sign} {limit}",
            "reached": value >= limit if sign == ">=" else value <= limit,
        }
        for what, value, sign, limit in rows
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure a scenes checkpoint.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=world.SPLITS, default="test")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--late", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write evaluation.json and the card")
    arguments = parser.parse_args()
    result = evaluate(arguments.folder, arguments.split, arguments.questions, arguments.late)
    for row in result["acceptance"]:
        mark = "reached" if row["reached"] else "MISSED"
        sys.stdout.write(f"{row['what']:52s} {row['value']:.4f} {row['limit']:8s} {mark}\n")
    if arguments.write:
        from targets.scenes.card import write_card

        path = arguments.folder / "evaluation.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(f"written: {path}, {write_card(arguments.folder)}\n")


if __name__ == "__main__":
    main()
