"""Bounds that are given, for tests of what is decided from them."""

from __future__ import annotations

from reports.bounds import Bounds


class Known(Bounds):
    """Bounds that do not move with the confidence, and a p-value where they are beyond a limit."""

    def __init__(
        self, value: float, low: float | None, high: float | None, p: float = 1e-6
    ) -> None:
        self.value, self.n, self._low, self._high, self._p = value, 100, low, high, p

    def lower(self, confidence: float) -> float | None:
        return self._low

    def upper(self, confidence: float) -> float | None:
        return self._high

    def p_above(self, limit: float) -> float:
        return self._p if self._low is not None and self._low > limit else 1.0

    def p_below(self, limit: float) -> float:
        return self._p if self._high is not None and self._high < limit else 1.0
