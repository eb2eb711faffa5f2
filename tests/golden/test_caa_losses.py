"""Every CAA loss against a slow reference written with loops from its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attacks.objectives import (
    absolute_score,
    answer_divergence,
    bpr,
    query_misalignment,
    remaining_content,
    reversed_order,
    score_gap,
)

B, N, V, E, A, VOCAB = 3, 2, 9, 4, 5, 6


@pytest.fixture
def scores() -> Tensor:
    return torch.randn(B, V, generator=torch.Generator().manual_seed(0)) * 2


@pytest.fixture
def promoted() -> Tensor:
    """Groups of different size per sample: 2, 3 and 4 tokens."""
    mask = torch.zeros(B, V, dtype=torch.bool)
    for row, members in enumerate(([1, 5], [0, 2, 8], [3, 4, 6, 7])):
        mask[row, members] = True
    return mask


def members(mask: Tensor, row: int) -> list[int]:
    return [i for i in range(mask.shape[1]) if mask[row, i]]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def cosine(a: Tensor, b: Tensor) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / (math.sqrt(sum(float(x) ** 2 for x in a) * sum(float(y) ** 2 for y in b)))


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_bpr_is_the_mean_over_all_pairs(scores: Tensor, promoted: Tensor, tau: float) -> None:
    wanted = []
    for row in range(B):
        up, down = members(promoted, row), members(~promoted, row)
        pairs = [
            log_sigmoid(float(scores[row, a] - scores[row, b]) / tau) for a in up for b in down
        ]
        wanted.append(-sum(pairs) / len(pairs))
    torch.testing.assert_close(bpr(scores, promoted, ~promoted, tau), torch.tensor(wanted))


def test_reversed_order_pairs_only_what_the_reference_orders(
    scores: Tensor, promoted: Tensor
) -> None:
    clean = scores.round() + 0.3 * scores.flip(1).round()  # rounding makes ties
    wanted = []
    for row in range(B):
        inside = members(promoted, row)
        pairs = [
            log_sigmoid(float(scores[row, i] - scores[row, j]) / 0.7)
            for i in inside
            for j in inside
            if clean[row, i] < clean[row, j]
        ]
        wanted.append(-sum(pairs) / len(pairs) if pairs else 0.0)
    torch.testing.assert_close(reversed_order(scores, clean, promoted, 0.7), torch.tensor(wanted))


def test_score_gap_is_a_difference_of_means(scores: Tensor, promoted: Tensor) -> None:
    wanted = []
    for row in range(B):
        up = [float(scores[row, i]) for i in members(promoted, row)]
        down = [float(scores[row, i]) for i in members(~promoted, row)]
        wanted.append(sum(down) / len(down) - sum(up) / len(up))
    torch.testing.assert_close(score_gap(scores, promoted, ~promoted), torch.tensor(wanted))


def test_absolute_score_asks_nothing_of_the_others(scores: Tensor, promoted: Tensor) -> None:
    live = scores.clone().requires_grad_()
    loss = absolute_score(live, promoted)
    wanted = []
    for row in range(B):
        up = [float(scores[row, i]) for i in members(promoted, row)]
        wanted.append(-sum(up) / len(up))
    torch.testing.assert_close(loss.detach(), torch.tensor(wanted))
    (gradient,) = torch.autograd.grad(loss.sum(), live)
    assert not gradient[~promoted].any()


def test_query_misalignment_averages_heads_then_tokens(promoted: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    keys, query = torch.randn(B, N, V, E, generator=generator), torch.randn(B, N, E)
    wanted = []
    for row in range(B):
        values = [
            sum(cosine(keys[row, h, i], query[row, h]) for h in range(N)) / N
            for i in members(promoted, row)
        ]
        wanted.append(-sum(values) / len(values))
    torch.testing.assert_close(query_misalignment(keys, query, promoted), torch.tensor(wanted))


def test_remaining_content_is_one_for_untouched_features(promoted: Tensor) -> None:
    features = torch.randn(B, V, E, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(remaining_content(features, features, promoted), torch.ones(B))
    moved = features.flip(2)
    wanted = [
        sum(cosine(moved[r, i], features[r, i]) for i in members(promoted, r))
        / len(members(promoted, r))
        for r in range(B)
    ]
    torch.testing.assert_close(remaining_content(moved, features, promoted), torch.tensor(wanted))


def test_answer_divergence_skips_padding() -> None:
    generator = torch.Generator().manual_seed(3)
    clean = torch.randn(B, A, VOCAB, generator=generator).log_softmax(-1)
    attacked = torch.randn(B, A, VOCAB, generator=generator).log_softmax(-1)
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    wanted = []
    for row in range(B):
        terms = [
            sum(
                math.exp(clean[row, a, w]) * float(clean[row, a, w] - attacked[row, a, w])
                for w in range(VOCAB)
            )
            for a in members(real, row)
        ]
        wanted.append(sum(terms) / len(terms))
    torch.testing.assert_close(answer_divergence(clean, attacked, real), torch.tensor(wanted))
    torch.testing.assert_close(answer_divergence(clean, clean, real), torch.zeros(B))


def gradient_of_bpr(scores: Tensor, promoted: Tensor) -> Tensor:
    live = scores.clone().requires_grad_()
    (found,) = torch.autograd.grad(bpr(live, promoted, ~promoted).sum(), live)
    return found


def test_bpr_gradient_vanishes_once_the_order_holds_widely(promoted: Tensor) -> None:
    ordered = torch.where(promoted, 30.0, -30.0)
    assert gradient_of_bpr(ordered, promoted).abs().max() < 1e-12


def test_bpr_gradient_pushes_violated_pairs_apart(promoted: Tensor) -> None:
    violated = torch.where(promoted, -30.0, 30.0)
    gradient = gradient_of_bpr(violated, promoted)
    assert (gradient[promoted] < -0.05).all()
    assert (gradient[~promoted] > 0.05).all()


def test_empty_groups_cost_nothing_and_stay_finite(scores: Tensor) -> None:
    live = scores.clone().requires_grad_()
    nothing = torch.zeros(B, V, dtype=torch.bool)
    loss = bpr(live, nothing, ~nothing) + reversed_order(live, scores, nothing)
    assert loss.tolist() == [0.0] * B
    (gradient,) = torch.autograd.grad(loss.sum(), live)
    assert gradient.isfinite().all()


def test_groups_of_a_neighbour_do_not_change_a_sample(scores: Tensor, promoted: Tensor) -> None:
    together = bpr(scores, promoted, ~promoted)
    for row in range(B):
        one = slice(row, row + 1)
        alone = bpr(scores[one], promoted[one], ~promoted[one])
        torch.testing.assert_close(alone, together[one])
