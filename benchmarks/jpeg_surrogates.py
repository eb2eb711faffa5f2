"""Is an attack through a differentiable JPEG stronger than one through the identity?

Runs PGD on the compressed answer of the scenes LVLM behind `art.JpegCompression`, once for each
backward pass, on the validation split: ``python benchmarks/jpeg_surrogates.py --samples 64``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from attacks.pgd import PGD
from defenses.adaptive import defended
from defenses.art_preprocessors import JpegCompression
from redteam.datasets.base import Sample, is_correct
from redteam.datasets.scenes import Scenes
from redteam.pictures import to_tensor
from targets.base import Batch, ImageView
from targets.compression import VisionZip
from targets.compression.base import Compressor
from targets.decoding.base import Decoding
from targets.lvlm import LVLM
from targets.scenes import load_scenes

BATCH = 16


class ThroughIdentity(JpegCompression):
    """The same defence with the backward pass that ART has."""

    def surrogate(self, images: Tensor) -> Tensor:
        """The picture itself."""
        return images


def attacked(
    model: LVLM,
    defense: JpegCompression | None,
    samples: Sequence[Sample],
    epsilon: float,
    steps: int,
) -> Tensor:
    """Pictures attacked through a defence, or by an attack that does not know it."""
    compressor, attack = VisionZip(retention=0.25), PGD(path="compressed", steps=steps)
    batch = Batch(
        ids=tuple(one.id for one in samples),
        images=to_tensor([one.image for one in samples]),
        questions=tuple(one.question for one in samples),
        answers=tuple(one.answer for one in samples),
    )

    def make(
        inside: Compressor | None, decoding: Decoding | None = None, draw: int = 0
    ) -> ImageView:
        del decoding, draw
        return model.view(attack.needs, inside)

    view = make(compressor)
    if defense is not None:
        view = defended(make, attack.needs, defense, compressor=compressor, layout=model.layout)
    return attack(view, batch, epsilon, list(range(len(samples)))).images


def right(model: LVLM, images: Tensor, samples: Sequence[Sample], quality: int) -> tuple[int, int]:
    """How many are answered right behind the JPEG, with all tokens and compressed."""
    shown = JpegCompression(quality=quality)(images, [0] * len(images))
    asked = [one.question for one in samples]
    counts = []
    for compressor in (None, VisionZip(retention=0.25)):
        texts = model.answer(shown, asked, compressor=compressor).texts
        counts.append(sum(is_correct(*pair) for pair in zip(texts, samples, strict=True)))
    return cast("tuple[int, int]", tuple(counts))


def main() -> None:
    """Print a line for each budget, quality and backward pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--epsilon", type=int, nargs="+", default=[8, 16], help="in levels")
    parser.add_argument("--quality", type=int, nargs="+", default=[50, 25])
    given = parser.parse_args()
    torch.manual_seed(0)
    model = load_scenes("scenes-a")
    samples = list(Scenes(split="validation", samples=given.samples).open())
    for quality in given.quality:
        forms = {
            "clean": None,
            "not adaptive": None,
            "identity": ThroughIdentity(quality=quality),
            "differentiable": JpegCompression(quality=quality),
        }
        for epsilon in given.epsilon:
            for name, defense in forms.items():
                counts = [0, 0]
                for start in range(0, len(samples), BATCH):
                    some = samples[start : start + BATCH]
                    images = to_tensor([one.image for one in some])
                    if name != "clean":
                        images = attacked(model, defense, some, epsilon / 255, given.steps)
                    found = right(model, images, some, quality)
                    counts = [a + b for a, b in zip(counts, found, strict=True)]
                print(
                    f"quality {quality}  {epsilon}/255  {name:>14}  right of {len(samples)}: "
                    f"full {counts[0]}, compressed {counts[1]}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
