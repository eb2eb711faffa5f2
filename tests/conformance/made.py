"""Visual tokens of methods that make new ones, by hand for one row: tokens and their places."""

from __future__ import annotations

from typing import Any

import slow_trained as slow
import torch
from torch import Tensor

from targets.compression import QueCC, TokenFLEX
from targets.compression.base import Compressor

METHODS = ("quecc", "tokenflex")
LEVELS = (1, 2)
"""Layers of QueCC's keys and values in a tower of three layers: 12, 16, 22 and 23 of 23."""


def made_by_hand(
    model: Any, ids: list[int], pixels: Tensor, one: Compressor, side: int, prompt: int
) -> tuple[Tensor, list[int]]:
    """Projected tokens ``[S, D]`` and the place of each in its picture.

    Args:
        model: a tiny LLaVA.
        ids: of the prompt and what follows it.
        pixels: ``[1, 3, H, W]``.
        one: the compressor.
        side: of the grid.
        prompt: length of the prompt.
    """
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    features = hidden[-1][0, 1:]
    count = int(one.budget(side * side) ** 0.5)
    middle = [((2 * cell + 1) * side) // (2 * count) for cell in range(count)]
    sources = [row * side + column for row in middle for column in middle]
    if isinstance(one, TokenFLEX):
        projected = model.model.multi_modal_projector(features)
        if one.weights == "none":
            return slow.pooled(projected, side, count), sources
        return slow.tokenflex(one._network.state_dict(), features, side, count), sources
    assert isinstance(one, QueCC)
    if one.weights == "none":
        return model.model.multi_modal_projector(slow.pooled(features, side, count)), sources
    words = ids[max(i for i, token in enumerate(ids) if token == 4) + 1 : prompt]
    text = model.model.language_model
    question = text(input_ids=torch.tensor([words]), use_cache=False).last_hidden_state[0, -1]
    # The tower's last hidden state is its third layer's output; hidden_states begin with the input.
    levels = torch.cat([hidden[layer + 1][0, 1:] for layer in LEVELS], -1)
    state = one._network.state_dict()
    return slow.quecc(state, features, levels, question, side, side // count, 4)[0], sources
