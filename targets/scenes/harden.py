"""Harden the ranking of a scenes LVLM: ``python -m targets.scenes.harden --out DIR``.

Adversarial fine-tuning of the vision tower alone; projector and language model stay as they are,
so the result is a tower that can be swapped in, at no cost at inference. Both rankings that
compressors use follow from what the tower gives: CLS attention directly (VisionZip, FasterVLM), and
the language model's attention through the tokens it reads (FastV).

Two stages, both on pictures attacked inside an l_inf ball, a quarter of each batch left clean:

- *features*: tokens and CLS row of the attacked picture are pulled to those of the original tower
  on the clean one. It is the loss of FARE (Schlarmann et al., arXiv 2402.12336, eq. 3), taken over
  all tokens instead of the final embedding, with a KL divergence of the ranking beside it.
- *answers*: the cross-entropy of answers on attacked pictures, through all tokens and through
  compressed passes; a hinge that keeps what answers a question above the K-th other token in both
  rankings; and the feature distance as a tie to the original.

The attack maximises the loss of the stage. It is *free* (Shafahi et al., arXiv 1904.12843): each
batch is shown several times, and one backward pass gives the gradient for the weights and for the
perturbation, which stays until the next batch. The weights kept are a running mean. Recipe and log
are written beside them. [inferred] No paper trains the ranking; the combination is ours.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from targets.scenes import WEIGHTS, checkpoints, packing, passes
from targets.scenes.packing import Packed
from targets.scenes.train import draw

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

Objective = Callable[[Tensor], Tensor]
"""What an attack maximises: images ``[B, 3, H, W]`` in [0, 1] to a scalar."""
Loss = Callable[[Tensor], tuple[Tensor, dict[str, float]]]
"""The loss of a stage on one batch's pictures, and figures for the log."""

_BY_CLS: Final = ("cls", "merged")
_KEPT: Final = (24, 36, 36, 48)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result, written beside the weights.

    Attributes:
        checkpoint: the scenes LVLM whose tower is hardened.
        seed: of order, radii, starts and choices.
        scenes: training scenes, of split ``train``.
        batch: pictures a step.
        epsilon: largest l_inf radius of the attacks, in [0, 1] pixel units.
        ramp: share of each stage over which the radius grows to it.
        clean: share of each batch that is not attacked.
        replays: steps taken on one batch, its perturbation kept between them.
        step: of the perturbation in each of them, in radii.
        feature_steps: length of the first stage.
        feature_planned: the length its schedules are made for; more than `feature_steps` where the
            stage was stopped before its learning rate had come down.
        feature_lr: its peak learning rate.
        answer_steps: length of the second stage.
        answer_lr: its peak learning rate.
        ranking: weight of the KL divergence of the CLS row in the first stage.
        hinge: weight of the ranking hinges in the second.
        margin: by which log-scores of evidence should pass the boundary, in nats.
        boundary: K of the hinge: evidence should be above the K-th other token.
        tie: weight of the feature distance in the second stage.
        mean: decay of the running mean of the weights.
    """

    checkpoint: str = "scenes-a"
    seed: int = 1
    scenes: int = 6_000
    batch: int = 8
    epsilon: float = 16 / 255
    ramp: float = 0.2
    clean: float = 0.25
    replays: int = 4
    step: float = 0.75
    feature_steps: int = 800
    feature_planned: int = 1_600
    feature_lr: float = 6e-4
    answer_steps: int = 800
    answer_lr: float = 4e-4
    ranking: float = 1.0
    hinge: float = 0.3
    margin: float = 2.0
    boundary: int = 16
    tie: float = 0.3
    mean: float = 0.99


def perturb(
    images: Tensor, radius: Tensor, steps: int, objective: Objective, generator: torch.Generator
) -> Tensor:
    """PGD from a random start inside the ball: the attack of validation.

    Args:
        images: ``[B, 3, H, W]`` in [0, 1].
        radius: ``[B]``, l_inf, in pixel units of [0, 1].
        steps: of size 2.5 radius / steps.
        objective: what is maximised.
        generator: of the start.

    Returns:
        Images in the ball and in [0, 1], detached.
    """
    ball = radius.view(-1, 1, 1, 1)
    delta = (torch.rand(images.shape, generator=generator).to(images.device) * 2 - 1) * ball
    size = ball * 2.5 / max(steps, 1)
    for _ in range(steps):
        point = (images + delta).clamp(0, 1).requires_grad_(True)
        (slope,) = torch.autograd.grad(objective(point), point)
        delta = (delta + size * slope.sign()).clamp(-ball, ball)
    return (images + delta).clamp(0, 1).detach()


def distance(seen: passes.Seen, wanted: passes.Seen, weight: Tensor | None = None) -> Tensor:
    """Squared distance of tokens and CLS, in units of each channel's variance; mean over tokens.

    Args:
        seen: of the tower in training.
        wanted: of the original tower.
        weight: ``[B, 1 + V]``, of each token in the mean; None is equal weights.
    """
    spread = wanted.hidden.flatten(0, 1).var(0).clamp_min(1e-6)
    each = ((seen.hidden - wanted.hidden) ** 2 / spread).mean(-1)
    if weight is None:
        return each.mean()
    return (each * weight).sum() / weight.sum().clamp_min(1e-6)


def divergence(seen: passes.Seen, wanted: passes.Seen) -> Tensor:
    """KL of the CLS row over patches, original ‖ trained, mean over pictures, in nats."""
    target = wanted.cls / wanted.cls.sum(1, keepdim=True)
    row = (seen.cls / seen.cls.sum(1, keepdim=True)).clamp_min(1e-9).log()
    return nn.functional.kl_div(row, target, reduction="batchmean")


def hinge(log_score: Tensor, wanted: Tensor, boundary: int, margin: float) -> Tensor:
    """How far wanted tokens are from being `margin` above the K-th other token, mean.

    Args:
        log_score: ``[N, V]``.
        wanted: bool ``[N, V]``; rows without any count nothing.
        boundary: K.
        margin: in the unit of the score.
    """
    others = log_score.masked_fill(wanted, -math.inf)
    edge = others.topk(boundary, dim=1).values[:, -1:].clamp_min(-20.0)
    short = (margin + edge - log_score).relu() * wanted
    return short.sum() / wanted.sum().clamp_min(1)


def gap(log_score: Tensor, wanted: Tensor) -> Tensor:
    """Mean log-score of the other tokens minus that of the wanted: what a ranking attack raises."""
    rows = wanted.any(1)
    if not bool(rows.any()):
        return log_score.new_zeros(())
    score, keep = log_score[rows], wanted[rows].float()
    inside = (score * keep).sum(1) / keep.sum(1)
    outside = (score * (1 - keep)).sum(1) / (1 - keep).sum(1)
    return (outside - inside).mean()


@dataclass(frozen=True, slots=True)
class _Turn:
    """One step: how far the stage is in [0, 1), the pictures shown, and the loss on them."""

    progress: float
    shown: Tensor
    loss: Loss


class Hardener:
    """One run: a frozen LVLM, its tower in training, the original tower, data, log."""

    def __init__(self, recipe: Recipe, data: Packed, out: Path, late: int = 2) -> None:
        """Load the checkpoint; training starts with `features`, then `answers`.

        Args:
            recipe: what to do.
            data: packed scenes of split ``train``.
            out: folder for tower, recipe and log.
            late: the layer at which FastV cuts.
        """
        from transformers import LlavaForConditionalGeneration

        self.recipe, self.data, self.out, self.late = recipe, data, out, late
        source = WEIGHTS / recipe.checkpoint
        model = LlavaForConditionalGeneration.from_pretrained(  # our own folder # nosec B615
            source, dtype=torch.float32
        )
        self.model: LlavaForConditionalGeneration = model.eval().requires_grad_(False)
        self.original = copy.deepcopy(model)
        self.tower = model.model.vision_tower
        self.mean = copy.deepcopy(self.tower)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.start = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)

    def features(self) -> None:
        """Stage 1: tokens and CLS row of attacked pictures as the original's of clean ones."""

        def begin(batch: Packed) -> Loss:
            wanted = self._original(batch.images.float() / 255)
            objects = self._objects(batch)

            def loss(images: Tensor) -> tuple[Tensor, dict[str, float]]:
                seen = passes.see(self.model, images)
                far, kl = distance(seen, wanted), divergence(seen, wanted)
                near = distance(seen, wanted, objects)
                report = {"distance": far.item(), "objects": near.item(), "kl": kl.item()}
                return far + near + self.recipe.ranking * kl, report

            return loss

        recipe = self.recipe
        self._run(
            "features", recipe.feature_steps, recipe.feature_planned, recipe.feature_lr, begin
        )

    def answers(self) -> None:
        """Stage 2: answers and rankings under attack, through all tokens and compressed.

        Starts from the saved tower, so that it can be run by itself and gives the same result.
        """
        from transformers import CLIPVisionModel

        recipe = self.recipe
        self.generator.manual_seed(recipe.seed + 1)
        tower = CLIPVisionModel.from_pretrained(  # our own folder # nosec B615
            self.out, dtype=torch.float32
        )
        saved = tower.state_dict()
        for one in (self.tower, self.mean):
            one.load_state_dict(saved)

        def begin(batch: Packed) -> Loss:
            wanted = self._original(batch.images.float() / 255)
            objects, options = self._objects(batch), self._options()

            def loss(images: Tensor) -> tuple[Tensor, dict[str, float]]:
                seen = passes.see(self.model, images)
                reading = passes.read(self.model, seen, batch, options, self.late, self.generator)
                answer = passes.answer_loss(reading.logits, batch)
                ranks = self._hinges(seen, reading, batch)
                near = distance(seen, wanted) + distance(seen, wanted, objects)
                report = {"answer": answer.item(), "hinge": ranks.item(), "distance": near.item()}
                return answer + recipe.hinge * ranks + recipe.tie * near, report

            return loss

        self._run("answers", recipe.answer_steps, recipe.answer_steps, recipe.answer_lr, begin)

    # -------------------------------------------------------------------------- losses and choices

    @torch.no_grad()
    def _original(self, images: Tensor) -> passes.Seen:
        return passes.see(self.original, images)

    def _objective(
        self, batch: Packed, options: passes.Options, mixture: tuple[float, float]
    ) -> Objective:
        """Weighted sum of the answer's loss and the gap in the ranking the options use."""
        of_answer, of_ranking = mixture
        objects = (batch.patches > 0).any(-1)

        def objective(x: Tensor) -> Tensor:
            seen = passes.see(self.model, x)
            by_cls = options.drop in _BY_CLS
            total = x.new_zeros(())
            if by_cls and of_ranking:
                total = total + of_ranking * gap((seen.cls + 1e-9).log(), objects)
            if of_answer or not by_cls:
                reading = passes.read(self.model, seen, batch, options, self.late, self.generator)
                total = total + of_answer * passes.answer_loss(reading.logits, batch)
                if of_ranking and not by_cls:
                    score, wanted = _asked(reading, batch)
                    total = total + of_ranking * gap(score, wanted)
            return total

        return objective

    def _hinges(self, seen: passes.Seen, reading: passes.Read, batch: Packed) -> Tensor:
        """Of CLS over what is drawn, of the language model's attention over the evidence."""
        recipe = self.recipe
        objects = (batch.patches > 0).any(-1)
        total = hinge((seen.cls + 1e-9).log(), objects, recipe.boundary, recipe.margin)
        if reading.kept.shape[1] == objects.shape[1]:  # all tokens reached the ranking
            score, wanted = _asked(reading, batch)
            total = total + hinge(score, wanted, recipe.boundary, recipe.margin)
        return total

    @staticmethod
    def _objects(batch: Packed) -> Tensor:
        """1 for CLS and tokens with something drawn, ``[B, 1 + V]``."""
        drawn = (batch.patches > 0).any(-1).float()
        return torch.cat([torch.ones_like(drawn[:, :1]), drawn], dim=1)

    def _radius(self, count: int, scale: float) -> Tensor:
        """Of each picture: 0 for the clean share, else uniform up to the largest, skewed to it."""
        draws = torch.rand(count, generator=self.generator)
        attacked = torch.rand(count, generator=self.generator) >= self.recipe.clean
        return self.recipe.epsilon * scale * draws.sqrt() * attacked

    def _options(self) -> passes.Options:
        """A way to drop tokens, for one batch."""
        which = self._chance()
        keep = _KEPT[int(self._chance() * len(_KEPT))]
        if which < 0.15:
            return passes.Options()
        if which < 0.6:
            return passes.Options(keep, "ranked")
        return passes.Options(keep, "merged" if which < 0.9 else "cls")

    def _chance(self) -> float:
        return float(torch.rand((), generator=self.generator))

    # ------------------------------------------------------------------------------------- the run

    def _batches(self) -> Iterator[Packed]:
        size = self.recipe.batch
        while True:
            order = torch.randperm(len(self.data), generator=self.generator)
            for i in range(0, len(order) - size + 1, size):
                yield self.data.take(order[i : i + size])

    def _attacked(
        self, steps: int, planned: int, begin: Callable[[Packed], Loss]
    ) -> Iterator[_Turn]:
        """Pictures to take a step on: each batch several times, the perturbation kept between.

        Yields:
            Turns; the caller runs the backward pass, whose gradient at ``shown`` also moves the
            perturbation.
        """
        recipe = self.recipe
        batches = self._batches()
        done = 0
        while done < steps:
            batch = next(batches)
            images = batch.images.float() / 255
            scale = min(1.0, (done + 1) / max(recipe.ramp * planned, 1))
            ball = self._radius(len(batch), scale).view(-1, 1, 1, 1)
            delta = (torch.rand(images.shape, generator=self.generator) * 2 - 1) * ball
            loss = begin(batch)
            for _ in range(recipe.replays):
                shown = (images + delta).clamp(0, 1).requires_grad_(True)
                yield _Turn(done / planned, shown, loss)
                done += 1
                if done == steps:
                    return
                slope = shown.grad if shown.grad is not None else torch.zeros_like(shown)
                delta = (delta + recipe.step * ball * slope.sign()).clamp(-ball, ball)

    def _run(
        self, stage: str, steps: int, planned: int, lr: float, begin: Callable[[Packed], Loss]
    ) -> None:
        """Optimise the tower with a warm-up and a cosine; log means every 100 steps.

        Args:
            stage: for the log.
            steps: how many are taken.
            planned: how many the schedules are made for.
            lr: peak learning rate.
            begin: the loss of a batch.
        """
        self.tower.requires_grad_(True)
        parameters = list(self.tower.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
        sums: dict[str, float] = {}
        for i, turn in enumerate(self._attacked(steps, planned, begin)):
            scale = min(1.0, (i + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * turn.progress)))
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            loss, report = turn.loss(turn.shown)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            self._average()
            for name, value in (report | {"loss": loss.item()}).items():
                sums[name] = sums.get(name, 0.0) + value
            if (i + 1) % 100 == 0:
                means = {k: round(v / 100, 4) for k, v in sums.items()}
                self.log(stage=stage, step=i + 1, **means)
                sums = {}
            if (i + 1) % 200 == 0 or i + 1 == steps:
                self.save()
        self.tower.requires_grad_(False)
        self.tower.load_state_dict(self.mean.state_dict())

    @torch.no_grad()
    def _average(self) -> None:
        for kept, now in zip(self.mean.parameters(), self.tower.parameters(), strict=True):
            kept.lerp_(now, 1 - self.recipe.mean)

    def validate(self, scenes: int, radius: float, steps: int) -> dict[str, float]:
        """Share of right answers on validation scenes: clean and under this module's attack.

        The attack goes up both the answer's loss and the gap, through the path that is asked. It
        is for choosing settings; what the defence is worth is measured by the library's attacks.

        Args:
            scenes: how many, of split ``validation``.
            radius: l_inf, in pixel units of [0, 1].
            steps: of the attack.
        """
        data = packing.pack("validation", 0, scenes)
        generator = torch.Generator().manual_seed(0)
        ways: dict[str, passes.Options] = {
            "full": passes.Options(),
            "ranked 25%": passes.Options(36, "ranked"),
            "merged 25%": passes.Options(36, "merged"),
        }
        right: dict[str, float] = {}
        total = 0
        for i in range(0, scenes, 16):
            batch = data.take(torch.arange(i, min(i + 16, scenes)))
            images = batch.images.float() / 255
            total += int((batch.asks >= 0).sum())
            for name, options in ways.items():
                objective = self._objective(batch, options, (1.0, 0.5))
                ball = torch.full((len(batch),), radius)
                attacked = perturb(images, ball, steps, objective, generator)
                for label, shown in ((name, images), (f"{name}, attacked", attacked)):
                    right[label] = right.get(label, 0.0) + self._right(shown, batch, options)
        return {name: round(count / total, 4) for name, count in right.items()}

    @torch.no_grad()
    def _right(self, images: Tensor, batch: Packed, options: passes.Options) -> float:
        seen = passes.see(self.model, images)
        reading = passes.read(self.model, seen, batch, options, self.late, self.generator)
        return float((passes.correct(reading.logits, batch) & (batch.asks >= 0)).sum())

    def log(self, **entry: object) -> None:
        """Append one line to the training log and show it."""
        line = json.dumps({"seconds": round(time.monotonic() - self.start), **entry})
        with (self.out / "training_log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def save(self) -> None:
        """Write the averaged tower in bfloat16 (transformers' format) and the recipe."""
        tower = copy.deepcopy(self.mean).to(torch.bfloat16)
        tower.save_pretrained(self.out)
        text = json.dumps(asdict(self.recipe), indent=2)
        (self.out / "recipe.json").write_text(text + "\n", encoding="utf-8")


def _asked(reading: passes.Read, batch: Packed) -> tuple[Tensor, Tensor]:
    """Log-scores ``[N, V']`` of the questions that have evidence, and which tokens that is."""
    places = reading.kept[:, None].expand(-1, batch.evidence.shape[1], -1)
    evidence = batch.evidence.gather(2, places.clamp(min=0)) & (places >= 0)
    asked = (batch.asks >= 0) & evidence.any(-1)
    return (reading.ranking[asked] + 1e-9).log(), evidence[asked]


PRESETS: Final[dict[str, Recipe]] = {"ranking": Recipe()}
"""The shipped hardened towers, by the name of their folder."""


STAGES: Final = ("features", "answers")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Adversarially fine-tune the ranking of a tower.")
    parser.add_argument("--checkpoint", choices=checkpoints(), default="scenes-a")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tower")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe(checkpoint=arguments.checkpoint)
    hardener = Hardener(recipe, draw(recipe.scenes, 1), arguments.out)
    for stage in STAGES:
        if stage in arguments.stages:
            getattr(hardener, stage)()
    for radius in (4, 8, 16):
        found = hardener.validate(64, radius / 255, 10)
        hardener.log(stage="validation", radius=f"{radius}/255", **found)


if __name__ == "__main__":
    main()
