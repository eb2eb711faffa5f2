"""How many samples a gate needs: the exact chance that it passes, or fails, at a true rate.

A gate on a rate looks at the number of events only, so its chances are binomial sums. They do not
rise steadily with the number of samples (one sample more may not allow one event more), so what is
given is the number from which on *every* larger one has the chance wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reports.bounds import hides
from reports.exact import at_least, at_most
from reports.paired import newcombe_ends
from reports.statistics import normal_quantile, two_sided

MOST = 1_000_000
"""Samples beyond which nobody asks further."""
_LOOK = 25
"""Steps of the saw-tooth that are checked one by one around the answer."""


@dataclass(frozen=True, slots=True)
class RateGate:
    """A gate "the rate is at most `limit`".

    One with a minimum is the same gate on the opposite event, see `mirrored`.

    Attributes:
        limit: in (0, 1).
        confidence: one-sided, in (0.5, 1).
        decisions: of its family; each failure is then judged at (1 − confidence) ÷ decisions, the
            first and strictest step of Holm.
    """

    limit: float
    confidence: float = 0.95
    decisions: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.limit < 1:
            raise ValueError(f"the limit is {self.limit}; it must lie strictly between 0 and 1")
        if not 0.5 < self.confidence < 1:
            raise ValueError(
                f"the confidence is {self.confidence}; it must lie strictly between 0.5 and 1"
            )
        if self.decisions < 1:
            raise ValueError(f"{self.decisions} decisions; there is at least one")

    @property
    def mirrored(self) -> RateGate:
        """The gate on the opposite event: of "at least 0.9", given as this with 0.9."""
        return RateGate(1 - self.limit, self.confidence, self.decisions)

    def passes_up_to(self, n: int) -> int:
        """Most events of n samples that pass; −1 if not even none does."""
        return _last(lambda k: at_most(k, n, self.limit) <= 1 - self.confidence, n)

    def fails_from(self, n: int) -> int:
        """Fewest events of n samples that fail; n + 1 if not even n do."""
        level = (1 - self.confidence) / self.decisions
        return _last(lambda k: at_least(k, n, self.limit) > level, n) + 1

    def chance_to_pass(self, n: int, rate: float) -> float:
        """Probability of a PASS of n independent samples."""
        most = self.passes_up_to(n)
        return at_most(most, n, rate) if most >= 0 else 0.0

    def chance_to_fail(self, n: int, rate: float) -> float:
        """Probability of a FAIL of n independent samples."""
        return at_least(self.fails_from(n), n, rate)

    def samples(self, rate: float, power: float) -> int | None:
        """Independent samples for a PASS (rate below the limit), or a FAIL (above), with `power`.

        Args:
            rate: true, in [0, 1].
            power: chance wanted, in (0, 1).

        Returns:
            The smallest number from which on every larger one has the chance; None at the limit
            itself, or where it is more than `MOST`.
        """
        if not (0 <= rate <= 1 and 0 < power < 1):
            raise ValueError(
                f"rate {rate}, power {power}: the rate must lie in [0, 1], the power in (0, 1)"
            )
        if rate == self.limit:
            return None
        return self._to_pass(rate, power) if rate < self.limit else self._to_fail(rate, power)

    def _to_pass(self, rate: float, power: float) -> int | None:
        def first(k: int) -> int:
            """Smallest n that passes with k events."""
            low = at_most(k, MOST + 1, self.limit) <= 1 - self.confidence
            return _first(lambda n: at_most(k, n, self.limit) <= 1 - self.confidence) if low else 0

        def holds(k: int) -> bool:
            """The chance is there at the worst n that allows k events, the largest."""
            last = first(k + 1) - 1
            return last > 0 and at_most(k, last, rate) >= power

        k = _from(holds)
        return None if k is None else first(k) or None

    def _to_fail(self, rate: float, power: float) -> int | None:
        level = (1 - self.confidence) / self.decisions

        def last(k: int) -> int:
            """Largest n that fails with k events; 0 if none does."""
            return _last(lambda n: n < k or at_least(k, n, self.limit) <= level, MOST + 1)

        def holds(k: int) -> bool:
            """The chance is there at the worst n that needs k events, the smallest."""
            least = max(last(k - 1) + 1, k)
            return least <= MOST and at_least(k, least, rate) >= power

        k = _from(lambda k: holds(k + 1))
        if k is None:
            return None
        # Among the n that need k events the chance rises, so the last of them may have it too.
        return max(_last(lambda n: n < k or at_least(k, n, rate) < power, last(k)) + 1, k)


def _first(holds: Callable[[int], bool]) -> int:
    """Smallest n ≥ 1 of a condition that stays true."""
    high = 1
    while not holds(high):
        high *= 2
    return _last(lambda n: not holds(n), high) + 1


def _last(holds: Callable[[int], bool], most: int) -> int:
    """Largest number in [0, most] of a condition that stays false; −1 if there is none."""
    low, high = -1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _from(holds: Callable[[int], bool]) -> int | None:
    """The k from which on a condition holds that only nearly stays true; None beyond `MOST`."""
    high = 1
    while not all(holds(high + step) for step in range(3)):
        high *= 2
        if high > MOST:
            return None
    k = _last(lambda one: not holds(one), high) + 1
    # Bisection takes the condition for monotone; look at the neighbourhood for its exceptions.
    broken = [one for one in range(k, k + _LOOK) if not holds(one)]
    k = broken[-1] + 1 if broken else k
    while k > 0 and holds(k - 1):
        k -= 1
    return k


@dataclass(frozen=True, slots=True)
class ChangeGate:
    """A gate "the rate rises by at most `max_increase` since the baseline", paired by sample.

    Attributes:
        max_increase: in [0, 1).
        confidence: one-sided, in (0.5, 1).
    """

    max_increase: float
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not (0 <= self.max_increase < 1 and 0.5 < self.confidence < 1):
            raise ValueError(
                f"max_increase {self.max_increase}, confidence {self.confidence}: they must lie in "
                "[0, 1) and (0.5, 1)"
            )

    def chance_to_pass(self, n: int, before: float, newly: float, no_longer: float) -> float:
        """Probability of a PASS of n independent samples.

        Exact in the discordant pairs; the concordant ones are taken at their expectation, which
        moves the interval little.

        Args:
            n: samples in both runs, at most `MOST`.
            before: true rate of the baseline.
            newly: share of all samples with the event now and not before.
            no_longer: share with the event before and not now, at most `before`.

        Raises:
            ValueError: if the shares contradict each other.
        """
        if not (0 <= no_longer <= before <= 1 and 0 <= newly <= 1 - before):
            raise ValueError(
                f"before {before}, newly {newly}, no longer {no_longer}: need no longer ≤ before "
                "and newly ≤ 1 − before"
            )
        chances, one, other = _discordant(n, newly, no_longer)
        rest = 1 - newly - no_longer
        both = (n - one - other) * ((before - no_longer) / rest if rest > 0 else 0.0)
        counts = np.stack([both, one, other, n - one - other - both])
        high = newcombe_ends(counts, normal_quantile(two_sided(self.confidence)))[1] + 1 / n
        high = np.maximum(high, (one - other) / n + hides(n, self.confidence))
        return float(chances[high <= self.max_increase].sum())

    def samples(self, before: float, newly: float, no_longer: float, power: float) -> int | None:
        """Smallest number of samples, by bisection, for a PASS with `power`.

        Returns:
            None where the true increase is not below the limit, or it is more than 100,000.
        """
        if newly - no_longer >= self.max_increase:
            return None
        high = 8
        while self.chance_to_pass(high, before, newly, no_longer) < power:
            high *= 2
            if high > MOST // 8:
                return None
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            enough = self.chance_to_pass(middle, before, newly, no_longer) >= power
            low, high = (low, middle) if enough else (middle, high)
        return high


def _discordant(
    n: int, newly: float, no_longer: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Probabilities of numbers of discordant pairs, and these numbers, each ``[D]``."""
    one, other = (_likely(n, share) for share in (newly, no_longer))
    grid = np.meshgrid(one, other, indexing="ij")
    first, second = (part.ravel() for part in grid)
    inside = first + second <= n
    first, second = first[inside], second[inside]
    factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    rest = n - first - second
    log_chance = factorial[n] - factorial[first] - factorial[second] - factorial[rest]
    for count, share in ((first, newly), (second, no_longer), (rest, 1 - newly - no_longer)):
        with np.errstate(divide="ignore"):
            log_chance = log_chance + np.where(count > 0, count * np.log(max(share, 1e-300)), 0.0)
    return np.exp(log_chance), first.astype(np.float64), second.astype(np.float64)


def _likely(n: int, share: float) -> NDArray[np.int64]:
    """Counts of Binomial(n, share) but for a tail of less than 1e-9."""
    spread = 7 * math.sqrt(n * share * (1 - share)) + 10
    low, high = math.floor(n * share - spread), math.ceil(n * share + spread)
    return np.arange(max(0, low), min(n, high) + 1)
