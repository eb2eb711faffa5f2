# ruff: noqa: E501 - a page is written here, and its lines are long
"""Make docs/results/ranking-diagnostics.md: ``python benchmarks/ranking_diagnostics.py``.

The measurements that motivate CAA (arXiv 2601.12042, its motivating study), on the scenes LVLM under
FastV at its second layer: does compression make noise dangerous, is it the ranking, and is the ranking
what accuracy hangs on? For each perturbation and retention:

- *gap*: accuracy on clean pictures minus that on perturbed ones;
- *oracle*: accuracy on perturbed pictures with the tokens that were kept of the clean ones. It needs the
  clean picture, so it is a diagnosis, no defence. *Recovery* is the share of the loss that it undoes;
- *bottom k*: accuracy on clean pictures when the k least important tokens are kept instead;
- how the ranking moved: Spearman, share of the top still in the top, of the bottom now in the top.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from attacks import CAA, Noise
from redteam.diagnosis import share, spearman, top
from reports.statistics import wilson
from targets.base import Batch, Knowledge
from targets.compression.fastv import FastV
from targets.compression.scoring import top_k_mask
from targets.lvlm import LVLM
from targets.scenes import load_scenes, world

RETENTIONS: Final = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
LAYER: Final = 2
SIZE: Final = 50
PERTURBATIONS: Final = {
    **{
        f"noise {level}/255": (Noise(distribution="gaussian"), level / 255)
        for level in (16, 32, 64)
    },
    "caa 16/255": (CAA(layers=(LAYER,), retentions=(0.2,), group="kept", steps=30), 16 / 255),
}
"""Attacks that do not know the compression, so that one picture serves all retentions."""


@dataclass(frozen=True, slots=True)
class Line:
    """What was found at one retention: samples that were right, of `n`."""

    retention: float
    n: int
    clean: int
    perturbed: int
    oracle: int
    bottom: int


@dataclass(frozen=True, slots=True)
class Moved:
    """How a perturbation moved the ranking, means over samples."""

    spearman: float
    preserved: float
    infiltrated: float


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", default="scenes-a")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--page", type=Path, default=Path("docs/results/ranking-diagnostics.md"))
    arguments = parser.parse_args()
    model = load_scenes(arguments.checkpoint)
    batches = list(_batches(arguments.split, arguments.samples))
    parts = [_head(arguments.checkpoint, arguments.split, arguments.samples)]
    for name, (attack, epsilon) in PERTURBATIONS.items():
        view = model.view(attack.needs, None)
        made = [
            attack(
                view, batch, epsilon, range(SIZE * number, SIZE * number + len(batch.ids))
            ).images
            for number, batch in enumerate(batches)
        ]
        lines = [measured(model, batches, made, retention) for retention in RETENTIONS]
        parts.append(section(name, lines, moved(model, batches, made)))
        print(parts[-1], flush=True)
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    arguments.page.write_text("\n".join(parts), encoding="utf-8")
    print(f"written: {arguments.page}")


def _batches(split: world.Split, count: int) -> Iterable[Batch]:
    samples = world.samples(split, count)
    for start in range(0, len(samples), SIZE):
        part = samples[start : start + SIZE]
        pictures = [torch.from_numpy(np.array(one.image)).permute(2, 0, 1) for one in part]
        yield Batch(
            ids=tuple(one.id for one in part),
            images=torch.stack(pictures).float() / 255,
            questions=tuple(one.question for one in part),
            answers=tuple(one.answer for one in part),
        )


def measured(
    model: LVLM, batches: Sequence[Batch], perturbed: Sequence[Tensor], retention: float
) -> Line:
    """All four accuracies at one retention."""
    compressor = FastV(layer=LAYER, retention=retention)
    right = np.zeros(4, dtype=np.int64)
    for batch, images in zip(batches, perturbed, strict=True):

        def ask(pictures: Tensor, kept: Tensor | None = None, batch: Batch = batch) -> int:
            found = model.answer(pictures, batch.questions, compressor=compressor, kept=kept)
            return sum(batch.right(found.texts))

        clean = model.answer(batch.images, batch.questions, compressor=compressor)
        assert clean.kept is not None
        assert clean.score is not None
        worst = top_k_mask(-clean.score, clean.kept.sum(1))
        right += [
            sum(batch.right(clean.texts)),
            ask(images),
            ask(images, clean.kept),
            ask(batch.images, worst),
        ]
    return Line(retention, sum(len(batch.ids) for batch in batches), *map(int, right))


def moved(model: LVLM, batches: Sequence[Batch], perturbed: Sequence[Tensor]) -> Moved:
    """Clean scores against perturbed ones; they do not depend on the retention."""
    view = model.view(Knowledge.COMPRESSED, FastV(layer=LAYER, retention=0.2))
    rows: list[tuple[float, float, float]] = []
    for batch, images in zip(batches, perturbed, strict=True):
        with torch.no_grad():
            before, after = (
                view.rank(pictures, batch.questions).score.double().numpy()  # type: ignore[attr-defined]
                for pictures in (batch.images, images)
            )
        for one, two in zip(before, after, strict=True):
            high = top(two)
            rows.append(
                (
                    spearman(one, two) or 0.0,
                    share(top(one), high) or 0.0,
                    share(top(one, bottom=True), high) or 0.0,
                )
            )
    return Moved(*(float(one) for one in np.mean(rows, axis=0)))


def _head(checkpoint: str, split: str, samples: int) -> str:
    return f"""# Does compression make noise dangerous, and is it the ranking?

Made by `python benchmarks/ranking_diagnostics.py`; do not edit.

{samples} samples of the {split} split, {checkpoint}, FastV at layer {LAYER}; 95 % intervals are Wilson's. The
measurements are those that the CAA paper (arXiv 2601.12042) begins with; there, on LLaVA and POPE,
the gap under noise grows as fewer tokens are kept, forcing the clean ranking nearly closes it, and
keeping the k least important tokens collapses. Noise is Gaussian, clipped to the ball. *caa* works on
layer {LAYER} and 20 % and does not know the retention. **The scenes LVLM was trained with noise on half of
its pictures**, so that noise should do little here; what it does is below.
"""


def section(name: str, lines: Sequence[Line], ranking: Moved) -> str:
    """One perturbation."""
    found = [
        f"## {name}",
        "",
        f"Spearman {ranking.spearman:.2f}; of the top {ranking.preserved:.2f} stay, of the bottom "
        f"{ranking.infiltrated:.2f} enter the top.",
        "",
        "| retention | clean | perturbed | gap | oracle | recovery | bottom k |",
        "|---|---|---|---|---|---|---|",
    ]
    found += [_row(line) for line in lines]
    return "\n".join(found) + "\n"


def _row(line: Line) -> str:
    gap = (line.clean - line.perturbed) / line.n
    lost = line.clean - line.perturbed
    recovery = "–" if lost <= 0 else f"{(line.oracle - line.perturbed) / lost:.2f}"
    cells = [
        f"{line.retention:.0%}",
        _accuracy(line.clean, line.n),
        _accuracy(line.perturbed, line.n),
        f"{gap:+.3f}",
        _accuracy(line.oracle, line.n),
        recovery,
        _accuracy(line.bottom, line.n),
    ]
    return f"| {' | '.join(cells)} |"


def _accuracy(right: int, n: int) -> str:
    found = wilson(right, n)
    return f"{found.value:.3f} [{found.low:.2f}, {found.high:.2f}]"


if __name__ == "__main__":
    main()
