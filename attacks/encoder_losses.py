"""What the encoder attacks want of a vision tower's scores and features, and who survives a cut.

Each is a pure function of tensors. Ranks count from 0, the most important token; equal scores rank
in the order of their places. Ranks carry no gradient, so neither do weights made of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

PUBLISHED_TOKENS = 576
"""Visual tokens of LLaVA-1.5, for which the papers give their counts."""
_FLAT = 1e-8
"""Standard deviation at or below which values count as equal."""


def published_count(count: int, tokens: int) -> int:
    """A paper's count of 576 tokens as the same share of `tokens`; at least 1."""
    return max(1, round(count * tokens / PUBLISHED_TOKENS))


def ranks(score: Tensor) -> Tensor:
    """Rank of each token, long ``[B, V]``: 0 for the highest score.

    Args:
        score: ``[B, V]``.
    """
    order = score.argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1, stable=True)


def standardised(values: Tensor, floor: float = _FLAT) -> Tensor:
    """Values ``[B, V]`` minus their mean, over their (population) standard deviation.

    Args:
        values: live; float32 comes back.
        floor: the least standard deviation to divide by; the gradient of flat rows stays finite.
    """
    values = values.float()
    centred = values - values.mean(1, keepdim=True)
    variance = centred.square().mean(1, keepdim=True)
    return centred / variance.clamp_min(floor**2).sqrt()


def drift(features: Tensor, reference: Tensor) -> Tensor:
    """``1 − cos`` of each token's features and its clean ones, ``[B, V]`` in [0, 2].

    Args:
        features: ``[B, V, D]``, live.
        reference: ``[B, V, D]``, detached.
    """
    return 1 - cosine_similarity(features.float(), reference.float(), dim=-1)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """``Σ w·x / Σ w`` over tokens, ``[B]``; 0 where all weights are 0."""
    total = weights.sum(1)
    return (weights * values).sum(1) / total.clamp_min(1e-6)


def survival(score: Tensor, k_min: int, k_max: int) -> Tensor:
    """CAGE's chance that a token survives when nobody knows the budget K.

    ``π_i = clip((Kmax − r_i) / (Kmax − Kmin), 0, 1)``: the share of the budgets Kmin + 1 … Kmax
    that keep the token, and of the real numbers in [Kmin, Kmax] that are above its rank.

    Args:
        score: ``[B, V]``; the weights are detached from it.
        k_min: smallest budget imagined, in tokens.
        k_max: largest; if it is `k_min`, π is 1 for the k_max best tokens and 0 for the others.

    Returns:
        π, ``[B, V]`` in [0, 1].
    """
    width = max(k_max - k_min, 1)
    return ((k_max - ranks(score)) / width).clamp(0, 1)


def drift_alignment(moved: Tensor, score: Tensor, *, rescaled: bool = False) -> Tensor:
    """CAGE's rank–distortion alignment: do the tokens that drifted most have the highest scores?

    ``raw = Σ_i p_d,i · log p_s,i`` with ``p = softmax`` of the standardised drift (detached) and
    of the standardised score.

    Args:
        moved: drift of the tokens, ``[B, V]``; detached here.
        score: ``[B, V]``, live.
        rescaled: ``(raw + log V) / log V``, as the published code has it, which is at most 1.

    Returns:
        ``[B]``, larger is better aligned.
    """
    target = standardised(moved.detach(), floor=1e-6).softmax(1)
    raw = (target * standardised(score).log_softmax(1)).sum(1)
    if not rescaled or score.shape[1] < 2:
        return raw
    return raw / math.log(score.shape[1]) + 1


def attention_on(score: Tensor, group: Tensor) -> Tensor:
    """Sum of the scores of a group, ``[B]``.

    Args:
        score: ``[B, V]``, live.
        group: bool ``[B, V]``.
    """
    return (score.float() * group).sum(1)


def inverted_ranking(score: Tensor, clean_ranks: Tensor) -> Tensor:
    """CIRA's L_GSH: Pearson correlation of the scores with the clean ranks, ``[B]`` in [−1, 1].

    1 where the clean ranking is turned upside down, along a straight line.

    Args:
        score: ``[B, V]``, live.
        clean_ranks: long ``[B, V]``, see `ranks`; their scale does not matter.
    """
    return (standardised(score) * standardised(clean_ranks)).mean(1)


def displacement(clean_ranks: Tensor, attacked_ranks: Tensor, k_min: int, k_max: int) -> Tensor:
    """CIRA's chance that a token is kept clean and lost under attack, K unknown, ``[B, V]``.

    ``w_i = [min(Kmax, r_i^a) − max(Kmin, r_i^c + 1) + 1]_+ / (Kmax − Kmin + 1)``: the share of the
    budgets Kmin … Kmax that do so (the paper counts ranks from 1).

    Args:
        clean_ranks: long ``[B, V]``.
        attacked_ranks: long ``[B, V]``.
        k_min: smallest budget, in tokens.
        k_max: largest.
    """
    first, last = (clean_ranks + 1).clamp_min(k_min), attacked_ranks.clamp_max(k_max)
    return (last - first + 1).clamp_min(0) / (k_max - k_min + 1)


def best_tokens(score: Tensor, count: int) -> Tensor:
    """The `count` tokens of highest score, bool ``[B, V]``; all of them where there are fewer."""
    return torch.lt(ranks(score), count)
