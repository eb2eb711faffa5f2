"""Two answers to the same samples: how much a rate differs, and whether it does at all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reports.exact import at_least
from reports.statistics import Estimate, normal_quantile


@dataclass(frozen=True, slots=True)
class PairedTable:
    """A 2 × 2 table of pairs; counts may be fractions after a design effect.

    Attributes:
        both: the event in both.
        only_first: in the first alone.
        only_second: in the second alone.
        neither: in none.
    """

    both: float
    only_first: float
    only_second: float
    neither: float

    @classmethod
    def of(cls, pairs: list[tuple[bool, bool]]) -> PairedTable:
        """Count pairs of (in the first, in the second)."""
        wanted = ((True, True), (True, False), (False, True), (False, False))
        return cls(*(pairs.count(one) for one in wanted))

    @property
    def n(self) -> float:
        """Pairs."""
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def difference(self) -> float:
        """Rate of the first less that of the second."""
        return (self.only_first - self.only_second) / self.n

    @property
    def counts(self) -> NDArray[np.float64]:
        """Both, only first, only second, neither: ``[4]``."""
        return np.array([self.both, self.only_first, self.only_second, self.neither], np.float64)

    def scaled(self, n: float) -> PairedTable:
        """The same shares of another number of pairs."""
        return PairedTable(*(self.counts * (n / self.n)).tolist())


def newcombe(table: PairedTable, confidence: float = 0.95) -> Estimate:
    """Interval of a difference of paired proportions.

    R. G. Newcombe, *Improved confidence intervals for the difference between binomial proportions
    based on paired data*, Statistics in Medicine 17, 1998, method 10: Wilson's intervals of the two
    rates, squared and added, with the correlation of the pairs, corrected for continuity.

    Args:
        table: of pairs; empty gives "not applicable".
        confidence: two-sided, in (0, 1).

    Returns:
        First less second, with `n` rounded to whole pairs.
    """
    if table.n == 0:
        return Estimate(None, None, None, 0)
    low, high = newcombe_ends(table.counts, normal_quantile(confidence))
    return Estimate(table.difference, float(low), float(high), round(table.n))


def newcombe_ends(counts: NDArray[np.float64], z: float) -> NDArray[np.float64]:
    """Ends of `newcombe` of many tables at once.

    Args:
        counts: both, only_first, only_second, neither, ``[4, …]``; no table is empty.
        z: two-sided normal quantile.

    Returns:
        Lower and upper end, ``[2, …]``.
    """
    both, one, other, _ = counts
    n = counts.sum(axis=0)
    below_1, above_1 = _wilson_reach((both + one) / n, n, z)
    below_2, above_2 = _wilson_reach((both + other) / n, n, z)
    phi, d = _correlation(counts, n), (one - other) / n
    down = below_1**2 - 2 * phi * below_1 * above_2 + above_2**2
    up = above_1**2 - 2 * phi * above_1 * below_2 + below_2**2
    low, high = d - np.sqrt(np.maximum(down, 0)), d + np.sqrt(np.maximum(up, 0))
    return np.stack([np.maximum(low, -1), np.minimum(high, 1)])


def _wilson_reach(
    p: NDArray[np.float64], n: NDArray[np.float64], z: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How far Wilson's interval reaches below and above the rate."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p - np.maximum(centre - half, 0), np.minimum(centre + half, 1) - p


def _correlation(counts: NDArray[np.float64], n: NDArray[np.float64]) -> NDArray[np.float64]:
    """φ of the tables, its numerator moved towards 0 by n/2 where it is positive."""
    both, one, other, neither = counts
    first, second = both + one, both + other
    product = first * (n - first) * second * (n - second)
    excess = both * neither - one * other
    excess = np.where(excess > 0, np.maximum(excess - n / 2, 0), excess)
    return np.where(product > 0, excess / np.sqrt(np.where(product > 0, product, 1)), 0)


def sign_test(only_first: float, only_second: float) -> float:
    """Two-sided exact McNemar test that also takes fractions, from a design effect.

    Of whole counts it is `reports.statistics.mcnemar_exact`; 1 without discordant pairs.
    """
    total, larger = only_first + only_second, max(only_first, only_second)
    return 1.0 if total == 0 else min(1.0, 2 * at_least(larger, total, 0.5))
