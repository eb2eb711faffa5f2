"""Sparsifiner's predictor: which keys each query of a vision layer needs, guessed cheaply."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from targets.compression.scoring import precise, ranks


class Predictor(nn.Module):
    """Approximate attention of one layer, of low rank in the tokens.

    ``softmax(q' k'ᵀ / √E) B`` with ``q' = q Wq``, ``k' = (P k) Wk`` (E → E/2, all heads alike); P
    takes S tokens to S/8, B takes them back.

    Args:
        tokens: S, CLS included.
        width: E of a head.
        shrink: tokens are fewer by this factor.
        threshold: entries of B no larger count as zero once trained.
    """

    def __init__(self, tokens: int, width: int, shrink: int, threshold: float) -> None:
        super().__init__()
        rank = math.ceil(tokens / shrink)
        self.query = nn.Linear(width, max(1, width // 2))
        self.key = nn.Linear(width, max(1, width // 2))
        self.down = nn.Parameter(torch.randn(rank, tokens) * tokens**-0.5)
        self.up = nn.Parameter(torch.rand(rank, tokens) * 2 / tokens)
        self.threshold = threshold

    def forward(self, queries: Tensor, keys: Tensor, index: Tensor, alive: Tensor) -> Tensor:
        """Approximate attention ``[I, N, S, S]``.

        Args:
            queries: ``[I, N, S, E]``, float32.
            keys: ``[I, N, S, E]``.
            index: long ``[I, S]``, which of the picture's tokens each one is; fewer than all once
                some are removed, whose part of the projections is left out.
            alive: bool ``[I, S]``, those that are no padding.
        """
        down = self.down[:, index].transpose(0, 1) * alive[:, None]  # [I, R, S]
        small = self.key(down[:, None] @ keys)
        factor = queries.shape[-1] ** -0.5
        coefficients = (self.query(queries) @ small.transpose(-1, -2) * factor).softmax(-1)
        back = self.up if self.training else self.up * (self.up.abs() > self.threshold)
        made: Tensor = coefficients @ back[:, index].transpose(0, 1)[:, None]
        return made


class Connectivity(nn.Module):
    """A predictor for each layer of a vision tower.

    Args:
        layers: how many.
        tokens: S of a picture, CLS included.
        width: E of a head.
        shrink: see `Predictor`.
        threshold: see `Predictor`.
    """

    def __init__(
        self, layers: int, tokens: int, width: int, shrink: int = 8, threshold: float = 1e-4
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.predictors = nn.ModuleList(
            Predictor(tokens, width, shrink, threshold) for _ in range(layers)
        )

    def forward(
        self, layer: int, queries: Tensor, keys: Tensor, index: Tensor, alive: Tensor
    ) -> Tensor:
        """Approximate attention of a layer, ``[I, N, S, S]``; see `Predictor`."""
        made: Tensor = self.predictors[layer](queries, keys, index, alive)
        return made


@torch.no_grad()
def connected(approximate: Tensor, share: float, alive: Tensor, has_cls: bool) -> Tensor:
    """The keys each query attends to, bool ``[I, N, S, S]``.

    Args:
        approximate: attention ``[I, N, S, S]``.
        share: of the living keys, in (0, 1]; ``ceil(share · count)`` of each row.
        alive: bool ``[I, S]``.
        has_cls: the row of CLS attends to everything.
    """
    number = torch.ceil(share * alive.sum(1).double() - 1e-9).long()
    rows = approximate.shape[:3]
    valid = alive[:, None, None].expand(approximate.shape).flatten(0, 2)
    wanted = number[:, None, None].expand(rows).flatten()
    best = ranks(precise(approximate).flatten(0, 2), valid) < wanted[:, None]
    best = best.view(approximate.shape)
    if has_cls:
        best[:, :, 0] = alive[:, None]
    return best
