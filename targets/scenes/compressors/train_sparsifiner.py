"""Train Sparsifiner's predictor on the vision tower of a scenes LVLM.

``python -m targets.scenes.compressors.train_sparsifiner --out DIR``: the tower stays as it is; the
predictor of each layer learns that layer's dense attention (mean squared error over the mean square
of the attention, the paper's first loss).
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
from targets.compression.inside import in_heads
from targets.compression.sparsifiner_net import Connectivity, connected
from targets.families import family_of
from targets.scenes import passes, world
from targets.scenes.compressors import questions, training

if TYPE_CHECKING:
    from targets.families.vision import TowerEncoder

NAME = "sparsifiner"
Attention = tuple[Tensor, Tensor, Tensor]
"""Queries, keys ``[I, N, S, E]`` and attention ``[I, N, S, S]`` of one layer."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result.

    Attributes:
        scenes: training scenes, from the first on.
        validation: validation scenes.
        shrink: tokens are fewer by this factor in the predictor.
        threshold: entries of the back-projection no larger count as zero at inference.
        checked: shares of connections at which validation figures are measured.
        noise: largest amplitude of pixel noise in half of the batches, in [0, 1].
        how: optimisation; a batch is so many scenes.
    """

    scenes: int = 6_000
    validation: int = 64
    shrink: int = 8
    threshold: float = 1e-4
    checked: tuple[float, ...] = (0.5, 0.25, 0.1)
    noise: float = 12 / 255
    how: training.Optimisation = field(
        default_factory=lambda: training.Optimisation(seed=1, steps=3_500, batch=4, lr=1e-2)
    )


@torch.no_grad()
def dense(encoder: TowerEncoder, hidden: Tensor) -> list[Attention]:
    """Attention of each layer up to the feature layer.

    Args:
        encoder: of the tower.
        hidden: ``[I, S, D]`` input of the first layer.
    """
    found = []
    for block in encoder.blocks[: encoder.feature_layer + 1]:
        normed, attention = block.layer_norm1(hidden), block.self_attn
        queries = in_heads(attention.q_proj(normed), attention)
        keys = in_heads(attention.k_proj(normed), attention)
        logits = queries @ keys.transpose(-1, -2) * float(attention.scale)
        found.append((queries, keys, logits.softmax(-1)))
        hidden = hidden + attention(hidden_states=normed, attention_mask=None)[0]
        hidden = hidden + block.mlp(block.layer_norm2(hidden))
    return found


def guesses(network: nn.Module, layers: list[Attention]) -> list[Tensor]:
    """Approximate attention of each layer."""
    images, tokens = len(layers[0][2]), layers[0][2].shape[-1]
    index = torch.arange(tokens).expand(images, -1)
    alive = torch.ones_like(index, dtype=torch.bool)
    return [network(n, *one[:2], index, alive) for n, one in enumerate(layers)]


def reconstruction(network: nn.Module, layers: list[Attention]) -> Tensor:
    """Squared error of the approximate attention over the mean square of the attention."""
    missed = [
        (guess - one[2]).square().mean() / one[2].square().mean()
        for guess, one in zip(guesses(network, layers), layers, strict=True)
    ]
    return torch.stack(missed).mean()


@torch.no_grad()
def caught(network: nn.Module, layers: list[Attention], share: float) -> float:
    """Part of the attention that falls on connected keys, mean over rows other than that of CLS."""
    found = []
    for guess, one in zip(guesses(network, layers), layers, strict=True):
        alive = torch.ones(len(guess), guess.shape[-1], dtype=torch.bool)
        held = one[2] * connected(guess, share, alive, True)
        found.append(held.sum(-1)[:, :, 1:].mean())
    return round(float(torch.stack(found).mean()), 4)


def train(recipe: Recipe, checkpoint: str, out: Path) -> None:
    """Train, and write weights, recipe and log."""
    model = questions.frozen(checkpoint)
    family = family_of(model)
    encoder = family.encoder
    if encoder is None:
        raise TypeError("a scenes LVLM has a tower that can be shortened from inside")
    arguments: dict[str, Any] = {
        "layers": encoder.feature_layer + 1,
        "tokens": family.fixed_tokens() + int(encoder.has_cls),
        "width": int(encoder.blocks[0].self_attn.head_dim),
        "shrink": recipe.shrink,
        "threshold": recipe.threshold,
    }
    network: Any = trained.seeded(Connectivity, arguments, recipe.how.seed)
    log = training.Log(out)
    drawn, asked = (
        torch.stack([_picture(split, number) for number in range(count)])
        for split, count in (("train", recipe.scenes), ("validation", recipe.validation))
    )
    log(scenes=len(drawn), validation_scenes=len(asked))

    def teach(pictures: Tensor) -> list[Attention]:
        return dense(encoder, _embedded(model, pictures))

    @torch.no_grad()
    def validate() -> dict[str, Any]:
        parts = [teach(part) for part in torch.split(asked.float() / 255, 16)]
        losses = [float(reconstruction(network, part)) for part in parts]
        found = {
            f"attention caught by {share}": sum(caught(network, p, share) for p in parts)
            / len(parts)
            for share in recipe.checked
        }
        return {"loss": round(sum(losses) / len(losses), 4), **found}

    log(validation=validate())
    batches = _batches(drawn, recipe)
    training.optimise(
        network,
        recipe.how,
        batches,
        lambda pictures: reconstruction(network, teach(pictures)),
        log,
        validate,
    )
    training.write_recipe(out, recipe)
    trained.write(out, NAME, network, arguments, training.facts_of(model))


def _picture(split: Any, number: int) -> Tensor:  # noqa: ANN401 - a split of the world
    image = world.scene(split, number).image.copy()
    return torch.from_numpy(image).permute(2, 0, 1)


@torch.no_grad()
def _embedded(model: Any, pictures: Tensor) -> Tensor:  # noqa: ANN401 - transformers is untyped
    """Input of the first layer for pictures in [0, 1]."""
    tower = model.model.vision_tower
    embedded: Tensor = tower.pre_layrnorm(tower.embeddings(passes.pixels(pictures)))
    return embedded


def _batches(drawn: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(recipe.how.seed)
    for scenes in training.shuffled(len(drawn), recipe.how.batch, generator):
        yield questions.noisy(drawn[scenes], recipe.noise, generator)


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
