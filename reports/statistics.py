"""Intervals and tests: pure functions of counts, deterministic given a seed.

`C` counts clusters (clean images): questions about one image are not independent, so whatever is
resampled or summed for a variance is summed by image first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

DRAWS = 2_000
"""Bootstrap draws; the Monte-Carlo error of a 95 % bound is then about a tenth of its width."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its interval and the size of its denominator.

    Attributes:
        value: the estimate; None when the denominator is empty (not applicable, never 0).
        low: lower end of the interval; None when there is none.
        high: upper end.
        n: samples in the denominator.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int

    def rounded(self) -> Estimate:
        """To six decimals: what is written, decided on and shown is then one number."""
        return Estimate(_rounded(self.value), _rounded(self.low), _rounded(self.high), self.n)

    def as_json(self) -> dict[str, float | int | None]:
        """Plain data for summary.json."""
        return asdict(self.rounded())


EMPTY = Estimate(None, None, None, 0)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6) + 0.0  # + 0.0 turns -0.0 into 0.0


def normal_quantile(confidence: float) -> float:
    """Two-sided standard normal quantile: 1.96 for 0.95.

    Raises:
        ValueError: if the confidence is not strictly between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie strictly between 0 and 1")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def two_sided(one_sided: float) -> float:
    """Confidence of the two-sided interval whose ends are one-sided bounds at `one_sided`.

    Args:
        one_sided: in [0.5, 1); 0.95 gives 0.9. At 0.5 the interval has shrunk to its value.
    """
    return max(1e-12, 2 * one_sided - 1)


def wilson(successes: int, n: int, confidence: float = 0.95) -> Estimate:
    """Wilson score interval of a proportion (E. B. Wilson, JASA 22, 1927).

    Args:
        successes: events, in [0, n].
        n: trials; 0 gives "not applicable".
        confidence: two-sided, in (0, 1).

    Raises:
        ValueError: if the counts make no sense.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials: need 0 <= successes <= n")
    if n == 0:
        return EMPTY
    z = normal_quantile(confidence)
    p, z2 = successes / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At 0 and n the formula gives the bound exactly; rounding must not move it off the value.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Estimate(p, max(0.0, low), min(1.0, high), n)


def unseen(clusters: int, confidence: float = 0.95) -> float:
    """Share that may still be hiding behind "it never happened in `clusters` images".

    The upper Wilson bound of 0 out of C. Resampling cannot produce what no sample showed, so a
    bootstrap of identical samples has width 0; no interval of ours is narrower than this.
    """
    if clusters == 0:
        return 1.0
    z2 = normal_quantile(confidence) ** 2
    return z2 / (clusters + z2)


Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Maps sums ``[R, M]`` to statistics ``[R, S]``; NaN where a statistic is undefined."""


def cluster_bootstrap(
    table: NDArray[np.int64],
    statistic: Statistic,
    *,
    seed: int,
    draws: int = DRAWS,
    confidence: float = 0.95,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Percentile bootstrap over clusters, paired: one draw serves all statistics.

    Args:
        table: counts summed by cluster, ``[C, M]``, C > 0.
        statistic: see `Statistic`.
        seed: of the resampling alone.
        draws: resamples R.
        confidence: two-sided, in (0, 1).

    Returns:
        Point values, lower and upper ends, each ``[S]``. Resamples in which a statistic is
        undefined are left out of its quantiles; NaN where it is undefined on the data.
    """
    value, resampled = resample(table, statistic, seed=seed, draws=draws)
    tail = (1 - confidence) / 2
    low, high = np.full_like(value, np.nan), np.full_like(value, np.nan)
    for s in np.flatnonzero(~np.isnan(value)):
        defined = resampled[:, s][~np.isnan(resampled[:, s])]
        low[s], high[s] = np.quantile(defined, [tail, 1 - tail])
    return value, low, high


def resample(
    table: NDArray[np.int64], statistic: Statistic, *, seed: int, draws: int = DRAWS
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Statistics of the data, ``[S]``, and of resamples of its clusters, ``[R, S]``.

    Equal rows are drawn together, by a multinomial over distinct rows: the same distribution as
    drawing C rows with replacement, at a cost that does not grow with C. Arguments as of
    `cluster_bootstrap`; NaN where a statistic is undefined.
    """
    rows, counts = np.unique(table, axis=0, return_counts=True)
    clusters = int(counts.sum())
    weights = np.random.default_rng(seed).multinomial(clusters, counts / clusters, size=draws)
    value = statistic(table.sum(axis=0, keepdims=True).astype(np.float64))[0]
    return value, statistic((weights @ rows).astype(np.float64))


def left_out(table: NDArray[np.int64], statistic: Statistic) -> NDArray[np.float64]:
    """Statistics with one cluster left out in turn, ``[C, S]``; those of the rest where undefined.

    Arguments as of `cluster_bootstrap`.
    """
    rows, index = np.unique(table, axis=0, return_inverse=True)
    total = table.sum(axis=0, keepdims=True)
    found = statistic((total - rows).astype(np.float64))
    whole = statistic(total.astype(np.float64))
    return np.where(np.isnan(found), whole, found)[index.ravel()]


def cluster_mean(
    values: Sequence[float],
    clusters: Sequence[str] | NDArray[np.int64],
    *,
    confidence: float = 0.95,
    bounds: tuple[float, float] | None = None,
) -> Estimate:
    """Mean with a normal interval whose variance is summed by cluster.

    Args:
        values: one per sample.
        clusters: the image of each sample, same length.
        confidence: two-sided, in (0, 1).
        bounds: range the quantity cannot leave. Where given, the interval is clipped to it and
            is at least `unseen` of that range wide on either side.
    """
    if not values:
        return EMPTY
    y = np.asarray(values, dtype=np.float64)
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    mean, size = float(y.mean()), int(index.max()) + 1
    residuals = np.bincount(index, weights=y - mean, minlength=size)
    variance = float((residuals**2).sum()) / len(y) ** 2
    half = math.inf if size == 1 else math.sqrt(variance * size / (size - 1))
    half *= normal_quantile(confidence)
    if bounds is None:
        if size == 1:  # one image says nothing about its spread
            return Estimate(mean, None, None, len(y))
        return Estimate(mean, mean - half, mean + half, len(y))
    half = max(half, unseen(size, confidence) * (bounds[1] - bounds[0]))
    return Estimate(mean, max(bounds[0], mean - half), min(bounds[1], mean + half), len(y))


def mcnemar_exact(only_first: int, only_second: int) -> float | None:
    """Two-sided exact McNemar test of paired answers (Q. McNemar, Psychometrika 12, 1947).

    Args:
        only_first: samples that only the first system got right.
        only_second: samples that only the second got right.

    Returns:
        The p-value, twice the smaller binomial tail at 1/2, at most 1; None without discordance.
    """
    n, k = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return None
    log_choose = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value - n * math.log(2)) for value in log_choose))
