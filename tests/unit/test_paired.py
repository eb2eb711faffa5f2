import math
import random

import numpy as np
import pytest
from scipy import stats

from reports.paired import PairedTable, newcombe, newcombe_ends, sign_test
from reports.statistics import EMPTY, Estimate, mcnemar_exact, normal_quantile


def slow_newcombe(table: PairedTable, confidence: float) -> tuple[float, float]:
    """Method 10 as its equations read, with scipy's Wilson intervals."""
    a, b, c, d = (int(one) for one in table.counts)
    n = a + b + c + d
    first = stats.binomtest(a + b, n).proportion_ci(confidence, method="wilson")
    second = stats.binomtest(a + c, n).proportion_ci(confidence, method="wilson")
    p1, p2 = (a + b) / n, (a + c) / n
    product = (a + b) * (c + d) * (a + c) * (b + d)
    numerator = a * d - b * c
    if numerator > n / 2:
        numerator -= n / 2
    elif numerator > 0:
        numerator = 0
    phi = numerator / math.sqrt(product) if product else 0
    low = (p1 - first.low) ** 2 - 2 * phi * (p1 - first.low) * (second.high - p2)
    low += (second.high - p2) ** 2
    high = (first.high - p1) ** 2 - 2 * phi * (first.high - p1) * (p2 - second.low)
    high += (p2 - second.low) ** 2
    return p1 - p2 - math.sqrt(max(0, low)), p1 - p2 + math.sqrt(max(0, high))


@pytest.mark.parametrize(
    "counts",
    [(20, 12, 2, 16), (0, 0, 0, 10), (5, 0, 0, 5), (0, 9, 1, 0), (70, 3, 20, 7), (1, 1, 1, 200)],
)
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_newcombe_is_its_equations(counts: tuple[int, ...], confidence: float) -> None:
    table = PairedTable(*counts)
    found = newcombe(table, confidence)
    low, high = slow_newcombe(table, confidence)
    assert found.low == pytest.approx(max(-1, low), abs=1e-12)
    assert found.high == pytest.approx(min(1, high), abs=1e-12)
    assert found.n == sum(counts)


def test_newcombe_worked_by_hand() -> None:
    # 10 pairs, all discordant one way: both Wilson intervals have p = 1 or 0 and φ = 0, so the
    # interval is 1 − √2·u to 1 with u = z²/(10 + z²).
    u = normal_quantile(0.95) ** 2 / (10 + normal_quantile(0.95) ** 2)
    found = newcombe(PairedTable(0, 10, 0, 0))
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(1 - math.sqrt(2) * u)


def test_exchanging_the_two_turns_the_interval_round() -> None:
    one, other = newcombe(PairedTable(20, 12, 2, 16)), newcombe(PairedTable(20, 2, 12, 16))
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


def test_pairs_say_more_than_the_same_rates_apart() -> None:
    together = newcombe(PairedTable(40, 10, 0, 50))
    apart = newcombe(PairedTable(20, 30, 20, 30))
    assert together.value == apart.value == pytest.approx(0.1)
    assert together.high - together.low < 0.7 * (apart.high - apart.low)


def test_many_tables_at_once_are_the_same_as_one_by_one() -> None:
    tables = [PairedTable(20, 12, 2, 16), PairedTable(5, 0, 0, 5)]
    ends = newcombe_ends(np.stack([one.counts for one in tables], axis=1), normal_quantile(0.9))
    for index, table in enumerate(tables):
        one = newcombe(table, 0.9)
        assert (ends[0, index], ends[1, index]) == pytest.approx((one.low, one.high))


def test_newcombe_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, covered = random.Random(1), 0  # noqa: S311
    for _ in range(2_000):
        pairs = [(before, before) for before in (rng.random() < 0.3 for _ in range(80))]
        pairs = [
            (rng.random() < 0.15 if not before else rng.random() > 0.1, before)
            for _, before in pairs
        ]
        found = newcombe(PairedTable.of(pairs))
        covered += found.low <= 0.7 * 0.15 - 0.3 * 0.1 <= found.high
    assert 0.93 <= covered / 2_000 <= 0.98


def test_no_pairs_are_not_applicable() -> None:
    assert newcombe(PairedTable(0, 0, 0, 0)) == EMPTY == Estimate(None, None, None, 0)


def test_pairs_are_counted() -> None:
    pairs = [(True, True), (True, False), (True, False), (False, True), (False, False)]
    table = PairedTable.of(pairs)
    assert table == PairedTable(1, 2, 1, 1)
    assert table.difference == pytest.approx(0.2)
    assert table.scaled(10) == PairedTable(2, 4, 2, 2)


@pytest.mark.parametrize(("a", "b"), [(0, 1), (5, 5), (3, 17), (40, 2), (0, 900)])
def test_the_sign_test_of_whole_counts_is_mcnemars(a: int, b: int) -> None:
    assert sign_test(a, b) == pytest.approx(mcnemar_exact(a, b), rel=1e-8)


def test_the_sign_test_of_fractions_lies_between_those_of_whole_counts() -> None:
    assert sign_test(9, 2) > sign_test(9.5, 2) > sign_test(10, 2)
    assert sign_test(0, 0) == 1.0
