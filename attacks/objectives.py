"""Losses on how a compressor ranks the visual tokens, and on what the model says; all minimised.

Each is a pure function of tensors, one value per sample ``[B]``. Groups of tokens are bool masks
``[B, V]`` that may differ in size between samples; an empty group or an absent pair gives 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, softplus


def bpr(score: Tensor, winners: Tensor, losers: Tensor, tau: float = 1.0) -> Tensor:
    """Pairwise ranking loss: every winner should score above every loser.

    ``−mean over (a, b) of log sigmoid((s_a − s_b) / tau)``, the Bayesian personalised ranking form
    (Rendle et al., arXiv 1205.2618). Its gradient vanishes on pairs that are apart by much more
    than tau, so the effort goes to the pairs still in the wrong order.

    Args:
        score: ``[B, V]``, live; log-scores make tau independent of the number of tokens.
        winners: bool ``[B, V]``.
        losers: bool ``[B, V]``.
        tau: the gap that counts as settled, in the unit of `score`, > 0.
    """
    upper, upper_real = _pack(score, winners)
    lower, lower_real = _pack(score, losers)
    pairs = upper_real[:, :, None] & lower_real[:, None, :]
    return _mean(softplus((lower[:, None, :] - upper[:, :, None]) / tau), pairs)


def reversed_order(score: Tensor, reference: Tensor, group: Tensor, tau: float = 1.0) -> Tensor:
    """Pairwise ranking loss that reverses a reference order inside a group.

    ``−mean over i, j in the group with r_i < r_j of log sigmoid((s_i − s_j) / tau)``.

    Args:
        score: ``[B, V]``, live.
        reference: ``[B, V]``, the order to reverse (clean scores); ties make no pair.
        group: bool ``[B, V]``.
        tau: the gap that counts as settled, > 0.
    """
    inside, real = _pack(score, group)
    order, _ = _pack(reference, group)
    pairs = real[:, :, None] & real[:, None, :] & (order[:, :, None] < order[:, None, :])
    return _mean(softplus((inside[:, None, :] - inside[:, :, None]) / tau), pairs)


def score_gap(score: Tensor, winners: Tensor, losers: Tensor) -> Tensor:
    """Mean score of the losers minus that of the winners; unlike `bpr` it never saturates.

    Args:
        score: ``[B, V]``, live; log-scores, else one token can carry the mean.
        winners: bool ``[B, V]``.
        losers: bool ``[B, V]``.
    """
    return _mean(score, losers) - _mean(score, winners)


def absolute_score(score: Tensor, winners: Tensor) -> Tensor:
    """Negative mean score of the winners, whatever the others have.

    Args:
        score: ``[B, V]``, live.
        winners: bool ``[B, V]``.
    """
    return -_mean(score, winners)


def query_misalignment(keys: Tensor, query: Tensor, group: Tensor) -> Tensor:
    """Negative mean cosine between the keys of a group and the clean query, per head.

    Args:
        keys: ``[B, N, V, E]``, live, after rotary embedding.
        query: ``[B, N, E]``, detached.
        group: bool ``[B, V]``.
    """
    aligned = cosine_similarity(keys.float(), query.float()[:, :, None], dim=-1).mean(1)  # [B, V]
    return -_mean(aligned, group)


def remaining_content(features: Tensor, reference: Tensor, group: Tensor) -> Tensor:
    """Mean cosine between the features of a group and their clean values; low is erased.

    Args:
        features: ``[B, V, D]``, live.
        reference: ``[B, V, D]``, detached.
        group: bool ``[B, V]``.
    """
    return _mean(cosine_similarity(features.float(), reference.float(), dim=-1), group)


def answer_divergence(reference: Tensor, logprobs: Tensor, positions: Tensor) -> Tensor:
    """KL(reference ‖ current) of next-token distributions, mean over answer positions, in nats.

    Args:
        reference: log-probabilities ``[B, A, vocabulary]``, detached.
        logprobs: log-probabilities ``[B, A, vocabulary]``, live.
        positions: bool ``[B, A]``, the real answer positions.
    """
    reference = reference.float()
    divergence = (reference.exp() * (reference - logprobs.float())).sum(-1)
    return _mean(divergence, positions)


def _pack(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Move a group's values to the front: ``[B, M]`` and which are real, M the largest group.

    Pairs are then |P| × |R| rather than V × V; gradients flow through the gather.
    """
    size = int(group.sum(1).max()) if group.numel() else 0
    first = group.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :size]
    return values.float().gather(1, first), group.gather(1, first)


def _mean(values: Tensor, real: Tensor) -> Tensor:
    """Mean of ``[B, ...]`` over the entries that are real, 0 where there are none: ``[B]``."""
    values = torch.where(real, values, torch.zeros_like(values)).flatten(1)
    return values.sum(1) / real.flatten(1).sum(1).clamp_min(1)
