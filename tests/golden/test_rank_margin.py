"""Rank margin, and the attack on it, against their formulas written out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from attacks.force_fallback import SOFTNESS, Grid, agreement, crowding, soft_overlap
from defenses.rank_margin import boundary_gap, overlap, rank_agreement, threshold_for
from defenses.translation_consensus import Aligned, public_moves
from tests.fakes import FakeView


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def best(score: Sequence[float], count: int) -> set[int]:
    return set(sorted(range(len(score)), key=lambda i: (-score[i], i))[:count])


def standard(score: Sequence[float]) -> list[float]:
    mean = sum(score) / len(score)
    deviation = math.sqrt(sum((one - mean) ** 2 for one in score) / len(score))
    return [(one - mean) / deviation for one in score]


def sign(value: float) -> int:
    return (value > 0) - (value < 0)


COUNTS = torch.tensor([1, 4, 11])


def test_the_overlap_of_kept_sets() -> None:
    scores = [rand(3, 11, seed=seed) for seed in range(4)]
    scores[1][0] = scores[0][0]
    wanted = []
    for row, count in enumerate(COUNTS.tolist()):
        sets = [best(one[row].tolist(), count) for one in scores]
        pairs = [len(a & b) / len(a | b) for a, b in itertools.combinations(sets, 2)]
        wanted.append(sum(pairs) / len(pairs))
    torch.testing.assert_close(overlap(scores, COUNTS), torch.tensor(wanted))
    assert wanted[2] == 1.0
    assert float(overlap([scores[0], scores[0]], COUNTS)[1]) == 1.0


def test_the_gap_at_the_boundary() -> None:
    score = rand(3, 11)
    wanted = []
    for row, count in zip(score.tolist(), COUNTS.tolist(), strict=True):
        falling = sorted(standard(row), reverse=True)
        gap = math.inf if count == len(row) else falling[count - 1] - falling[count]
        wanted.append(1.0 if math.isinf(gap) else gap / (1 + gap))
    torch.testing.assert_close(boundary_gap(score, COUNTS), torch.tensor(wanted))
    assert boundary_gap(torch.ones(1, 5), torch.tensor([2])).tolist() == [0.0]


def test_the_agreement_of_whole_rankings() -> None:
    own, others = rand(3, 7), [rand(3, 7, seed=seed) for seed in (1, 2)]
    own[0] = torch.arange(7.0)
    others[0][0], others[1][0] = torch.arange(7.0), -torch.arange(7.0)
    others[1][2, :4] = 0.5  # ties
    wanted = []
    for row in range(3):
        taus = []
        for other in others:
            a, b = own[row].tolist(), other[row].tolist()
            pairs = list(itertools.combinations(range(7), 2))
            total = sum(sign(a[i] - a[j]) * sign(b[i] - b[j]) for i, j in pairs)
            taus.append(total / len(pairs))
        wanted.append((sum(taus) / 2 + 1) / 2)
    torch.testing.assert_close(rank_agreement(own, others), torch.tensor(wanted))
    assert wanted[0] == 0.5, "one view alike and one reversed"
    assert rank_agreement(torch.ones(2, 1), [torch.ones(2, 1)]).tolist() == [1, 1]


@pytest.mark.parametrize("rate", [0, 0.05, 0.2, 0.9])
def test_at_most_the_rate_falls_back(rate: float) -> None:
    values = [*rand(40).tolist(), 0.5, 0.5, 0.5, 1.0, 1.0, 0.0]
    threshold = threshold_for(values, rate)
    assert sum(one < threshold for one in values) <= rate * len(values)
    higher = [one for one in values if one > threshold]
    # ties aside, a larger threshold would let too many fall back
    assert not higher or sum(one <= threshold for one in values) > rate * len(values)


def test_where_all_are_stable_none_falls_back() -> None:
    assert threshold_for([1.0, 1.0], 0.5) < 1.0


def test_the_relaxed_overlap() -> None:
    scores = [rand(2, 9, seed=seed) for seed in range(3)]
    counts = torch.tensor([2, 9])
    wanted = []
    for row, count in enumerate(counts.tolist()):
        among = []
        for one in scores:
            z = standard(one[row].tolist())
            falling = sorted(z, reverse=True)
            bar = (falling[count - 1] + falling[min(count, 8)]) / 2
            among.append([1 / (1 + math.exp(-(value - bar) / SOFTNESS)) for value in z])
        pairs = []
        for a, b in itertools.combinations(among, 2):
            both = sum(x * y for x, y in zip(a, b, strict=True))
            pairs.append(both / sum(x + y - x * y for x, y in zip(a, b, strict=True)))
        wanted.append(sum(pairs) / len(pairs))
    torch.testing.assert_close(soft_overlap(scores, counts), torch.tensor(wanted))


def test_the_relaxed_agreement() -> None:
    scores = [rand(2, 6, seed=seed) for seed in range(3)]
    wanted = []
    for row in range(2):
        z = [standard(one[row].tolist()) for one in scores]

        def order(values: list[float], i: int, j: int) -> float:
            return math.tanh((values[i] - values[j]) / SOFTNESS)

        pairs = list(itertools.permutations(range(6), 2))
        means = [
            sum(order(z[0], i, j) * order(other, i, j) for i, j in pairs) / len(pairs)
            for other in z[1:]
        ]
        wanted.append(sum(means) / 2)
    torch.testing.assert_close(agreement(scores), torch.tensor(wanted))


def test_how_near_tokens_lie_to_the_boundary() -> None:
    score, counts = rand(2, 8), torch.tensor([3, 8])
    wanted = []
    for row, count in zip(score.tolist(), counts.tolist(), strict=True):
        z = standard(row)
        falling = sorted(z, reverse=True)
        bar = (falling[count - 1] + falling[min(count, 7)]) / 2
        wanted.append(sum(math.exp(-(((one - bar) / SOFTNESS) ** 2)) for one in z) / len(z))
    torch.testing.assert_close(crowding(score, counts), torch.tensor(wanted))


def test_the_attack_aligns_views_as_the_defence_does() -> None:
    view = FakeView()
    grid = Grid.of(view, 24, (16, 24), torch.device("cpu"))
    assert (grid.shape, grid.pitch, grid.shift) == ((4, 6), (4, 4), 2)
    values = rand(3, 24)
    torch.testing.assert_close(grid.moved_back(values, 0, 0), values)
    for down, right in public_moves(grid.shift):
        defence = Aligned((4, 6), (4, 4), ((down,) * 3, (right,) * 3))
        mine = grid.moved_back(values, down // grid.shift, right // grid.shift)
        torch.testing.assert_close(mine, defence(values))
