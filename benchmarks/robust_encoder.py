"""The hardened scenes tower under attacks on its own weights, beside the original under the same.

    python benchmarks/robust_encoder.py --samples 300 --out evaluation.json

Every attack is white-box on the weights it is measured on (adaptive), through the compressor it
attacks. Figures go to a JSON file. A sample counts if the model answers it right when clean, with
all tokens and compressed; *CSFR* is the share of these that fail through the compressor only, *ASR*
the share that fail through it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attacks.base import Attack
from attacks.caa import CAA
from attacks.margin_split import MarginSplit
from attacks.pgd import PGD
from defenses.robust_encoder import RobustEncoder
from targets.base import Batch
from targets.compression.base import Compressor
from targets.compression.fastv import FastV
from targets.compression.visionzip import VisionZip
from targets.lvlm import LVLM
from targets.scenes import load_scenes, world

ATTACKS: dict[str, Callable[[], Attack]] = {
    "caa-50": lambda: CAA(
        preset="strict_preserve",
        ranking="score_gap",
        intra="none",
        erase_weight=0,
        query_weight=0,
        preserve_weight=0.5,
        steps=50,
    ),
    "pgd-compressed-20": lambda: PGD(path="compressed", steps=20),
    "margin_split-40": lambda: MarginSplit(steps=40),
    "margin_split-90": lambda: MarginSplit(steps=90),
}
COMPRESSORS: dict[str, Compressor] = {
    "FastV K=2, 25 %": FastV(layer=2, retention=0.25),
    "VisionZip, 25 %": VisionZip(retention=0.25),
}


def batch_of(split: world.Split, count: int, start: int) -> Batch:
    """Samples as an attack gets them, one question a picture."""
    samples = world.samples(split, count, start=start)
    images = torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2) / 255
    return Batch(
        tuple(s.id for s in samples),
        images,
        tuple(s.question for s in samples),
        tuple(s.answer for s in samples),
    )


def right(model: LVLM, images: Tensor, batch: Batch, compressor: Compressor | None) -> Tensor:
    """Which answers are right, bool ``[B]``."""
    texts = model.answer(images, batch.questions, compressor=compressor).texts
    return torch.tensor([a == b for a, b in zip(texts, batch.answers, strict=True)])


def measure(
    model: LVLM, batch: Batch, clean: tuple[Tensor, Tensor], name: str, through: str, level: int
) -> dict[str, Any]:
    """One attack at level/255 through one compressor."""
    started = time.perf_counter()
    attack, compressor = ATTACKS[name](), COMPRESSORS[through]
    seeds = list(range(len(batch.images)))
    made = attack(model.view(attack.needs, compressor), batch, level / 255, seeds).images
    images = (made * 255).round() / 255
    full, compressed = right(model, images, batch, None), right(model, images, batch, compressor)
    eligible = clean[0] & clean[1]
    count = max(int(eligible.sum()), 1)
    return {
        "attack": name,
        "compression": through,
        "epsilon": level,
        "eligible": int(eligible.sum()),
        "full": float(full.float().mean()),
        "compressed": float(compressed.float().mean()),
        "csfr": int((eligible & full & ~compressed).sum()) / count,
        "asr": int((eligible & ~compressed).sum()) / count,
        "full_asr": int((eligible & ~full).sum()) / count,
        "seconds": round(time.perf_counter() - started),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Attack the hardened scenes tower on its weights.")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--split", choices=world.SPLITS, default="test")
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--clean", type=int, default=1000, help="samples of clean accuracy")
    parser.add_argument("--epsilons", type=int, nargs="+", default=[4, 8, 16], help="in 1/255")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--weights", default="scenes-a-ranking")
    parser.add_argument("--models", nargs="+", default=["original", "hardened"])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    original = load_scenes("scenes-a")
    models = {"original": original}
    if "hardened" in arguments.models:
        models["hardened"] = RobustEncoder(weights=arguments.weights).harden(original)
    batch = batch_of(arguments.split, arguments.samples, arguments.start)
    many = batch_of(arguments.split, arguments.clean, arguments.start)
    found: dict[str, Any] = {
        "split": arguments.split,
        "start": arguments.start,
        "samples": arguments.samples,
        "clean_samples": arguments.clean,
        "torch": torch.__version__.split("+")[0],
        "clean": {},
        "rows": [],
    }
    for label in arguments.models:
        model = models[label]
        found["clean"][label] = {
            name: round(float(right(model, many.images, many, one).float().mean()), 4)
            for name, one in {"all tokens": None, **COMPRESSORS}.items()
        }
        print(label, found["clean"][label], flush=True)
        whole = right(model, batch.images, batch, None)
        clean = {
            name: (whole, right(model, batch.images, batch, one))
            for name, one in COMPRESSORS.items()
        }
        for level in arguments.epsilons:
            for name in arguments.attacks:
                for through in COMPRESSORS:
                    row = measure(model, batch, clean[through], name, through, level)
                    found["rows"].append({"model": label} | row)
                    print(label, row, flush=True)
                    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
