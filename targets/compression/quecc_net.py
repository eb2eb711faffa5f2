"""The network of QueCC: a few tokens that read their windows with the question in mind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class _Perceptron(nn.Sequential):
    """Linear, GELU, Linear, LayerNorm: what makes queries, keys and values."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(
            nn.Linear(before, after), nn.GELU(), nn.Linear(after, after), nn.LayerNorm(after)
        )


class QueryCompressor(nn.Module):
    """Question-conditioned attention within windows, and the projector behind it.

    Args:
        vision: width of the tower's features.
        text: width of the language model.
        levels: tower layers that keys and values are made from.
        heads: of the attention.
        strides: window sizes it knows; each has a convolution of its own.
        residual: add the mean feature of the window to what is read, as the shipped weights do.
    """

    def __init__(
        self,
        vision: int,
        text: int,
        levels: int,
        heads: int = 8,
        strides: Sequence[int] = (4,),
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.residual = heads, residual
        self.question = nn.Linear(text, vision, bias=False)
        self.question_norm = nn.LayerNorm(vision)
        self.query = _Perceptron(vision, vision)
        self.key = _Perceptron(levels * vision, vision)
        self.value = _Perceptron(levels * vision, vision)
        self.shrink = nn.ModuleDict(
            {str(s): nn.Conv2d(vision, vision, s, s, groups=vision, bias=False) for s in strides}
        )
        self.attend_query = nn.Linear(vision, vision)
        self.attend_key = nn.Linear(vision, vision)
        self.attend_value = nn.Linear(vision, vision)
        self.attend_out = nn.Linear(vision, vision)
        self.projector = nn.Sequential(nn.Linear(vision, text), nn.GELU(), nn.Linear(text, text))
        self._start(residual)

    @torch.no_grad()
    def _start(self, residual: bool) -> None:
        """Windows begin as plain means."""
        for stride, convolution in self.shrink.items():
            for weight in convolution.parameters():
                weight.fill_(int(stride) ** -2)
        if residual:
            self.attend_out.weight.zero_()
            self.attend_out.bias.zero_()

    def forward(
        self, features: Tensor, levels: Tensor, question: Tensor, stride: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens as wide as the language model, and what they read.

        Args:
            features: ``[I, R, C, D]`` tower features on their grid.
            levels: ``[I, R, C, levels · D]`` features of several tower layers.
            question: ``[I, T]`` last hidden state of the language model for the question alone.
            stride: s, one of `strides`; divides R and C.

        Returns:
            ``[I, R · C ÷ s², T]`` tokens in reading order, and ``[I, R, C]`` the attention each
            place gets from its window's token, mean over heads; every window sums to 1.
        """
        asked = self.question_norm(self.question(question))[:, None, None]
        query = self.query(features + asked).permute(0, 3, 1, 2)
        query = self.shrink[str(stride)](query).permute(0, 2, 3, 1)[..., None, :]
        key = self._heads(self.attend_key(windows(self.key(levels), stride)))
        value = self._heads(self.attend_value(windows(self.value(levels), stride)))
        query = self._heads(self.attend_query(query))
        logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        paid = logits.softmax(-1)  # [I, r, c, N, 1, s²]
        read = self.attend_out((paid @ value)[..., 0, :].flatten(-2))
        if self.residual:
            read = read + windows(features, stride).mean(3)
        tokens: Tensor = self.projector(read).flatten(1, 2)
        return tokens, unwindowed(paid.mean(3)[..., 0, :], stride)

    def _heads(self, values: Tensor) -> Tensor:
        """``[…, n, D]`` as ``[…, N, n, E]``."""
        return values.reshape(*values.shape[:-1], self.heads, -1).transpose(-2, -3)


def windows(values: Tensor, stride: int) -> Tensor:
    """A grid ``[I, R, C, D]`` as windows ``[I, r, c, s², D]``."""
    images, rows, columns, width = values.shape
    parted = values.reshape(images, rows // stride, stride, columns // stride, stride, width)
    return parted.transpose(2, 3).flatten(3, 4)


def unwindowed(values: Tensor, stride: int) -> Tensor:
    """Windows of numbers ``[I, r, c, s²]`` back on their grid ``[I, R, C]``."""
    parted = values.reshape(*values.shape[:3], stride, stride)
    return parted.transpose(2, 3).flatten(3, 4).flatten(1, 2)
