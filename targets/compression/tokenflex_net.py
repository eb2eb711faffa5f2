"""The projector of TokenFLEX: any grid of features to any number of tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FlexProjector(nn.Module):
    """Adaptive average pooling, a norm and a SwiGLU perceptron.

    Args:
        vision: width of the tower's features.
        text: width of the language model.
        hidden: width of the perceptron.
    """

    def __init__(self, vision: int, text: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(vision)
        self.gate = nn.Linear(vision, hidden)
        self.value = nn.Linear(vision, hidden)
        self.out = nn.Linear(hidden, text)

    def forward(self, features: Tensor, shape: tuple[int, int], side: int) -> Tensor:
        """Tokens ``[I, side², D]`` of features ``[I, V, D']`` on a grid of this shape."""
        normed = self.norm(pooled(features, shape, side))
        made: Tensor = self.out(nn.functional.silu(self.gate(normed)) * self.value(normed))
        return made


def pooled(values: Tensor, shape: tuple[int, int], side: int) -> Tensor:
    """Adaptive average pooling of ``[I, V, D]`` on a grid of this shape: ``[I, side², D]``.

    Cell i of an axis of length L averages places ``floor(i · L / side)`` up to, not including,
    ``ceil((i + 1) · L / side)``.
    """
    grid = values.transpose(1, 2).reshape(len(values), values.shape[2], *shape)
    return nn.functional.adaptive_avg_pool2d(grid, side).flatten(2).transpose(1, 2)


def centres(shape: tuple[int, int], side: int) -> Tensor:
    """The place in the middle of each cell, ``[side²]``; all differ where side ≤ both axes."""
    cell = torch.arange(side)
    rows, columns = (((2 * cell + 1) * length) // (2 * side) for length in shape)
    return (rows[:, None] * shape[1] + columns).flatten()
