"""Rankings, evidence and the swap test, against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from redteam import diagnosis
from redteam.diagnosis import Kept, Places, compare, evidence_tokens, judge, kendall, spearman
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
    found = compare(clean, attacked, grid(3, 4), np.arange(12) >= 9)
    assert found.kept_clean == [9, 10, 11]
    assert found.kept_attacked == [0, 10, 11]
    assert found.jaccard == 0.5
    assert found.top_preserved == 0.5  # the top 2 of 12 were 10 and 11, now 0 and 11
    assert found.bottom_infiltrated == 0.5  # of 0 and 1, 0 came up
    assert found.evidence == [9, 10, 11]
    assert (found.evidence_kept_clean, found.evidence_kept_attacked) == (1.0, 2 / 3)


def test_what_is_not_known_is_none() -> None:
    flat = Kept(np.array([True, False]), np.zeros(2))
    found = compare(flat, flat, grid(1, 2), None)
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


def grid(rows: int, columns: int) -> Places:
    corners = [(float(r), float(c)) for r in range(rows) for c in range(columns)]
    boxes = np.array([(top, left, top + 1, left + 1) for top, left in corners])
    return Places(boxes, (rows, columns), (rows, columns))


def middle() -> Places:
    """A 3 × 5 grid of 4-pixel tokens in the middle of a larger picture."""
    corners = [(2.0 + 4 * row, 1.0 + 4 * column) for row in range(3) for column in range(5)]
    boxes = np.array([(top, left, top + 4, left + 4) for top, left in corners])
    return Places(boxes, (3, 5), (16, 24))


def test_a_grid_over_the_whole_picture_is_plain() -> None:
    boxes = np.array([(3 * r, 4 * c, 3 * r + 3, 4 * c + 4) for r in range(2) for c in range(3)])
    assert Places(boxes.astype(float), (2, 3), (6, 12)).plain
    assert not Places(boxes.astype(float), (2, 3), (6, 13)).plain
    assert not Places(boxes.astype(float)[::-1], (2, 3), (6, 12)).plain
    assert not middle().plain
    kept = Kept(np.ones(15, dtype=bool), np.arange(15.0))
    assert compare(kept, kept, middle(), None).boxes == [tuple(b) for b in middle().boxes.tolist()]


def test_evidence_needs_a_tenth_of_a_token() -> None:
    covers = middle()
    one_pixel = evidence_tokens(covers, ((1, 2, 2, 3),))
    two_pixels = evidence_tokens(covers, ((1, 2, 3, 3),))
    assert np.flatnonzero(one_pixel).tolist() == []
    assert np.flatnonzero(two_pixels).tolist() == [0]
    outside = evidence_tokens(covers, ((22, 0, 24, 2),))
    assert not outside.any()
    several = evidence_tokens(covers, ((1, 2, 9, 6), (17, 10, 21, 14)))
    assert np.flatnonzero(several).tolist() == [0, 1, 14]
