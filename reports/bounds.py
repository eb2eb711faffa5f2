"""One-sided bounds of a metric, and the p-values that follow from them; what a gate decides with.

A bound at confidence γ is beyond the true value with a probability of at most 1 − γ. How each kind
of metric gets its bound is said at its class; `reports.gate_bounds` makes them from the trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from reports import exact
from reports.design import Clusters
from reports.paired import PairedTable, newcombe
from reports.statistics import two_sided

_SMALLEST = 1e-9
"""Tails below it are not told apart: no run has the samples to tell."""
_STEPS = 30
"""Halvings of a p-value's logarithm, which fix its first seven digits."""


class Bounds:
    """A value with a bound on either side.

    Attributes:
        value: the estimate; None when the denominator is empty.
        n: samples in the denominator.
        events: of a proportion, how many of the n; None of other metrics.
        effective_n: independent samples that would say as much; None where that is not used.
    """

    value: float | None
    n: int
    events: int | None = None
    effective_n: float | None = None

    def lower(self, confidence: float) -> float | None:
        """One-sided lower bound at a confidence in [0.5, 1); None if there is none."""
        raise NotImplementedError

    def upper(self, confidence: float) -> float | None:
        """One-sided upper bound at a confidence in [0.5, 1); None if there is none."""
        raise NotImplementedError

    def p_above(self, limit: float) -> float:
        """p-value against "at most the limit": the smallest tail whose lower bound is above it."""
        return _tail(lambda confidence: _gap(self.lower(confidence), limit))

    def p_below(self, limit: float) -> float:
        """p-value against "at least the limit"."""
        return _tail(lambda confidence: -_gap(self.upper(confidence), limit))


def _gap(bound: float | None, limit: float) -> float:
    return math.nan if bound is None else bound - limit


def _tail(gap: Callable[[float], float]) -> float:
    """The smallest tail α at which `gap` (1 − α) is above 0; 1 if it is not at one half."""
    if not gap(0.5) > 0:
        return 1.0
    low, high = math.log(_SMALLEST), math.log(0.5)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if gap(1 - math.exp(middle)) > 0 else (middle, high)
    return math.exp(high)


class Nothing(Bounds):
    """Of an empty denominator: not applicable, never 0."""

    value = None
    n = 0

    def lower(self, confidence: float) -> None:
        """None."""
        del confidence

    def upper(self, confidence: float) -> None:
        """None."""
        del confidence


class Proportion(Bounds):
    """Exact bounds of a rate (Clopper and Pearson), by effective size where images repeat.

    Args:
        events: and samples of each image, see `reports.design`; not empty.
    """

    def __init__(self, events: Clusters) -> None:
        self._clusters = events
        self.events = round(float(events.sums.sum()))
        self.value, self.n = self.events / events.n, events.n
        self.effective_n = None if events.alone else events.effective_size(0.95)

    def lower(self, confidence: float) -> float:
        """At most the rate; 0 where nothing was seen."""
        return exact.lower_bound(*self._counts(confidence), confidence)

    def upper(self, confidence: float) -> float:
        """At least the rate; below 1 even where nothing was seen."""
        return exact.upper_bound(*self._counts(confidence), confidence)

    def p_above(self, limit: float) -> float:
        """Binomial tail, of as many samples as it says itself that they are worth."""
        return self._tail(exact.at_least, limit)

    def p_below(self, limit: float) -> float:
        """Likewise."""
        return self._tail(exact.at_most, limit)

    def _tail(self, tail: Callable[[float, float, float], float], limit: float) -> float:
        limit, p = min(1.0, max(0.0, limit)), 0.05
        for _ in range(_STEPS):
            # The effective size depends on the level, and hardly: this settles in a few steps.
            # From one half on no level is a bound's; of independent samples it is exact at once.
            size = self._counts(1 - min(max(p, _SMALLEST), 0.5))
            before, p = p, tail(*size, limit)
            if math.isclose(p, before, rel_tol=1e-9) or self._clusters.alone:
                break
        return p

    def _counts(self, confidence: float) -> tuple[float, float]:
        size = self._clusters.effective_size(confidence)
        if self.events == self.n:
            return size, size
        return size * (self.value or 0.0), size


@dataclass
class Resampled(Bounds):
    """Bounds of a bootstrap by image, for differences and ratios of accuracies.

    Bias-corrected and accelerated (BCa; B. Efron, *Better bootstrap confidence intervals*, JASA 82,
    1987), because these statistics are skewed and plain percentiles of them pass 7 % of the runs
    that are at the limit where 5 % are allowed. Never nearer to the value than what `images` equal
    images may hide: resampling cannot produce what no sample showed. A tail of less than one draw
    is not known, so the bound is then the end of the range.

    Attributes:
        value: on the data.
        n: samples in the denominator.
        draws: resampled values, defined ones only.
        images: C of the denominator.
        acceleration: see `acceleration`.
        least: lower end of the range.
        most: upper end.
    """

    value: float
    n: int
    draws: NDArray[np.float64]
    images: int
    acceleration: float = 0.0
    least: float = -math.inf
    most: float = math.inf

    def lower(self, confidence: float) -> float:
        """The draw at the corrected share of them, or lower."""
        hidden = self.value - hides(self.images, confidence)
        rank = math.floor(self._share(1 - confidence) * (len(self.draws) + 1) + 1e-9)
        if rank < 1:
            return self.least
        return max(self.least, min(float(self._sorted[rank - 1]), hidden))

    def upper(self, confidence: float) -> float:
        """Its mirror image."""
        hidden = self.value + hides(self.images, confidence)
        rank = math.floor((1 - self._share(confidence)) * (len(self.draws) + 1) + 1e-9)
        if rank < 1:
            return self.most
        return min(self.most, max(float(self._sorted[-rank]), hidden))

    @cached_property
    def _sorted(self) -> NDArray[np.float64]:
        return np.sort(self.draws)

    @cached_property
    def _bias(self) -> float:
        """Standard normal quantile of the share of draws below the value, ties by half."""
        below = float((self.draws < self.value).sum() + (self.draws == self.value).sum() / 2)
        return NormalDist().inv_cdf((below + 0.5) / (len(self.draws) + 1))

    def _share(self, level: float) -> float:
        """Share of the draws whose end is the bound at a level."""
        z = self._bias + _student_z(level, self.images)
        bent = 1 - self.acceleration * z
        return NormalDist().cdf(self._bias + z / bent) if bent > 0 else float(level > 0.5)


def _student_z(level: float, images: int) -> float:
    """Normal quantile stretched as Student's is: a bootstrap of C images is √(1 − 1/C) too narrow.

    After T. C. Hesterberg, *What teachers should know about the bootstrap*, The American
    Statistician 69, 2015, 3.3.
    """
    if images < 2:
        return NormalDist().inv_cdf(level)
    reach = exact.student_quantile(max(level, 1 - level), images - 1)
    return math.copysign(reach * math.sqrt(images / (images - 1)), level - 0.5)


def acceleration(left_out: NDArray[np.float64]) -> float:
    """A sixth of the skewness of the values with one image left out in turn, ``[C]``."""
    moved = left_out.mean() - left_out
    scale = float((moved**2).sum()) ** 1.5
    return 0.0 if scale == 0 else float((moved**3).sum()) / (6 * scale)


def hides(images: int, confidence: float) -> float:
    """Share of images that may be of a sort none of `images` was: the exact bound of 0 of C."""
    return 1 - (1 - confidence) ** (1 / images) if images else 1.0


@dataclass
class Mean(Bounds):
    """Student's bounds of a mean whose variance is summed by image, C − 1 degrees of freedom.

    Attributes:
        values: by image.
        span: range the quantity cannot leave; None if it has none. A bounded mean is never surer
            than what equal images may hide of its range.
    """

    values: Clusters
    span: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        self.value, self.n = self.values.mean, self.values.n

    def lower(self, confidence: float) -> float | None:
        """None of one image and no range."""
        reach = self._reach(confidence)
        if self.span is None:
            return None if reach is None else self.values.mean - reach
        return self.span[0] if reach is None else max(self.span[0], self.values.mean - reach)

    def upper(self, confidence: float) -> float | None:
        """None of one image and no range."""
        reach = self._reach(confidence)
        if self.span is None:
            return None if reach is None else self.values.mean + reach
        return self.span[1] if reach is None else min(self.span[1], self.values.mean + reach)

    def _reach(self, confidence: float) -> float | None:
        images = len(self.values.sizes)
        if images < 2:
            return None
        reach = self.values.error * exact.student_quantile(confidence, images - 1)
        if self.span is None:
            return reach
        return max(reach, hides(images, confidence) * (self.span[1] - self.span[0]))


class Difference(Bounds):
    """Bounds of a paired difference of two rates, now less before (Newcombe, method 10).

    By the effective size of the differences where images repeat, never nearer to the value than
    what equal images may hide, and one sample wider: A. L. Edwards' correction of McNemar's test
    (Psychometrika 13, 1948), without which they pass up to 6 % of the runs that are at the limit
    where 5 % are allowed.

    Args:
        pairs: the event (now, before) of each sample; not empty.
        images: of each sample.
    """

    def __init__(self, pairs: list[tuple[bool, bool]], images: list[str]) -> None:
        self.table = PairedTable.of(pairs)
        self.value, self.n = self.table.difference, len(pairs)
        changes = np.array([float(now) - float(before) for now, before in pairs])
        self._clusters = Clusters.of(changes, images)
        self.effective_n = None if self._clusters.alone else self._clusters.effective_size(0.95)

    def lower(self, confidence: float) -> float:
        """Of the increase."""
        return max(-1.0, self._ends(confidence)[0])

    def upper(self, confidence: float) -> float:
        """Of the increase."""
        return min(1.0, self._ends(confidence)[1])

    def _ends(self, confidence: float) -> tuple[float, float]:
        size, value = self._clusters.effective_size(confidence), self.table.difference
        found = newcombe(self.table.scaled(size), two_sided(confidence))
        if found.low is None or found.high is None:
            return -1.0, 1.0
        hidden = hides(len(self._clusters.sizes), confidence)
        return min(found.low - 1 / size, value - hidden), max(found.high + 1 / size, value + hidden)
