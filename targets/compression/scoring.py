"""Pure functions compressors score and select with: attention rows, top-k, scales.

Scores are recomputed from queries and keys, so that no attention matrix is ever stored and every
attention implementation gives the same ranking. Nothing here detaches.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-12
"""Added before the logarithm of a probability."""
FAINT = 1e-6
"""Added before the logarithm of a distance: smaller ones are rounding."""


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
    logits = precise((keys @ query.unsqueeze(-1)).squeeze(-1)) * scaling
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
        (precise(rows @ columns) * scaling).softmax(-1).sum(-2)
        for rows in torch.split(queries, chunk, 2)
    ]
    return torch.stack(parts).sum(0) / queries.shape[2]


def precise(values: Tensor) -> Tensor:
    """Half precision becomes float32, as in the attention of the models themselves."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def top_k_mask(score: Tensor, count: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """The `count` largest entries of each row; of equal ones, the first.

    Args:
        score: ``[B, V]``.
        count: 0 ≤ count ≤ valid entries; one for all rows, or ``[B]``.
        valid: bool ``[B, V]``, entries that may be chosen; None is all.

    Returns:
        bool ``[B, V]`` with exactly `count` True a row.
    """
    return ranks(score, valid) < (count[:, None] if isinstance(count, Tensor) else count)


def ranks(score: Tensor, valid: Tensor | None = None) -> Tensor:
    """Place of each entry when rows ``[B, V]`` are sorted from large to small, from 0.

    Equal entries keep their order; those not valid come last.
    """
    order = order_of(score, valid)
    places = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)


def order_of(score: Tensor, valid: Tensor | None = None) -> Tensor:
    """Indices ``[B, V]`` from the largest to the smallest, stable; those not valid come last."""
    order = score.detach().argsort(dim=1, descending=True, stable=True)
    if valid is None:
        return order
    late = (~valid).long().gather(1, order).argsort(dim=1, stable=True)
    return order.gather(1, late)


def log_probability(score: Tensor) -> Tensor:
    """``log(score + 1e-12)``: what ranking losses use for attention."""
    return (score + TINY).log()


def standardised(score: Tensor, valid: Tensor | None = None) -> Tensor:
    """Zero mean and unit deviation in each row ``[B, V]``; zero where a row is constant.

    Args:
        score: ``[B, V]``.
        valid: bool ``[B, V]``, entries that count; the others become 0. None is all.
    """
    if valid is None:
        valid = torch.ones_like(score, dtype=torch.bool)
    number = valid.sum(1, keepdim=True).clamp_min(1)
    score = score.masked_fill(~valid, 0)
    centred = (score - score.sum(1, keepdim=True) / number).masked_fill(~valid, 0)
    # The deviation of a constant row has no gradient, so the floor goes under the root.
    return centred / (centred.square().sum(1, keepdim=True) / number + TINY).sqrt()


def standardised_log(score: Tensor, valid: Tensor | None = None) -> Tensor:
    """`standardised` logarithm, for distances, gains and their products.

    These span orders of magnitude, and where tokens are chosen one after another the largest would
    hide the differences around the last one chosen.

    Args:
        score: ``[B, V]``, ≥ 0.
        valid: bool ``[B, V]``, entries that count; the others become 0. None is all.
    """
    return standardised((score + FAINT).log(), valid)


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows of ``[B, n, …]`` chosen by ``index [B, k]``: ``[B, k, …]``."""
    wide = index.reshape(*index.shape, *[1] * (values.dim() - 2))
    return values.gather(1, wide.expand(*index.shape, *values.shape[2:]))
