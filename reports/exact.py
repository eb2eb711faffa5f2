"""Exact binomial tails and Clopper–Pearson bounds; what a gate decides proportions with.

Everything rests on the regularised incomplete beta function, computed here so that a report needs
no scipy: a continued fraction by the modified Lentz method (W. H. Press et al., *Numerical
Recipes*, 3rd ed., 6.4). Counts may be fractions: a design effect (`reports.design`) makes them so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

_TINY = 1e-300
_ITERATIONS = 20_000
"""Steps of the continued fraction at most; it takes about √max(a, b), 1,000 at a million."""
_HALVINGS = 200
"""Of a bisection at most; it stops where the two ends are neighbouring floats."""


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b), the share of Beta(a, b) below x.

    Args:
        a: > 0, up to about 1e6; the relative error is then below 1e-8.
        b: > 0, likewise.
        x: in [0, 1].

    Raises:
        ValueError: outside these ranges.
    """
    if not (a > 0 and b > 0 and 0 <= x <= 1):
        raise ValueError(f"I_x(a, b) of a = {a}, b = {b}, x = {x}: need a, b > 0 and 0 <= x <= 1")
    if x in (0.0, 1.0):
        return x
    log_front = (
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    # The fraction converges fast on one side of the mean only; the other follows by symmetry.
    if x < (a + 1) / (a + b + 2):
        return math.exp(log_front) * _fraction(a, b, x) / a
    return 1.0 - math.exp(log_front) * _fraction(b, a, 1 - x) / b


def _fraction(a: float, b: float, x: float) -> float:
    c, d = 1.0, 1.0 / _away(1.0 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, _ITERATIONS):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / _away(1.0 + term * d)
            c = _away(1.0 + term / c)
            value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            return value
    raise ArithmeticError(f"the incomplete beta function of a = {a}, b = {b} did not converge")


def _away(value: float) -> float:
    """The value, kept away from 0, which the fraction divides by."""
    return value if abs(value) > _TINY else _TINY


def bisect(rising: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where a rising function reaches a value, to the last float.

    Args:
        rising: non-decreasing on [low, high].
        wanted: a value between those at the ends.
        low: lower end of the search.
        high: upper end.
    """
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if rising(middle) < wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def beta_quantile(share: float, a: float, b: float) -> float:
    """The x in [0, 1] with I_x(a, b) = share.

    Raises:
        ValueError: if the share is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a quantile at {share}; it must lie in [0, 1]")
    return bisect(lambda x: incomplete_beta(a, b, x), share, 0.0, 1.0)


def at_least(k: float, n: float, p: float) -> float:
    """P(X ≥ k) of X ~ Binomial(n, p): the one-sided p-value against "the rate is at most p"."""
    if k <= 0:
        return 1.0
    return 0.0 if k > n else incomplete_beta(k, n - k + 1, p)


def at_most(k: float, n: float, p: float) -> float:
    """P(X ≤ k) of X ~ Binomial(n, p): the one-sided p-value against "the rate is at least p"."""
    return at_least(n - k, n, 1 - p)


def lower_bound(k: float, n: float, confidence: float) -> float:
    """One-sided lower bound of a proportion (C. J. Clopper, E. S. Pearson, Biometrika 26, 1934).

    Whatever the true rate, the bound is above it with a probability of at most 1 − confidence.

    Args:
        k: events, in [0, n].
        n: trials, > 0, up to about a million.
        confidence: one-sided, in (0, 1).

    Raises:
        ValueError: if the counts or the confidence make no sense.
    """
    _check(k, n, confidence)
    return 0.0 if k == 0 else beta_quantile(1 - confidence, k, n - k + 1)


def upper_bound(k: float, n: float, confidence: float) -> float:
    """One-sided upper bound of a proportion; see `lower_bound`."""
    _check(k, n, confidence)
    return 1.0 if k == n else 1.0 - beta_quantile(1 - confidence, n - k, k + 1)


def _check(k: float, n: float, confidence: float) -> None:
    if not 0 <= k <= n or n <= 0:
        raise ValueError(f"{k} events of {n} trials: need 0 <= events <= trials and trials > 0")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie strictly between 0 and 1")


@lru_cache(maxsize=4_096)
def student_quantile(confidence: float, degrees: float) -> float:
    """One-sided quantile of Student's t: 1.812 at 0.95 and 10 degrees of freedom.

    Args:
        confidence: one-sided, in [0.5, 1).
        degrees: of freedom, > 0.

    Raises:
        ValueError: outside these ranges.
    """
    if not (0.5 <= confidence < 1 and degrees > 0):
        raise ValueError(
            f"Student's t at {confidence} with {degrees} degrees of freedom: the confidence must "
            "lie in [0.5, 1) and the degrees above 0"
        )
    # ν / (ν + t²) is Beta(ν/2, 1/2); both tails together are 2 (1 − confidence).
    share = beta_quantile(2 * (1 - confidence), degrees / 2, 0.5)
    return math.inf if share == 0 else math.sqrt(degrees * (1 - share) / share)
