"""Pure functions compressors score and select with: attention rows, top-k, scales.

Scores are recomputed from queries and keys, so that no attention matrix is ever stored and every
attention implementation gives the same ranking. Nothing here detaches.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-12
"""Added before the logarithm of a probability."""


def attention_row(
    query: Tensor,
    keys: Tensor,
    scaling: float,
    *,
    visible: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of one query row to every column.

    Args:
        query: ``[B, N, E]``.
        keys: ``[B, N, L, E]``.
        scaling: factor on query · key.
        visible: bool ``[B, L]``, columns this row may attend to; None is all.
        softcap: where the model caps its logits, ``softcap · tanh(logit / softcap)``.

    Returns:
        ``[B, N, L]``, at least float32, rows sum to 1.
    """
    logits = _precise((keys @ query.unsqueeze(-1)).squeeze(-1)) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if visible is not None:
        logits = logits.masked_fill(~visible[:, None], torch.finfo(logits.dtype).min)
    return logits.softmax(-1)


def received_attention(queries: Tensor, keys: Tensor, scaling: float, chunk: int = 256) -> Tensor:
    """Mean over all query rows of the attention each column receives.

    Args:
        queries: ``[B, N, L, E]``.
        keys: ``[B, N, L, E]``.
        scaling: factor on query · key.
        chunk: query rows worked on at a time; bounds the memory, not the result.

    Returns:
        ``[B, N, L]``, at least float32, rows sum to 1.
    """
    columns = keys.transpose(-1, -2)
    parts = [
        (_precise(rows @ columns) * scaling).softmax(-1).sum(-2)
        for rows in torch.split(queries, chunk, 2)
    ]
    return torch.stack(parts).sum(0) / queries.shape[2]


def _precise(logits: Tensor) -> Tensor:
    """Half precision becomes float32, as in the attention of the models themselves."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def top_k_mask(score: Tensor, count: int) -> Tensor:
    """The `count` largest entries of each row; of equal ones, the first.

    Args:
        score: ``[B, V]``.
        count: 0 ≤ count ≤ V.

    Returns:
        bool ``[B, V]`` with exactly `count` True a row.
    """
    order = score.detach().argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros_like(score, dtype=torch.bool)
    return kept.scatter(1, order[:, :count], True)


def log_probability(score: Tensor) -> Tensor:
    """``log(score + 1e-12)``: what ranking losses use for attention."""
    return (score + TINY).log()


def standardised(score: Tensor) -> Tensor:
    """Zero mean and unit deviation in each row ``[B, V]``; zero where a row is constant."""
    centred = score - score.mean(1, keepdim=True)
    # The deviation of a constant row has no gradient, so the floor goes under the root.
    return centred / (centred.square().mean(1, keepdim=True) + TINY).sqrt()


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows of ``[B, n, …]`` chosen by ``index [B, k]``: ``[B, k, …]``."""
    wide = index.reshape(*index.shape, *[1] * (values.dim() - 2))
    return values.gather(1, wide.expand(*index.shape, *values.shape[2:]))
