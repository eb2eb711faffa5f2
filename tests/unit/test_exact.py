"""Exact binomial bounds against scipy, which is no dependency of redteam itself."""

import math

import pytest
from scipy import special, stats

from reports.exact import (
    at_least,
    at_most,
    beta_quantile,
    incomplete_beta,
    lower_bound,
    student_quantile,
    upper_bound,
)

COUNTS = [(0, 1), (1, 1), (0, 5), (2, 7), (5, 5), (12, 100), (99, 100), (3, 10_000), (500, 1_000)]
LARGE = [(0, 10**6), (3, 10**6), (100_000, 10**6), (500_000, 10**6), (999_999, 10**6)]


@pytest.mark.parametrize(("k", "n"), COUNTS + LARGE)
@pytest.mark.parametrize("confidence", [0.6, 0.95, 0.999])
def test_bounds_agree_with_scipy(k: int, n: int, confidence: float) -> None:
    two_sided = stats.binomtest(k, n).proportion_ci(2 * confidence - 1, method="exact")
    assert lower_bound(k, n, confidence) == pytest.approx(two_sided.low, rel=1e-8, abs=1e-12)
    assert upper_bound(k, n, confidence) == pytest.approx(two_sided.high, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize(("k", "n"), COUNTS + LARGE)
@pytest.mark.parametrize("p", [1e-6, 0.03, 0.5, 0.97])
def test_tails_agree_with_scipy(k: int, n: int, p: float) -> None:
    assert at_least(k, n, p) == pytest.approx(stats.binom.sf(k - 1, n, p), rel=1e-6, abs=1e-12)
    assert at_most(k, n, p) == pytest.approx(stats.binom.cdf(k, n, p), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (1.7, 30.2), (400.25, 3.5), (2e5, 8e5)])
@pytest.mark.parametrize("x", [0.0, 1e-9, 0.2, 0.200001, 0.5, 1.0])
def test_the_incomplete_beta_function_takes_fractions(a: float, b: float, x: float) -> None:
    expected = special.betainc(a, b, x)
    assert incomplete_beta(a, b, x) == pytest.approx(expected, rel=1e-7, abs=1e-12)


def test_bounds_worked_by_hand() -> None:
    # Of 0 events of n the upper bound solves (1 − p)^n = α; of n of n, the lower one p^n = α.
    assert upper_bound(0, 29, 0.95) == pytest.approx(1 - 0.05 ** (1 / 29))
    assert lower_bound(29, 29, 0.95) == pytest.approx(0.05 ** (1 / 29))
    assert lower_bound(0, 29, 0.95) == 0.0
    assert upper_bound(29, 29, 0.95) == 1.0


def test_the_rule_of_three_is_the_famous_special_case() -> None:
    assert upper_bound(0, 1_000, 0.95) == pytest.approx(3 / 1_000, rel=0.01)


@pytest.mark.parametrize("degrees", [1, 2, 10, 31, 1e5])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.9995])
def test_student_agrees_with_scipy(degrees: float, confidence: float) -> None:
    expected = stats.t.ppf(confidence, degrees)
    assert student_quantile(confidence, degrees) == pytest.approx(expected, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3), (0, 0)])
def test_impossible_counts_are_refused_with_the_counts(k: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"{k} events of {n} trials"):
        lower_bound(k, n, 0.95)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_an_impossible_confidence_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        upper_bound(1, 3, confidence)


def test_other_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="need a, b > 0"):
        incomplete_beta(0, 1, 0.5)
    with pytest.raises(ValueError, match="must lie in"):
        beta_quantile(1.5, 1, 1)
    with pytest.raises(ValueError, match="degrees above 0"):
        student_quantile(0.95, 0)


def test_a_quantile_undoes_the_function() -> None:
    for share in (1e-6, 0.05, 0.5, 0.999):
        x = beta_quantile(share, 3.3, 17.0)
        assert math.isclose(incomplete_beta(3.3, 17.0, x), share, rel_tol=1e-9)
