"""Train QueCC's network and projector on a scenes LVLM.

``python -m targets.scenes.compressors.train_quecc --out DIR``: tower and language model stay as
they are; the network and a copy of the model's projector learn to make answers right. One network
learns all window sizes, one drawn for each step, down to one token for the picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from targets.compression import trained
from targets.compression.quecc import levels_of
from targets.compression.quecc_net import QueryCompressor
from targets.scenes import world
from targets.scenes.compressors import questions, training
from targets.scenes.compressors.questions import Questions

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

NAME = "quecc"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result.

    Attributes:
        scenes: training scenes, from the first on.
        validation: validation scenes.
        strides: window sizes; 144 tokens become 36, 16, 9, 4, 1.
        chances: probability of each in a step.
        heads: of the window attention.
        noise: largest amplitude of pixel noise in half of the batches, in [0, 1].
        how: optimisation; a batch is so many questions.
    """

    scenes: int = 12_000
    validation: int = 150
    strides: tuple[int, ...] = (2, 3, 4, 6, 12)
    chances: tuple[float, ...] = (0.2, 0.2, 0.15, 0.15, 0.3)
    heads: int = 4
    noise: float = 12 / 255
    how: training.Optimisation = field(
        default_factory=lambda: training.Optimisation(seed=1, steps=5_000, batch=32, lr=1e-3)
    )


def train(recipe: Recipe, checkpoint: str, out: Path) -> None:
    """Train, and write weights, recipe and log."""
    model = questions.frozen(checkpoint)
    layers = levels_of(model.config.vision_config.num_hidden_layers - 1)
    arguments: dict[str, Any] = {
        "vision": model.config.vision_config.hidden_size,
        "text": model.config.text_config.hidden_size,
        "levels": len(layers),
        "heads": recipe.heads,
        "strides": list(recipe.strides),
        "residual": True,
    }
    network = trained.seeded(QueryCompressor, arguments, recipe.how.seed)
    _copy_projector(network, model.model.multi_modal_projector)
    facts, log = training.facts_of(model), training.Log(out)
    drawn = questions.draw("train", 0, recipe.scenes)
    asked = questions.draw("validation", 0, recipe.validation)
    log(questions=len(drawn), validation_questions=len(asked))

    def made(batch: Questions, pictures: Tensor, stride: int) -> Tensor:
        return _tokens(model, network, layers, batch, pictures, stride)

    def loss_of(batch: tuple[Questions, Tensor, int]) -> Tensor:
        logits = questions.read(model, made(*batch), batch[0]).logits
        return questions.answer_loss(logits, batch[0].targets)

    @torch.no_grad()
    def validate() -> dict[str, Any]:
        return {str(stride): _accuracy(stride) for stride in recipe.strides}

    def _accuracy(stride: int) -> dict[str, float]:
        right = []
        for start in range(0, len(asked.images), 16):
            scenes = torch.arange(start, min(start + 16, len(asked.images)))
            batch = asked.of_scenes(scenes)
            logits = questions.read(model, made(batch, batch.images, stride), batch).logits
            right.append(questions.correct(logits, batch.targets))
        return questions.by_kind(torch.cat(right), asked.kind)

    batches = _batches(drawn, recipe, torch.Generator().manual_seed(recipe.how.seed))
    training.optimise(network, recipe.how, batches, loss_of, log, validate, every=1_000)
    training.write_recipe(out, recipe)
    trained.write(out, NAME, network, arguments, facts)


@torch.no_grad()
def _copy_projector(network: nn.Module, projector: Any) -> None:  # noqa: ANN401 - transformers
    """Begin with the model's own projector."""
    own: Any = network.projector
    own[0].load_state_dict(projector.linear_1.state_dict())
    own[2].load_state_dict(projector.linear_2.state_dict())


@torch.no_grad()
def question_state(model: LlavaForConditionalGeneration, words: Tensor) -> Tensor:
    """Last hidden state of the language model for questions alone, ``[Q, T]``."""
    # There are about fifty questions in this world, whatever the pictures.
    unique, where = torch.unique(words, dim=0, return_inverse=True)
    live = (unique > 0).long()
    output = model.model.language_model(
        input_ids=unique,
        attention_mask=live,
        position_ids=(live.cumsum(1) - 1).clamp_min(0),
        use_cache=False,
    )
    found: Tensor = output.last_hidden_state[:, -1]
    return found[where]


def _tokens(
    model: LlavaForConditionalGeneration,
    network: nn.Module,
    layers: tuple[int, ...],
    batch: Questions,
    pictures: Tensor,
    stride: int,
) -> Tensor:
    """Visual tokens of each question, ``[Q, n, T]``."""
    hidden = [_grid(one) for one in questions.tower(model, pictures)]
    features, levels = hidden[-1], torch.cat([hidden[layer] for layer in layers], -1)
    asked = question_state(model, batch.words)
    tokens: Tensor = network(features[batch.scene], levels[batch.scene], asked, stride)[0]
    return tokens


def _grid(patches: Tensor) -> Tensor:
    return patches.reshape(len(patches), world.GRID, world.GRID, -1)


def _batches(
    drawn: Questions, recipe: Recipe, generator: torch.Generator
) -> Iterator[tuple[Questions, Tensor, int]]:
    """Questions, their pictures with noise, and the window size."""
    chances = torch.tensor(recipe.chances)
    # Several questions about each scene: the tower costs as much as the language model.
    for scenes in training.shuffled(len(drawn.images), max(1, recipe.how.batch // 4), generator):
        batch = drawn.of_scenes(scenes)
        batch = batch.some(torch.randperm(len(batch), generator=generator)[: recipe.how.batch])
        stride = recipe.strides[int(torch.multinomial(chances, 1, generator=generator))]
        yield batch, questions.noisy(batch.images, recipe.noise, generator), stride


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=f"Train {NAME} on a scenes LVLM.")
    parser.add_argument("--checkpoint", default="scenes-a")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(Recipe(), arguments.checkpoint, arguments.out)


if __name__ == "__main__":
    main()
