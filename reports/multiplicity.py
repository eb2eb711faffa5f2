"""Many decisions at once: the chance that any of them is a false alarm."""

from __future__ import annotations

from collections.abc import Sequence


def holm(p_values: Sequence[float], levels: Sequence[float] | None = None) -> list[float]:
    """p-values adjusted step-down (S. Holm, Scandinavian Journal of Statistics 6, 1979).

    Rejecting where the adjusted value is at most the level keeps the probability of *any* false
    rejection at that level, however the tests depend on each other.

    Args:
        p_values: of the family, each in [0, 1].
        levels: of each test, in (0, 1); one for all if left out. Where they differ, the order is
            that of p ÷ level, and any false rejection has at most the largest level.

    Returns:
        Adjusted values in the order given, each at least its p-value and at most 1.
    """
    size = len(p_values)
    levels = [1.0] * size if levels is None else levels
    order = sorted(range(size), key=lambda index: p_values[index] / levels[index])
    adjusted, worst = [1.0] * size, 0.0
    for rank, index in enumerate(order):
        worst = max(worst, (size - rank) * p_values[index] / levels[index])
        adjusted[index] = min(1.0, worst * levels[index])
    return adjusted
