"""Rankings, evidence and the swap test, against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from redteam import diagnosis
from redteam.diagnosis import Kept, compare, evidence_tokens, judge, kendall, spearman, token_map
from reports.records import Diagnosis

numbers = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=60).map(
    lambda pairs: np.array(pairs, dtype=np.float64).T
)


@given(numbers)
def test_correlations_equal_scipy(pair: np.ndarray) -> None:
    first, second = pair
    constant = np.ptp(first) == 0 or np.ptp(second) == 0
    rho, tau = spearman(first, second), kendall(first, second)
    if constant:
        assert rho is None
        assert tau is None
        return
    assert rho == pytest.approx(scipy.stats.spearmanr(first, second).statistic, abs=1e-12)
    assert tau == pytest.approx(scipy.stats.kendalltau(first, second).statistic, abs=1e-12)


def test_kendall_in_blocks_equals_kendall_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 700))
    whole = scipy.stats.kendalltau(first, second).statistic
    assert kendall(first, second) == pytest.approx(whole, abs=1e-12)
    monkeypatch.setattr(diagnosis, "_ROWS", 7)
    assert kendall(first, second) == pytest.approx(whole, abs=1e-12)


def kept(score: list[float], count: int) -> Kept:
    values = np.array(score)
    chosen = np.zeros(len(values), dtype=bool)
    chosen[np.argsort(-values, kind="stable")[:count]] = True
    return Kept(chosen, values)


def test_two_passes_side_by_side() -> None:
    score = [float(value) for value in range(12)]
    clean, attacked = kept(score, 3), kept([11.5, *score[1:]], 3)
    found = compare(clean, attacked, (3, 4), np.arange(12) >= 9)
    assert found.kept_clean == [9, 10, 11]
    assert found.kept_attacked == [0, 10, 11]
    assert found.jaccard == 0.5
    assert found.top_preserved == 0.5  # the top 2 of 12 were 10 and 11, now 0 and 11
    assert found.bottom_infiltrated == 0.5  # of 0 and 1, 0 came up
    assert found.evidence == [9, 10, 11]
    assert (found.evidence_kept_clean, found.evidence_kept_attacked) == (1.0, 2 / 3)


def test_what_is_not_known_is_none() -> None:
    flat = Kept(np.array([True, False]), np.zeros(2))
    found = compare(flat, flat, (1, 2), None)
    assert (found.spearman, found.kendall, found.top_preserved) == (None, None, None)
    assert (found.evidence, found.evidence_kept_clean) == (None, None)
    assert found.jaccard == 1.0


@pytest.mark.parametrize(
    ("recovered", "reproduced", "cause"),
    [
        (True, True, Diagnosis.RANKING),
        (True, False, Diagnosis.RANKING_PARTIAL),
        (False, True, Diagnosis.MIXED),
        (False, False, Diagnosis.CONTENT),
    ],
)
def test_the_swap_test_is_judged(recovered: bool, reproduced: bool, cause: Diagnosis) -> None:
    assert judge(recovered=recovered, reproduced=reproduced) is cause


def to_pixels(tokens: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A 3 × 5 grid of 4-pixel tokens in the middle of a larger picture."""
    grid = tokens.float().view(len(tokens), 1, 3, 5)
    big = grid.repeat_interleave(4, 2).repeat_interleave(4, 3)
    return torch.nn.functional.pad(big, (1, size[1] - 21, 2, size[0] - 14))


def test_every_pixel_knows_its_token() -> None:
    covers = token_map(to_pixels, 15, (16, 24))
    expected = np.full((16, 24), -1)
    for row in range(3):
        for column in range(5):
            top, left = 2 + 4 * row, 1 + 4 * column
            expected[top : top + 4, left : left + 4] = row * 5 + column
    assert (covers == expected).all()


def test_evidence_needs_a_tenth_of_a_token() -> None:
    covers = token_map(to_pixels, 15, (16, 24))
    one_pixel = evidence_tokens(covers, 15, ((1, 2, 2, 3),))
    two_pixels = evidence_tokens(covers, 15, ((1, 2, 3, 3),))
    assert np.flatnonzero(one_pixel).tolist() == []
    assert np.flatnonzero(two_pixels).tolist() == [0]
    outside = evidence_tokens(covers, 15, ((22, 0, 24, 2),))
    assert not outside.any()
    several = evidence_tokens(covers, 15, ((1, 2, 9, 6), (17, 10, 21, 14)))
    assert np.flatnonzero(several).tolist() == [0, 1, 14]
