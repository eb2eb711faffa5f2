"""What a gradient step costs, against the bare passes of the modules its loss needs.

``python benchmarks/attack_steps.py`` times, on one machine in one run and interleaved,

- a step of CAA (preset ``paper``) against VisionZip and against FastV at K = 2,
- the *bare* forward and backward pass to the pixels of just the modules that step needs,
- a step of VEAttack, which needs the tower alone, beside the bare tower,
- a step of CAA that preserves the full path, and a step of PGD on the full path,
- the bare forward and backward pass of the whole model,
- a PGD step of ours, of torchattacks and of ART (where they are installed) on one wrapped model,
  the LVLM as a classifier of answer options, and the bare passes of that.

A step's time is the difference of a long and a short attack divided by the difference in steps, so
that set-up is not counted. Medians over repeats; ratios are what to read.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from attacks.base import Attack
from attacks.budget import Budget
from attacks.caa import CAA
from attacks.descent import descend
from attacks.option_logits import OptionLogits
from attacks.pgd import PGD
from attacks.seeds import SeedBank
from attacks.veattack import VEAttack
from targets.base import Batch, Knowledge
from targets.compression.base import Compressor
from targets.compression.fastv import FastV
from targets.compression.visionzip import VisionZip
from targets.lvlm import LVLM
from targets.scenes import WEIGHTS, world

SHORT, LONG = 2, 8
EPSILON = 8 / 255
OPTIONS = {"exists": ("yes", "no")}
"""Answers of the questions that the wrapped model is asked; the rest is left out there."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", default="scenes-a")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attack_steps.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    target = LVLM.load(WEIGHTS / arguments.checkpoint, device=arguments.device)
    batch = validation_batch(arguments.batch, arguments.device)
    cases = _cases(arguments.checkpoint, target, batch, arguments.device)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(arguments.repeats + 1):
        for name, case in cases.items():
            seconds = case()
            if repeat > 0:  # the first round warms up
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "command": "python " + " ".join(sys.argv),
        "batch": arguments.batch,
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "device": arguments.device,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "milliseconds_per_image": {
            name: round(1000 * value / arguments.batch, 3) for name, value in medians.items()
        },
        "ratios": _ratios(medians),
    }
    text = json.dumps(result, indent=1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def _ratios(medians: dict[str, float]) -> dict[str, float]:
    pairs = {
        "CAA on VisionZip ÷ bare tower and projector": ("caa visionzip", "bare tower"),
        "CAA on FastV K=2 ÷ bare tower, projector, first layers": (
            "caa fastv",
            "bare first layers",
        ),
        "CAA on VisionZip ÷ PGD on the full path": ("caa visionzip", "pgd full"),
        "CAA on FastV K=2 ÷ PGD on the full path": ("caa fastv", "pgd full"),
        "CAA preserving the full path, VisionZip ÷ PGD": ("caa preserving visionzip", "pgd full"),
        "CAA preserving the full path, FastV ÷ PGD": ("caa preserving fastv", "pgd full"),
        "PGD on the full path ÷ bare whole model": ("pgd full", "bare whole model"),
        "VEAttack ÷ bare tower": ("veattack", "bare tower alone"),
        "wrapped PGD, ours ÷ bare": ("wrapped pgd", "wrapped bare"),
        "wrapped PGD, torchattacks ÷ bare": ("wrapped torchattacks.PGD", "wrapped bare"),
        "wrapped PGD, ART ÷ bare": ("wrapped art.ProjectedGradientDescent", "wrapped bare"),
        "wrapped PGD, ours ÷ torchattacks": ("wrapped pgd", "wrapped torchattacks.PGD"),
        "wrapped PGD, ours ÷ ART": ("wrapped pgd", "wrapped art.ProjectedGradientDescent"),
    }
    return {
        name: round(medians[a] / medians[b], 3)
        for name, (a, b) in pairs.items()
        if a in medians and b in medians
    }


def validation_batch(size: int, device: str) -> Batch:
    """The first validation samples of the scenes, one question a picture."""
    samples = world.samples("validation", size)
    images = torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2) / 255
    return Batch(
        tuple(s.id for s in samples),
        images.to(device),
        tuple(s.question for s in samples),
        tuple(s.answer for s in samples),
        tuple(OPTIONS.get(s.kind, ()) for s in samples),
    )


def _cases(
    checkpoint: str, target: LVLM, batch: Batch, device: str
) -> dict[str, Callable[[], float]]:
    zipped, fastv = VisionZip(retention=0.25), FastV(layer=2, retention=0.25)
    paper: dict[str, Any] = {"preset": "paper"}
    strict: dict[str, Any] = {"preset": "strict_preserve"}
    bare = _Bare(checkpoint, target, batch, device)
    return {
        "caa visionzip": lambda: _step(target, batch, zipped, CAA, paper),
        "bare tower": lambda: bare.time(bare.tower),
        "caa fastv": lambda: _step(target, batch, fastv, CAA, paper),
        "bare first layers": lambda: bare.time(bare.first_layers),
        "caa preserving visionzip": lambda: _step(target, batch, zipped, CAA, strict),
        "caa preserving fastv": lambda: _step(target, batch, fastv, CAA, strict),
        "pgd full": lambda: _step(target, batch, None, PGD, {}),
        "bare whole model": lambda: bare.time(bare.whole),
        "veattack": lambda: _step(target, batch, None, VEAttack, {}),
        "bare tower alone": lambda: bare.time(bare.tower_alone),
        **_Wrapped(target, batch).cases(),
    }


def _step(
    target: LVLM,
    batch: Batch,
    compressor: Compressor | None,
    kind: type[Attack],
    options: dict[str, Any],
) -> float:
    """Seconds a step: (long attack - short attack) ÷ difference in steps."""

    def run(steps: int) -> float:
        attack = kind(steps=steps, **options)
        needs = getattr(attack, "needs", attack.knowledge)
        view = target.view(needs, compressor)
        start = time.perf_counter()
        attack(view, batch, EPSILON, list(range(len(batch.ids))))
        _synchronise(batch.images)
        return time.perf_counter() - start

    return (run(LONG) - run(SHORT)) / (LONG - SHORT)


class _Wrapped:
    """One classifier of answer options, attacked by three loops of the same steps."""

    def __init__(self, target: LVLM, batch: Batch) -> None:
        options = [one or () for one in batch.options or ()]
        common = statistics.mode(len(one) for one in options if len(one) > 1)
        rows = [row for row, one in enumerate(options) if len(one) == common]
        self.share = len(rows) / len(batch.ids)
        self.batch = batch.rows(rows)
        self.model = OptionLogits(target.view(Knowledge.WHITE_BOX), self.batch)
        self.labels = self.model.labels

    def cases(self) -> dict[str, Callable[[], float]]:
        """By name; a library that is not installed has none."""
        found = {
            "wrapped bare": lambda: self.per_step(self.bare),
            "wrapped pgd": lambda: self.per_step(self.ours),
        }
        if find_spec("torchattacks"):
            found["wrapped torchattacks.PGD"] = lambda: self.per_step(self.torchattacks)
        if find_spec("art"):
            found["wrapped art.ProjectedGradientDescent"] = lambda: self.per_step(self.art)
        return found

    def per_step(self, run: Callable[[int], object]) -> float:
        """Seconds a step, as if the whole batch had taken part."""
        times = []
        for steps in (SHORT, LONG):
            start = time.perf_counter()
            run(steps)
            _synchronise(self.batch.images)
            times.append(time.perf_counter() - start)
        return (times[1] - times[0]) / (LONG - SHORT) / self.share

    def bare(self, steps: int) -> None:
        for _ in range(steps):
            images = self.batch.images.clone().requires_grad_(True)
            torch.autograd.grad(functional.cross_entropy(self.model(images), self.labels), images)

    def ours(self, steps: int) -> object:
        def loss(images: Tensor, _: int) -> Tensor:
            return -functional.cross_entropy(self.model(images), self.labels, reduction="none")

        seeds = SeedBank(list(range(len(self.batch.ids))), self.batch.images.device)
        return descend(loss, self.batch, Budget(EPSILON, steps=steps), seeds)

    def torchattacks(self, steps: int) -> object:
        import torchattacks

        attack = torchattacks.PGD(self.model, eps=EPSILON, alpha=EPSILON / 6, steps=steps)
        return attack(self.batch.images, self.labels)

    def art(self, steps: int) -> object:
        from art.attacks.evasion import ProjectedGradientDescentPyTorch
        from art.estimators.classification import PyTorchClassifier

        images = self.batch.images
        classifier = PyTorchClassifier(
            model=self.model,
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(images.shape[1:]),
            nb_classes=self.model.classes,
            clip_values=(0.0, 1.0),
            device_type="gpu" if images.is_cuda else "cpu",
        )
        attack = ProjectedGradientDescentPyTorch(
            classifier,
            eps=EPSILON,
            eps_step=EPSILON / 6,
            max_iter=steps,
            num_random_init=1,
            batch_size=len(images),
            verbose=False,
        )
        return attack.generate(images.cpu().numpy(), self.labels.cpu().numpy())


class _Bare:
    """The library's own modules, called directly, with a loss that costs nothing."""

    def __init__(self, checkpoint: str, target: LVLM, batch: Batch, device: str) -> None:
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_pretrained(
            WEIGHTS / checkpoint, dtype=torch.float32
        )
        self.model = model.to(device).eval().requires_grad_(False)
        self.pixels = (batch.images - 0.5) / 0.25
        count = target.layout((96, 96)).tokens
        # As many text tokens as the longest prompt of the batch, answer included.
        text = max(
            len(q.split()) + len(a.split())
            for q, a in zip(batch.questions, batch.answers, strict=True)
        )
        ids = torch.full((len(batch.ids), 1 + count + text + 1), 5, device=device)
        ids[:, 1 : 1 + count] = self.model.config.image_token_id
        self.ids = ids

    def time(self, forward: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Mean seconds of a forward and backward pass over three."""
        start = time.perf_counter()
        for _ in range(3):
            pixels = self.pixels.clone().requires_grad_(True)
            torch.autograd.grad(forward(pixels).float().pow(2).sum(), pixels)
        _synchronise(self.pixels)
        return (time.perf_counter() - start) / 3

    def tower(self, pixels: torch.Tensor) -> torch.Tensor:
        """Vision tower and projector."""
        features = self.model.model.get_image_features(pixel_values=pixels).pooler_output
        return torch.stack(list(features))

    def tower_alone(self, pixels: torch.Tensor) -> torch.Tensor:
        """The vision tower."""
        found: torch.Tensor = self.model.model.vision_tower(pixels).last_hidden_state
        return found

    def first_layers(self, pixels: torch.Tensor) -> torch.Tensor:
        """The same, language-model layer 0, and q and k of layer 1."""
        text = self.model.model.language_model
        hidden = text.embed_tokens(self.ids)
        image = self.tower(pixels)
        hidden = torch.cat([hidden[:, :1], image, hidden[:, 1 + image.shape[1] :]], dim=1)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        hidden = text.layers[0](hidden, position_embeddings=text.rotary_emb(hidden, positions))
        normed = text.layers[1].input_layernorm(hidden)
        attention = text.layers[1].self_attn
        return attention.k_proj(normed) + attention.q_proj(normed[:, -1:])

    def whole(self, pixels: torch.Tensor) -> torch.Tensor:
        """Everything, logits of the last few tokens."""
        output = self.model(
            input_ids=self.ids,
            attention_mask=torch.ones_like(self.ids),
            pixel_values=pixels,
            use_cache=False,
            logits_to_keep=3,
        )
        logits: torch.Tensor = output.logits
        return logits


def _synchronise(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
