import math

import numpy as np
import pytest
from scipy import stats

from reports.statistics import (
    Estimate,
    cluster_bootstrap,
    cluster_mean,
    mcnemar_exact,
    normal_quantile,
    unseen,
    wilson,
)


@pytest.mark.parametrize("n", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_agrees_with_scipy(n: int, share: float, confidence: float) -> None:
    k = round(share * n)
    expected = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    found = wilson(k, n, confidence)
    assert found.low == pytest.approx(expected.low, abs=1e-12)
    assert found.high == pytest.approx(expected.high, abs=1e-12)


def test_wilson_against_numbers_worked_by_hand() -> None:
    # p = 1/2, n = 4, z² = 3.8414588: half-width z/(1+z²/4)·sqrt(1/16+z²/64)
    z = 1.959963984540054
    half = z / (1 + z * z / 4) * math.sqrt(1 / 16 + z * z / 64)
    found = wilson(2, 4)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half))


def test_wilson_of_nothing_is_not_applicable() -> None:
    assert wilson(0, 0) == Estimate(None, None, None, 0)


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3)])
def test_wilson_refuses_impossible_counts(k: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"{k} successes of {n}"):
        wilson(k, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_outside_its_range_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        normal_quantile(confidence)


@pytest.mark.parametrize(("a", "b"), [(0, 1), (5, 5), (3, 17), (40, 2), (300, 351), (0, 900)])
def test_mcnemar_agrees_with_the_binomial_test(a: int, b: int) -> None:
    expected = stats.binomtest(min(a, b), a + b, 0.5).pvalue
    assert mcnemar_exact(a, b) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_without_discordant_pairs_is_not_applicable() -> None:
    assert mcnemar_exact(0, 0) is None


def mean_of_columns(sums: np.ndarray) -> np.ndarray:
    return sums[:, 1:2] / sums[:, 0:1]


def test_bootstrap_agrees_with_scipy_on_independent_samples() -> None:
    rng = np.random.default_rng(3)
    hits = (rng.random(200) < 0.3).astype(np.int64)
    table = np.stack([np.ones(200, dtype=np.int64), hits], axis=1)
    value, low, high = cluster_bootstrap(table, mean_of_columns, seed=1, draws=20_000)
    oracle = stats.bootstrap(
        (hits,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(2)
    ).confidence_interval
    assert value[0] == hits.mean()
    assert (low[0], high[0]) == pytest.approx((oracle.low, oracle.high), abs=0.01)


def test_bootstrap_by_image_is_wider_when_questions_of_an_image_agree() -> None:
    rng = np.random.default_rng(4)
    images = (rng.random(50) < 0.5).astype(np.int64)
    alone = np.stack([np.ones(200, dtype=np.int64), np.repeat(images, 4)], axis=1)
    together = np.stack([np.full(50, 4), 4 * images], axis=1)
    _, low_alone, high_alone = cluster_bootstrap(alone, mean_of_columns, seed=1)
    _, low, high = cluster_bootstrap(together, mean_of_columns, seed=1)
    assert (high - low)[0] > 1.7 * (high_alone - low_alone)[0]  # in theory √4 = 2


def test_bootstrap_depends_on_its_seed_alone_and_not_on_the_order_of_images() -> None:
    rng = np.random.default_rng(5)
    table = np.stack([np.ones(80, dtype=np.int64), rng.integers(0, 2, 80)], axis=1)
    first = cluster_bootstrap(table, mean_of_columns, seed=9)
    shuffled = cluster_bootstrap(table[rng.permutation(80)], mean_of_columns, seed=9)
    other = cluster_bootstrap(table, mean_of_columns, seed=10, draws=50)
    assert [x.tolist() for x in first] == [x.tolist() for x in shuffled]
    assert other[1].tolist() != first[1].tolist()


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, truth, covered = np.random.default_rng(6), 0.4, 0
    for run in range(300):
        table = np.stack([np.ones(100, dtype=np.int64), rng.random(100) < truth], axis=1)
        _, low, high = cluster_bootstrap(
            table.astype(np.int64), mean_of_columns, seed=run, draws=400
        )
        covered += bool(low[0] <= truth <= high[0])
    assert 0.90 <= covered / 300 <= 0.99


def test_cluster_mean_is_the_textbook_interval_when_every_image_has_one_question() -> None:
    values = [0.1, 0.4, 0.2, 0.9, 0.5, 0.35]
    found = cluster_mean(values, list("abcdef"))
    half = normal_quantile(0.95) * np.std(values, ddof=1) / math.sqrt(6)
    assert found.value == pytest.approx(np.mean(values))
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))


def test_cluster_mean_stays_in_its_bounds_and_never_looks_certain() -> None:
    same = cluster_mean([1.0] * 30, [str(i) for i in range(30)], bounds=(0, 1))
    assert same.high == 1.0
    assert same.low == pytest.approx(1 - unseen(30))


def test_cluster_mean_of_one_image_has_no_interval_unless_bounded() -> None:
    assert cluster_mean([3.0, 4.0], ["a", "a"]).low is None
    assert cluster_mean([0.5, 0.5], ["a", "a"], bounds=(0, 1)) == Estimate(0.5, 0.0, 1.0, 2)


def test_unseen_is_the_upper_wilson_bound_of_no_event() -> None:
    assert unseen(64) == pytest.approx(wilson(0, 64).high)
