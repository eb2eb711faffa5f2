"""Two answers to the same samples: how much a rate differs, and whether it does at all."""

from __future__ import annotations

import math
from dataclasses import dataclass

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

    def scaled(self, n: float) -> PairedTable:
        """The same shares of another number of pairs."""
        share = n / self.n
        counts = (self.both, self.only_first, self.only_second, self.neither)
        return PairedTable(*(count * share for count in counts))


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
    n, z = table.n, normal_quantile(confidence)
    first, second = table.both + table.only_first, table.both + table.only_second
    below_1, above_1 = _wilson_reach(first / n, n, z)
    below_2, above_2 = _wilson_reach(second / n, n, z)
    phi, d = _correlation(table, first, second), table.difference
    low = d - math.sqrt(max(0.0, below_1**2 - 2 * phi * below_1 * above_2 + above_2**2))
    high = d + math.sqrt(max(0.0, above_1**2 - 2 * phi * above_1 * below_2 + below_2**2))
    return Estimate(d, max(-1.0, low), min(1.0, high), round(n))


def _wilson_reach(p: float, n: float, z: float) -> tuple[float, float]:
    """How far Wilson's interval reaches below and above the rate."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(max(0.0, p * (1 - p)) / n + z * z / (4 * n * n))
    return p - max(0.0, centre - half), min(1.0, centre + half) - p


def _correlation(table: PairedTable, first: float, second: float) -> float:
    """φ of the table, its numerator moved towards 0 by n/2 where it is positive."""
    n = table.n
    product = first * (n - first) * second * (n - second)
    if product <= 0:
        return 0.0
    excess = table.both * table.neither - table.only_first * table.only_second
    if excess > 0:
        excess = max(0.0, excess - n / 2)
    return excess / math.sqrt(product)


def sign_test(only_first: float, only_second: float) -> float:
    """Two-sided exact McNemar test that also takes fractions, from a design effect.

    Of whole counts it is `reports.statistics.mcnemar_exact`; 1 without discordant pairs.
    """
    total, larger = only_first + only_second, max(only_first, only_second)
    return 1.0 if total == 0 else min(1.0, 2 * at_least(larger, total, 0.5))
