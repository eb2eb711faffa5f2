"""Several attacks, restarts or draws of one sample as one outcome."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from reports.measure import Row
from reports.statistics import Estimate, cluster_mean


def worst_case(runs: Sequence[Mapping[str, Row]]) -> dict[str, Row]:
    """Of each sample the worst row over attacks or restarts.

    A rate over these rows is a mean of minima and no minimum of means. Worst is a
    compression-specific failure, then any attack that broke the compressed path.

    Args:
        runs: rows by sample, of each attack or restart.

    Returns:
        The samples measured in all of them.
    """
    shared = [name for name in runs[0] if all(name in run for run in runs)] if runs else []
    return {
        name: max((run[name] for run in runs), key=_badness)
        for name in shared
        if not any(run[name].error for run in runs)
    }


def _badness(row: Row) -> tuple[bool, bool, bool]:
    return row.failure, not row.compressed_attacked, not row.full_attacked


def expectation(
    draws: Sequence[Mapping[str, Row]],
    event: Callable[[Row], bool],
    confidence: float = 0.95,
) -> Estimate:
    """How often an event happens over the draws of a random defence or attack.

    Averaged first over the draws of a sample, then over samples: draws of one sample are no further
    samples, so more of them narrow the interval only down to the spread between samples.

    Args:
        draws: rows by sample, of each draw (runs that differ in their seed).
        event: asked of each row.
        confidence: two-sided, in (0, 1).
    """
    rows = [
        [run[name] for run in draws]
        for name in (draws[0] if draws else ())
        if all(name in run and not run[name].error for run in draws)
    ]
    means = [sum(event(row) for row in mine) / len(mine) for mine in rows]
    images = [mine[0].image for mine in rows]
    return cluster_mean(means, images, confidence=confidence, bounds=(0, 1))
