"""Every loss of the encoder attacks against a slow reference, and survival weights by counting."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attacks.encoder_losses import (
    attention_on,
    best_tokens,
    displacement,
    drift,
    drift_alignment,
    inverted_ranking,
    published_count,
    ranks,
    standardised,
    survival,
    weighted_mean,
)

B, V, D = 3, 11, 5


@pytest.fixture
def score() -> Tensor:
    return torch.rand(B, V, generator=torch.Generator().manual_seed(0)) / V


@pytest.fixture
def features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, V, D, generator=generator), torch.randn(B, V, D, generator=generator)


def slow_ranks(row: list[float]) -> list[int]:
    """How many tokens come before each: larger ones, and equal ones further to the left."""
    return [
        sum(other > mine or (other == mine and j < i) for j, other in enumerate(row))
        for i, mine in enumerate(row)
    ]


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def z(row: list[float]) -> list[float]:
    mean, deviation = statistics.fmean(row), statistics.pstdev(row)
    return [(x - mean) / deviation for x in row]


def cosine(a: Tensor, b: Tensor) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(x) ** 2 for x in a) * sum(float(y) ** 2 for y in b))


orders = st.integers(1, 12).flatmap(lambda size: st.permutations(range(size)))


def budgets(tokens: int) -> st.SearchStrategy[tuple[int, int]]:
    ends = st.tuples(st.integers(1, tokens), st.integers(1, tokens))
    return ends.map(lambda pair: (min(pair), max(pair)))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_survival_counts_the_budgets_that_keep_a_token(data: st.DataObject) -> None:
    order = data.draw(orders)
    k_min, k_max = data.draw(budgets(len(order)))
    found = survival(torch.tensor([order], dtype=torch.float32), k_min, k_max)[0].tolist()
    rank = slow_ranks([float(one) for one in order])
    # K in tokens: k_min + 1 … k_max, or the one budget there is.
    imagined = range(k_min + 1, k_max + 1) if k_max > k_min else [k_max]
    for place, chance in enumerate(found):
        kept = [rank[place] < k for k in imagined]
        assert chance == pytest.approx(sum(kept) / len(kept))
    # K uniform over the real numbers of [k_min, k_max], by the midpoint rule.
    if k_max > k_min:
        points = [k_min + (k_max - k_min) * (i + 0.5) / 500 for i in range(500)]
        for place, chance in enumerate(found):
            area = sum(rank[place] < point for point in points) / len(points)
            assert chance == pytest.approx(area, abs=2e-3)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_displacement_counts_the_budgets_that_lose_a_token(data: st.DataObject) -> None:
    clean = data.draw(orders)
    attacked = data.draw(st.permutations(range(len(clean))))
    k_min, k_max = data.draw(budgets(len(clean)))
    before, after = torch.tensor([clean]), torch.tensor([attacked])  # these are ranks
    found = displacement(before, after, k_min, k_max)[0].tolist()
    for place, chance in enumerate(found):
        lost = [
            clean[place] < k and not attacked[place] < k  # among the k best, and no longer
            for k in range(k_min, k_max + 1)
        ]
        assert chance == pytest.approx(sum(lost) / len(lost))


def test_ranks_count_from_the_best_and_break_ties_by_place() -> None:
    score = torch.tensor([[0.2, 0.9, 0.2, 0.1, 0.9], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert ranks(score).tolist() == [slow_ranks(row) for row in score.tolist()]
    assert ranks(score).tolist() == [[2, 0, 3, 4, 1], [0, 1, 2, 3, 4]]
    assert best_tokens(score, 2).tolist() == [
        [False, True, False, False, True],
        [True, True, False, False, False],
    ]
    assert bool(best_tokens(score, 9).all())


@pytest.mark.parametrize(
    ("count", "tokens", "wanted"),
    [(16, 576, 16), (16, 144, 4), (192, 144, 48), (64, 144, 16), (32, 2880, 160), (16, 9, 1)],
)
def test_counts_are_shares_of_576(count: int, tokens: int, wanted: int) -> None:
    assert published_count(count, tokens) == wanted


def test_drift_is_one_minus_cosine(features: tuple[Tensor, Tensor]) -> None:
    moved, clean = features
    wanted = [[1 - cosine(moved[b, v], clean[b, v]) for v in range(V)] for b in range(B)]
    torch.testing.assert_close(drift(moved, clean), torch.tensor(wanted))
    torch.testing.assert_close(drift(clean, clean), torch.zeros(B, V), rtol=0, atol=1e-6)


def test_expected_drift(score: Tensor, features: tuple[Tensor, Tensor]) -> None:
    """CAGE's L_EFD, from its formula."""
    moved, clean = features
    wanted = []
    for b in range(B):
        rank = slow_ranks(score[b].tolist())
        pi = [min(max((8 - r) / (8 - 3), 0.0), 1.0) for r in rank]
        d = [1 - cosine(moved[b, v], clean[b, v]) for v in range(V)]
        wanted.append(sum(p * x for p, x in zip(pi, d, strict=True)) / sum(pi))
    found = weighted_mean(drift(moved, clean), survival(score, 3, 8))
    torch.testing.assert_close(found, torch.tensor(wanted))


@pytest.mark.parametrize("rescaled", [False, True])
def test_drift_alignment(score: Tensor, features: tuple[Tensor, Tensor], rescaled: bool) -> None:
    """CAGE's L_RDA, from its formula and as its code rescales it."""
    moved = drift(*features)
    wanted = []
    for b in range(B):
        p_d, p_s = softmax(z(moved[b].tolist())), softmax(z(score[b].tolist()))
        raw = sum(p * math.log(q) for p, q in zip(p_d, p_s, strict=True))
        wanted.append((raw + math.log(V)) / math.log(V) if rescaled else raw)
    found = drift_alignment(moved, score, rescaled=rescaled)
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_aligned_scores_score_highest(features: tuple[Tensor, Tensor]) -> None:
    moved = drift(*features)
    best = drift_alignment(moved, moved * 3 + 1)
    for other in (moved.flip(1), -moved, torch.rand(B, V)):
        assert bool((drift_alignment(moved, other) < best).all())
    assert bool((drift_alignment(moved, moved, rescaled=True) <= 1).all())


def test_no_gradient_goes_through_weights(score: Tensor, features: tuple[Tensor, Tensor]) -> None:
    """π, w and p_d are constants: only d in L_EFD and p_s in L_RDA are live."""
    live_score, moved = score.clone().requires_grad_(), drift(*features).requires_grad_()
    for weights in (
        survival(live_score, 3, 8),
        displacement(ranks(live_score.flip(1)), ranks(live_score), 3, 8),
    ):
        assert not weights.requires_grad
    aligned = drift_alignment(moved, live_score).sum()
    to_drift, to_score = torch.autograd.grad(aligned, (moved, live_score), allow_unused=True)
    assert to_drift is None
    assert to_score is not None
    step = 1e-5
    exact = score.double()
    for b, v in ((0, 0), (1, 4), (2, 10)):
        up, down = exact.clone(), exact.clone()
        up[b, v] += step
        down[b, v] -= step
        slope = _slow_alignment(moved, up, b) - _slow_alignment(moved, down, b)
        assert float(to_score[b, v]) == pytest.approx(slope / (2 * step), rel=2e-3, abs=1e-3)


def _slow_alignment(moved: Tensor, score: Tensor, row: int) -> float:
    p_d, p_s = softmax(z(moved[row].tolist())), softmax(z(score[row].tolist()))
    return sum(p * math.log(q) for p, q in zip(p_d, p_s, strict=True))


def test_inverted_ranking_is_pearson(score: Tensor) -> None:
    clean = torch.rand(B, V, generator=torch.Generator().manual_seed(2))
    wanted = []
    for b in range(B):
        rank = slow_ranks(clean[b].tolist())
        target = [r / (V - 1) for r in rank]  # (r − 1) / (N − 1) of ranks from 1
        wanted.append(statistics.correlation(score[b].tolist(), target))
    found = inverted_ranking(score, ranks(clean))
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(order=orders.filter(lambda order: len(order) > 1), scale=st.floats(1e-4, 1e3))
def test_inverted_ranking_ends_at_one(order: list[int], scale: float) -> None:
    clean = torch.tensor([order])
    upside_down = clean.float() * scale  # the worst rank has the highest score
    assert float(inverted_ranking(upside_down, clean)) == pytest.approx(1, abs=1e-4)
    assert float(inverted_ranking(-upside_down, clean)) == pytest.approx(-1, abs=1e-4)


def test_flat_scores_leave_finite_gradients() -> None:
    flat = torch.full((2, 6), 0.25, requires_grad=True)
    order = torch.arange(6).expand(2, 6)
    loss = inverted_ranking(flat, order) + drift_alignment(torch.zeros(2, 6), flat)
    (gradient,) = torch.autograd.grad(loss.sum(), flat)
    assert bool(gradient.isfinite().all())
    assert standardised(flat).abs().max() == 0
    single = inverted_ranking(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.long))
    assert single.tolist() == [0, 0]


def test_preserved_drift(score: Tensor, features: tuple[Tensor, Tensor]) -> None:
    """CIRA's −L_HEP, from its formula with ranks from 1."""
    moved, clean = features
    before = torch.rand(B, V, generator=torch.Generator().manual_seed(3))
    wanted = []
    for b in range(B):
        r_c = [r + 1 for r in slow_ranks(before[b].tolist())]
        r_a = [r + 1 for r in slow_ranks(score[b].tolist())]
        w = [max(min(8, a - 1) - max(3, c) + 1, 0) / 6 for c, a in zip(r_c, r_a, strict=True)]
        d = [(1 - cosine(moved[b, v], clean[b, v])) / 2 for v in range(V)]
        wanted.append(sum(x * y for x, y in zip(w, d, strict=True)) / sum(w))
    weights = displacement(ranks(before), ranks(score), 3, 8)
    found = weighted_mean(drift(moved, clean) / 2, weights)
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_nothing_displaced_costs_nothing(score: Tensor) -> None:
    moved = torch.rand(B, V, requires_grad=True)
    loss = weighted_mean(moved, displacement(ranks(score), ranks(score), 3, 8))
    assert loss.tolist() == [0.0] * B
    (gradient,) = torch.autograd.grad(loss.sum(), moved)
    assert bool((gradient == 0).all())


def test_attention_on_a_group_is_its_sum(score: Tensor) -> None:
    group = best_tokens(score.flip(1), 4)
    wanted = [sum(float(score[b, v]) for v in range(V) if group[b, v]) for b in range(B)]
    torch.testing.assert_close(attention_on(score, group), torch.tensor(wanted))
