"""The loop, the log and the settings that the recipes of trained compressors share."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LOG, RECIPE, EVALUATION = "training_log.jsonl", "recipe.json", "evaluation.json"


@dataclass(frozen=True, slots=True)
class Optimisation:
    """How a network is trained.

    Attributes:
        seed: of starting values, order and augmentation.
        steps: optimiser steps.
        batch: questions or scenes a step, as the recipe says.
        lr: peak learning rate; warm-up over 100 steps, then a cosine to a fiftieth.
        weight_decay: of matrices.
    """

    seed: int = 1
    steps: int = 4_000
    batch: int = 8
    lr: float = 1e-3
    weight_decay: float = 0.0


class Log:
    """Appends lines to the training log of a folder and shows them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._start = folder / LOG, time.monotonic()
        self._path.write_text("", encoding="utf-8")

    def __call__(self, **entry: object) -> None:
        """One line, with the seconds since the start."""
        line = json.dumps({"seconds": round(time.monotonic() - self._start), **entry})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def optimise(
    network: nn.Module,
    how: Optimisation,
    batches: Iterator[Any],
    loss_of: Callable[[Any], Tensor],
    log: Log,
    validate: Callable[[], dict[str, Any]],
    *,
    every: int = 500,
) -> None:
    """Train a network in place; losses are logged every 100 steps.

    Args:
        network: what is trained; parameters without gradient stay.
        how: the settings.
        batches: endless.
        loss_of: loss of a batch.
        log: where it is written.
        validate: figures on the validation split, logged every `every` steps and at the end.
        every: steps between two validations.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": how.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=how.lr, betas=(0.9, 0.98))
    total = 0.0
    for step, batch in zip(range(1, how.steps + 1), batches, strict=False):
        wave = 0.51 + 0.49 * math.cos(math.pi * step / how.steps)
        for group in optimizer.param_groups:
            group["lr"] = how.lr * min(1.0, step / 100) * wave
        loss = loss_of(batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        total += loss.item()
        if step % 100 == 0:
            log(step=step, loss=round(total / 100, 4))
            total = 0.0
        if step % every == 0 or step == how.steps:
            network.eval()
            log(step=step, validation=validate())
            network.train()


def shuffled(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of indices; every epoch in a new order, the rest of it left out."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from (order[i : i + batch] for i in range(0, count - batch + 1, batch))


def write_recipe(folder: Path, recipe: object) -> None:
    """Write a recipe's dataclass beside the weights."""
    (folder / RECIPE).write_text(json.dumps(plain(recipe), indent=2) + "\n", encoding="utf-8")


def plain(recipe: Any) -> dict[str, Any]:  # noqa: ANN401 - a dataclass
    """A recipe as it is written."""
    return asdict(recipe)


def facts_of(model: Any) -> dict[str, int]:  # noqa: ANN401 - transformers is untyped
    """What the weights have to fit, see `targets.compression.trained.facts`."""
    from targets.compression import trained
    from targets.families import family_of

    return trained.facts(family_of(model))
