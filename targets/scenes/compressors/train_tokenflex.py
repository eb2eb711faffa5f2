"""Train the projector of TokenFLEX on a scenes LVLM.

``python -m targets.scenes.compressors.train_tokenflex --out DIR``: tower and language model stay as
they are. The projector first learns to give what the model's own projector gives, pooled
(*align*), then to make answers right, with another number of tokens each step: 16, 36 and 64 of
144 with the paper's probabilities .2, .3 and .5 for its three sizes.
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
from targets.compression.tokenflex_net import FlexProjector, pooled
from targets.scenes import packing, passes, world
from targets.scenes.compressors import questions, training
from targets.scenes.packing import Packed

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

NAME = "tokenflex"
SHAPE = (world.GRID, world.GRID)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result.

    Attributes:
        scenes: training scenes, from the first on.
        validation: validation scenes.
        sides: n of the n × n tokens in training.
        chances: probability of each in a step.
        checked: n at which validation accuracy is measured.
        hidden: width of the perceptron.
        noise: largest amplitude of pixel noise in half of the batches, in [0, 1].
        align: the first stage; a batch is so many scenes.
        how: the second stage; likewise.
    """

    scenes: int = 12_000
    validation: int = 150
    sides: tuple[int, ...] = (4, 6, 8)
    chances: tuple[float, ...] = (0.2, 0.3, 0.5)
    checked: tuple[int, ...] = (4, 6, 8, 10)
    hidden: int = 512
    noise: float = 12 / 255
    align: training.Optimisation = field(
        default_factory=lambda: training.Optimisation(seed=1, steps=400, batch=8, lr=3e-3)
    )
    how: training.Optimisation = field(
        default_factory=lambda: training.Optimisation(seed=2, steps=6_000, batch=8, lr=1e-3)
    )


def train(recipe: Recipe, checkpoint: str, out: Path) -> None:
    """Both stages; writes weights, recipe and log."""
    model = questions.frozen(checkpoint)
    config = model.config
    arguments: dict[str, Any] = {
        "vision": config.vision_config.hidden_size,
        "text": config.text_config.hidden_size,
        "hidden": recipe.hidden,
    }
    network = trained.seeded(FlexProjector, arguments, recipe.how.seed)
    facts, log = training.facts_of(model), training.Log(out)
    drawn = packing.pack("train", 0, recipe.scenes)
    asked = packing.pack("validation", 0, recipe.validation)
    log(scenes=len(drawn), validation_scenes=len(asked))

    def validate() -> dict[str, Any]:
        return {str(side): accuracy(model, network, asked, side) for side in recipe.checked}

    for how, loss in ((recipe.align, _align_loss), (recipe.how, _answer_loss)):
        generator = torch.Generator().manual_seed(how.seed)
        batches = _batches(drawn, recipe, how, generator)

        def loss_of(batch: tuple[Packed, Tensor, int], loss: Any = loss) -> Tensor:  # noqa: ANN401
            found: Tensor = loss(model, network, *batch)
            return found

        training.optimise(network, how, batches, loss_of, log, validate, every=1_000)
    training.write_recipe(out, recipe)
    trained.write(out, NAME, network, arguments, facts)


def _batches(
    drawn: Packed, recipe: Recipe, how: training.Optimisation, generator: torch.Generator
) -> Iterator[tuple[Packed, Tensor, int]]:
    """Scenes, their pictures with noise, and n."""
    chances = torch.tensor(recipe.chances)
    for scenes in training.shuffled(len(drawn), how.batch, generator):
        batch = drawn.take(scenes)
        side = recipe.sides[int(torch.multinomial(chances, 1, generator=generator))]
        yield batch, questions.noisy(batch.images, recipe.noise, generator), side


def _align_loss(
    model: LlavaForConditionalGeneration,
    network: nn.Module,
    batch: Packed,
    pictures: Tensor,
    side: int,
) -> Tensor:
    """Distance to the model's own projected tokens, pooled, in units of their mean square."""
    del batch
    features = questions.tower(model, pictures)[-1]
    wanted = pooled(model.model.multi_modal_projector(features), SHAPE, side)
    missed: Tensor = network(features, SHAPE, side) - wanted
    return missed.square().mean() / wanted.square().mean()


def _answer_loss(
    model: LlavaForConditionalGeneration,
    network: nn.Module,
    batch: Packed,
    pictures: Tensor,
    side: int,
) -> Tensor:
    """Cross-entropy of the answers."""
    tokens = network(questions.tower(model, pictures)[-1], SHAPE, side)
    return passes.answer_loss(questions.read_packed(model, tokens, batch), batch)


@torch.no_grad()
def accuracy(
    model: LlavaForConditionalGeneration, network: nn.Module, asked: Packed, side: int
) -> dict[str, float]:
    """Right answers by kind with n × n tokens."""
    right = []
    for start in range(0, len(asked), 16):
        batch = asked.take(torch.arange(start, min(start + 16, len(asked))))
        tokens = network(questions.tower(model, batch.images)[-1], SHAPE, side)
        right.append(passes.correct(questions.read_packed(model, tokens, batch), batch))
    there = asked.kinds >= 0
    return questions.by_kind(torch.cat(right)[there], asked.kinds[there])


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
