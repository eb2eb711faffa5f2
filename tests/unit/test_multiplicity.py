from itertools import chain, combinations

import numpy as np
import pytest

from reports.multiplicity import holm


def closed(p_values: list[float]) -> list[float]:
    """Holm by its definition as a closed test: of all sets with a test, the worst Bonferroni."""
    size = len(p_values)
    sets = list(chain.from_iterable(combinations(range(size), r) for r in range(1, size + 1)))
    return [
        max(min(1.0, len(one) * min(p_values[i] for i in one)) for one in sets if index in one)
        for index in range(size)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_holm_is_the_closed_test_of_bonferroni(seed: int) -> None:
    p_values = (np.random.default_rng(seed).random(6) ** 3).tolist()
    assert holm(p_values) == pytest.approx(closed(p_values))


def test_holm_worked_by_hand() -> None:
    # 3 × 0.01; then 2 × 0.02, and 1 × 0.03, which may not fall below it.
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])


def test_one_test_needs_no_correction_and_none_gives_none() -> None:
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_tests_with_stricter_levels_are_judged_by_their_own() -> None:
    # p ÷ level is 0.2 and 0.5, so the first is asked at level ÷ 2, the second at its level.
    assert holm([0.01, 0.005], [0.05, 0.01]) == pytest.approx([0.02, 0.005])
    assert holm([0.02, 0.02], [0.05, 0.01]) == pytest.approx([0.04, 0.02])


def test_any_false_alarm_is_as_rare_as_it_says() -> None:
    rng, alarms = np.random.default_rng(1), 0
    for _ in range(4_000):
        true_ones = rng.random(8).tolist()  # uniform where nothing is wrong
        alarms += min(holm([*true_ones, 1e-6, 1e-5])[:8]) <= 0.05
    assert 0.035 <= alarms / 4_000 <= 0.06
