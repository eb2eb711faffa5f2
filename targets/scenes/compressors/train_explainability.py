"""Train the network of compression by explainability on a scenes LVLM.

``python -m targets.scenes.compressors.train_explainability --out DIR``: label the questions about
the first training scenes with `relevance`, keep those answered rightly, and teach `RelevanceNet`
their relevance from the layer-0 attention of the question: KL divergence to the relevance with its
lower half set to zero (Adam, batch 128, as in the paper). The LVLM stays as it is.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from targets.compression import trained
from targets.compression.explainability_net import RelevanceNet
from targets.compression.scoring import TINY, top_k_mask
from targets.scenes import passes
from targets.scenes.compressors import questions, training
from targets.scenes.compressors.relevance import Labelled, label_scenes

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

NAME = "explainability"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result.

    Attributes:
        scenes: training scenes, from the first on.
        validation: validation scenes.
        keep: tokens kept when validation accuracy is measured.
        channels: of the convolutions; the paper's are twice as many.
        kernel: of the convolutions.
        how: optimisation; a batch is so many questions.
    """

    scenes: int = 2_500
    validation: int = 200
    keep: tuple[int, ...] = (72, 36, 16)
    channels: tuple[int, ...] = (16, 32, 64, 128, 256)
    kernel: int = 7
    how: training.Optimisation = field(
        default_factory=lambda: training.Optimisation(seed=1, steps=1_800, batch=128, lr=2e-3)
    )

    @property
    def network(self) -> dict[str, Any]:
        """Arguments of `RelevanceNet`."""
        return {"channels": list(self.channels), "kernel": self.kernel}


def target_of(relevance: Tensor) -> Tensor:
    """Relevance ``[M, V]`` with its lower half set to zero, as a distribution."""
    upper = top_k_mask(relevance, relevance.shape[1] - relevance.shape[1] // 2)
    kept = relevance * upper
    return kept / kept.sum(1, keepdim=True).clamp_min(TINY)


def divergence(target: Tensor, logs: Tensor) -> Tensor:
    """Mean of KL(target ‖ f) over rows; `logs` are f's log-probabilities."""
    return (target * ((target + TINY).log() - logs)).sum(1).mean()


@torch.no_grad()
def accuracy(
    model: LlavaForConditionalGeneration, asked: questions.Questions, score: Tensor, keep: int
) -> dict[str, float]:
    """Right answers by kind when the `keep` best tokens ``[Q, V]`` are read, without gaps."""
    right = []
    for start in range(0, len(asked.images), 16):
        scenes = torch.arange(start, min(start + 16, len(asked.images)))
        batch = asked.of_scenes(scenes)
        here = torch.isin(asked.scene, scenes)
        tokens = model.model.multi_modal_projector(passes.see(model, batch.images).hidden[:, 1:])
        kept = top_k_mask(score[here], keep).nonzero()[:, 1].view(-1, keep)
        wide = kept[..., None].expand(-1, -1, tokens.shape[-1])
        logits = questions.read(model, tokens[batch.scene].gather(1, wide), batch).logits
        right.append(questions.correct(logits, batch.targets))
    return questions.by_kind(torch.cat(right), asked.kind)


def train(recipe: Recipe, checkpoint: str, out: Path, labels: Path | None) -> None:
    """Label, train, and write weights, recipe and log.

    Args:
        recipe: what to do.
        checkpoint: the scenes LVLM.
        out: folder for weights, recipe and log.
        labels: folder to keep labels in, and to take them from if it has some; None for none.
    """
    model = questions.frozen(checkpoint, "eager")
    facts, log = training.facts_of(model), training.Log(out)
    drawn = questions.draw("train", 0, recipe.scenes)
    asked = questions.draw("validation", 0, recipe.validation)
    fit, check = (
        _labels(model, part, None if labels is None else labels / f"labels_{name}.safetensors")
        for name, part in (("train", drawn), ("validation", asked))
    )
    log(questions=len(drawn), labelled=len(fit.attention), validation_questions=len(asked))
    network = trained.seeded(RelevanceNet, recipe.network, recipe.how.seed)
    _fit(network, recipe, fit, check, log)
    with torch.no_grad():
        everywhere = torch.ones_like(check.attention, dtype=torch.bool)
        scores = {
            "trained": network.eval()(check.attention, everywhere),
            "layer-0 attention": check.attention,
            "relevance": check.relevance,
        }
    if len(check.question) == len(asked):
        for name, score in scores.items():
            found = {keep: accuracy(model, asked, score, keep) for keep in recipe.keep}
            log(score=name, validation_accuracy=found)
    training.write_recipe(out, recipe)
    trained.write(out, NAME, network, recipe.network, facts)


def _labels(
    model: LlavaForConditionalGeneration, asked: questions.Questions, path: Path | None
) -> Labelled:
    if path is not None and path.is_file():
        return Labelled.load(path)
    found = label_scenes(model, asked)
    if path is not None:
        found.save(path)
    return found


def _fit(
    network: torch.nn.Module, recipe: Recipe, fit: Labelled, check: Labelled, log: training.Log
) -> None:
    how = recipe.how
    targets, wanted = target_of(fit.relevance), target_of(check.relevance)

    def loss_of(rows: Tensor) -> Tensor:
        attention = fit.attention[rows]
        logs = network(attention, torch.ones_like(attention, dtype=torch.bool))
        return divergence(targets[rows], logs)

    @torch.no_grad()
    def validate() -> dict[str, float]:
        logs = network(check.attention, torch.ones_like(check.attention, dtype=torch.bool))
        found = {"divergence": round(float(divergence(wanted, logs)), 4)}
        for keep in recipe.keep:
            mass = (wanted * top_k_mask(logs, keep)).sum(1).mean()
            found[f"relevance kept by {keep}"] = round(float(mass), 4)
        return found

    generator = torch.Generator().manual_seed(how.seed)
    batches = training.shuffled(len(fit.attention), how.batch, generator)
    training.optimise(network, how, batches, loss_of, log, validate, every=300)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=f"Train {NAME} on a scenes LVLM.")
    parser.add_argument("--checkpoint", default="scenes-a")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--labels", type=Path, help="folder to keep the labels in, and reuse")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(Recipe(), arguments.checkpoint, arguments.out, arguments.labels)


if __name__ == "__main__":
    main()
