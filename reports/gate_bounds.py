"""The bounds of a metric over the rows of a cell, and of its change since a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from reports.bounds import (
    Bounds,
    Difference,
    Mean,
    Nothing,
    Proportion,
    Resampled,
    acceleration,
)
from reports.design import Clusters
from reports.measure import (
    MEANS,
    PROPORTIONS,
    RANGES,
    RESAMPLED,
    Row,
    by_image,
    denominators,
    from_counts,
    mean_value,
)
from reports.statistics import left_out, resample

DRAWS = 10_000
"""Of a bootstrap that gates: a family of 500 decisions at 95 % still has draws in its tail."""


def bounds_of(rows: Sequence[Row], metric: str, seed: int) -> Bounds | None:
    """What a gate decides a metric with.

    Args:
        rows: of one cell, errors included (they are left out here).
        metric: its name.
        seed: of the bootstrap.

    Returns:
        None for a metric that does not exist or has no interval.
    """
    measured = [row for row in rows if not row.error]
    if metric in PROPORTIONS:
        event, eligible = PROPORTIONS[metric]
        base = [row for row in measured if eligible(row)]
        events = np.array([float(bool(event(row))) for row in base])
        return Proportion(_clusters(events, base)) if base else Nothing()
    if metric in RESAMPLED:
        return _resampled(measured, metric, seed)
    if metric in MEANS:
        pairs = [(value, row) for row in measured if (value := mean_value(row, metric)) is not None]
        if not pairs:
            return Nothing()
        values, base = np.array([value for value, _ in pairs]), [row for _, row in pairs]
        return Mean(_clusters(values, base), MEANS[metric])
    return None


def change_of(
    now: Mapping[str, Row], before: Mapping[str, Row], metric: str, seed: int
) -> Bounds | None:
    """How much a metric has risen since a baseline, on the samples measured in both.

    A rate is compared on the samples in its denominator in both runs, so that answers lost or won
    on clean images change nothing; they are the clean drop's affair.

    Args:
        now: rows of a cell by sample, errors included.
        before: of the same cell of the baseline.
        metric: its name.
        seed: of the bootstrap.
    """
    pairs = [
        (row, before[name])
        for name, row in now.items()
        if name in before and not row.error and not before[name].error
    ]
    if metric in PROPORTIONS:
        event, eligible = PROPORTIONS[metric]
        pairs = [(one, other) for one, other in pairs if eligible(one) and eligible(other)]
        events = [(bool(event(one)), bool(event(other))) for one, other in pairs]
        return Difference(events, [one.image for one, _ in pairs]) if pairs else Nothing()
    if metric in RESAMPLED:
        return _change_resampled(pairs, metric, seed)
    if metric in MEANS:
        return _change_of_mean(pairs, metric)
    return None


def _clusters(values: NDArray[np.float64], rows: Sequence[Row]) -> Clusters:
    return Clusters.of(values, [row.image for row in rows])


def _resampled(rows: Sequence[Row], metric: str, seed: int) -> Bounds:
    if not rows:
        return Nothing()
    table, index = by_image(rows), RESAMPLED.index(metric)
    value, draws = resample(table, from_counts, seed=seed, draws=DRAWS)
    if np.isnan(value[index]):
        return Nothing()
    skew = acceleration(left_out(table, from_counts)[:, index])
    mine, (n, images) = draws[:, index], denominators(table)[metric]
    return Resampled(float(value[index]), n, mine[~np.isnan(mine)], images, skew, *RANGES[metric])


def _change_resampled(pairs: Sequence[tuple[Row, Row]], metric: str, seed: int) -> Bounds:
    """One draw of images serves both runs, so what they share cancels."""
    if not pairs:
        return Nothing()
    index = RESAMPLED.index(metric)
    # An image keeps its name from the run, so that both tables have the same rows.
    renamed = [other._replace(image=one.image) for one, other in pairs]
    tables = by_image([one for one, _ in pairs]), by_image(renamed)
    table, columns = np.concatenate(tables, axis=1), tables[0].shape[1]

    def rise(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        return from_counts(sums[:, :columns]) - from_counts(sums[:, columns:])

    value, draws = resample(table, rise, seed=seed, draws=DRAWS)
    if np.isnan(value[index]):
        return Nothing()
    n, images = min(denominators(one)[metric] for one in tables)
    least, most = RANGES[metric]
    mine, skew = draws[:, index], acceleration(left_out(table, rise)[:, index])
    return Resampled(
        float(value[index]), n, mine[~np.isnan(mine)], images, skew, least - most, most - least
    )


def _change_of_mean(pairs: Sequence[tuple[Row, Row]], metric: str) -> Bounds:
    found = [
        (now - before, one)
        for one, other in pairs
        if (now := mean_value(one, metric)) is not None
        and (before := mean_value(other, metric)) is not None
    ]
    if not found:
        return Nothing()
    span = MEANS[metric]
    width = None if span is None else (span[0] - span[1], span[1] - span[0])
    values = np.array([value for value, _ in found])
    return Mean(_clusters(values, [row for _, row in found]), width)
