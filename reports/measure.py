"""The metrics of one cell: each is computed here, once, and nowhere else.

Definitions are in `reports.registry` and docs/metrics.md. Errors are no outcomes: they enter no
metric and are counted apart. An empty denominator gives null, never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from sys import intern
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reports.records import Diagnosis, Trial
from reports.registry import METRICS
from reports.statistics import (
    EMPTY,
    Estimate,
    cluster_bootstrap,
    cluster_mean,
    unseen,
    wilson,
)

CONFIDENCE = 0.95
"""Of the intervals in summary.json; a gate states its own."""

RESAMPLED: Final = ("clean_drop", "upr", "cae", "csg", "amplification")
"""Differences and ratios of accuracies, in the order of `from_counts`."""
MEANS: Final[dict[str, tuple[float, float] | None]] = {
    "jaccard": (0, 1),
    "spearman": (-1, 1),
    "kendall": (-1, 1),
    "top_preserved": (0, 1),
    "bottom_infiltrated": (0, 1),
    "evidence_kept_clean": (0, 1),
    "evidence_kept_attacked": (0, 1),
    "l2": None,
    "psnr": None,
    "tokens_clean": None,
    "tokens_attacked": None,
    "tokens_growth": None,
    "length_full_clean": None,
    "length_full_attacked": None,
    "length_full_growth": None,
    "length_compressed_clean": None,
    "length_compressed_attacked": None,
    "length_compressed_growth": None,
    "fallback_clean": (0, 1),
    "fallback_attacked": (0, 1),
}
"""Metrics that are means over samples, with the range of one value; None if it has none."""


class Row(NamedTuple):
    """What the metrics need of one trial; small, so that 100,000 fit in memory."""

    image: str
    kind: str
    error: bool
    full_clean: bool
    compressed_clean: bool
    full_attacked: bool
    compressed_attacked: bool
    recovered: bool | None
    reproduced: bool | None
    diagnosis: Diagnosis | None
    linf: float | None
    means: tuple[float | None, ...]
    """Values of the `mean` metrics, in the order of `MEANS`."""
    sample: str = ""
    codes: tuple[str, ...] = ()
    """Of the self-checks that fired."""
    pipelines: tuple[str, str] = ("", "")
    """Hashes of what was attacked and of what is deployed; see `records.Pipelines`."""
    seconds: tuple[float, ...] = ()
    """Of the four answers; empty if unknown."""
    traced: bool = False
    """The attack left a trace of its loss."""
    saved: bool = False
    """The attacked image is in the run folder."""
    fallbacks: tuple[bool, bool] = (False, False)
    """Whether the clean and the attacked image were given more tokens than the compressor keeps."""
    watched: bool = False
    """A detector has scored both images."""

    @property
    def failure(self) -> bool:
        """Compression-specific failure."""
        return (
            self.full_clean
            and self.compressed_clean
            and self.full_attacked
            and not self.compressed_attacked
        )


def mean_value(row: Row, name: str) -> float | None:
    """What a row adds to a metric that is a mean."""
    return row.means[list(MEANS).index(name)]


def row_of(trial: Trial) -> Row:
    """Take from a trial what the metrics need."""
    a, swap, distance = trial.answers, trial.swap, trial.distance
    return Row(
        image=trial.image,
        kind=trial.kind,
        error=a is None,
        full_clean=a is not None and a.clean_full.correct,
        compressed_clean=a is not None and a.clean_compressed.correct,
        full_attacked=a is not None and a.attacked_full.correct,
        compressed_attacked=a is not None and a.attacked_compressed.correct,
        recovered=swap.recovered if swap else None,
        reproduced=swap.reproduced if swap else None,
        diagnosis=swap.diagnosis if swap else None,
        linf=distance.linf if distance else None,
        means=tuple(map(_mean_values(trial).get, MEANS)),
        sample=trial.sample,
        codes=tuple(check.partition(":")[0] for check in trial.checks),
        pipelines=_pipelines(trial),
        seconds=_seconds(trial),
        traced=len(trial.loss) > 1,
        saved=trial.attacked_png is not None,
        watched=trial.detection is not None,
        fallbacks=_fallbacks(trial),
    )


def _pipelines(trial: Trial) -> tuple[str, str]:
    found = trial.pipelines
    # The same two strings in a hundred thousand rows.
    return ("", "") if found is None else (intern(found.attacked), intern(found.deployed))


def _fallbacks(trial: Trial) -> tuple[bool, bool]:
    found = trial.demands
    if found is None:
        return (False, False)
    return found.clean_compressed.fallback, found.attacked_compressed.fallback


def _seconds(trial: Trial) -> tuple[float, ...]:
    found = trial.demands
    if found is None:
        return ()
    four = (found.clean_full, found.clean_compressed, found.attacked_full)
    return tuple(one.seconds for one in (*four, found.attacked_compressed))


def _mean_values(trial: Trial) -> dict[str, float | None]:
    """The values of a trial that metrics are means of."""
    found: dict[str, float | None] = {}
    for part in (trial.tokens, trial.distance):
        found |= {name: getattr(part, name) for name in MEANS if hasattr(part, name)}
    if trial.demands is None:
        return found
    clean, hit = trial.demands.clean_compressed, trial.demands.attacked_compressed
    found |= _grown("tokens", clean.tokens, hit.tokens)
    found |= _grown("length_compressed", clean.generated, hit.generated)
    found |= {"fallback_clean": float(clean.fallback), "fallback_attacked": float(hit.fallback)}
    clean, hit = trial.demands.clean_full, trial.demands.attacked_full
    return found | _grown("length_full", clean.generated, hit.generated)


def _grown(name: str, clean: int, attacked: int) -> dict[str, float | None]:
    return {
        f"{name}_clean": clean,
        f"{name}_attacked": attacked,
        f"{name}_growth": attacked / clean if clean else None,
    }


_Test = Callable[[Row], bool | None]

PROPORTIONS: Final[dict[str, tuple[_Test, _Test]]] = {
    # name: (event, denominator); the event is only asked of rows in the denominator
    "acc_full_clean": (lambda r: r.full_clean, lambda r: True),
    "acc_compressed_clean": (lambda r: r.compressed_clean, lambda r: True),
    "acc_full_attacked": (lambda r: r.full_attacked, lambda r: True),
    "acc_compressed_attacked": (lambda r: r.compressed_attacked, lambda r: True),
    "csfr": (lambda r: r.failure, lambda r: r.full_clean and r.compressed_clean),
    "cbr": (
        lambda r: r.failure,
        lambda r: r.full_clean and r.compressed_clean and r.full_attacked,
    ),
    "full_asr": (lambda r: not r.full_attacked, lambda r: r.full_clean),
    "compressed_asr": (lambda r: not r.compressed_attacked, lambda r: r.compressed_clean),
    "recovered": (lambda r: r.recovered, lambda r: r.failure and r.recovered is not None),
    "reproduced": (lambda r: r.reproduced, lambda r: r.failure and r.reproduced is not None),
}
"""Metrics that are rates: what is counted, and of which rows."""
OUTCOMES = (*list(PROPORTIONS)[:8], *RESAMPLED)
"""Metrics also given by kind of question."""


def measure(
    rows: Sequence[Row],
    *,
    seed: int,
    confidence: float = CONFIDENCE,
    names: Iterable[str] = METRICS,
) -> dict[str, Estimate]:
    """Compute metrics over the rows of one cell.

    Args:
        rows: trials of one cell, errors included (they are left out here).
        seed: of the bootstrap.
        confidence: two-sided, of every interval.
        names: which metrics; default all.

    Returns:
        Estimates by name, in the order of the registry.
    """
    wanted, measured = set(names), [row for row in rows if not row.error]
    found: dict[str, Estimate] = {}
    for name in wanted & PROPORTIONS.keys():
        event, eligible = PROPORTIONS[name]
        base = [row for row in measured if eligible(row)]
        found[name] = wilson(sum(bool(event(row)) for row in base), len(base), confidence)
    if wanted.intersection(RESAMPLED):
        found |= _bootstrapped(measured, seed, confidence)
    for index, (name, bounds) in enumerate(MEANS.items()):
        if name in wanted:
            pairs = [(row.means[index], row.image) for row in measured]
            values = [value for value, _ in pairs if value is not None]
            images = [image for value, image in pairs if value is not None]
            found[name] = cluster_mean(values, images, confidence=confidence, bounds=bounds)
    if "linf" in wanted:
        sizes = [row.linf for row in measured if row.linf is not None]
        found["linf"] = Estimate(max(sizes), None, None, len(sizes)) if sizes else EMPTY
    return {name: found[name] for name in METRICS if name in wanted}


def _bootstrapped(rows: Sequence[Row], seed: int, confidence: float) -> dict[str, Estimate]:
    if not rows:
        return dict.fromkeys(RESAMPLED, EMPTY)
    table = by_image(rows)
    value, low, high = cluster_bootstrap(table, from_counts, seed=seed, confidence=confidence)
    bases = denominators(table)
    estimates: dict[str, Estimate] = {}
    for index, name in enumerate(RESAMPLED):
        if np.isnan(value[index]):
            estimates[name] = EMPTY
            continue
        n, images = bases[name]
        floor = unseen(images, confidence)
        point = float(value[index])
        ends = min(float(low[index]), point - floor), max(float(high[index]), point + floor)
        least, most = RANGES[name]
        estimates[name] = Estimate(point, max(least, ends[0]), min(most, ends[1]), n)
    return estimates


def denominators(table: NDArray[np.int64]) -> dict[str, tuple[int, int]]:
    """Samples and images that each of `RESAMPLED` is over.

    All for a drop, those with c or c_K for a ratio, the smaller of both for CSG.

    Args:
        table: see `by_image`.
    """
    every, full, compressed = (
        (int(table[:, column].sum()), int((table[:, column] > 0).sum())) for column in (0, 1, 2)
    )
    smaller = compressed if full[0] > compressed[0] else full
    return dict(zip(RESAMPLED, (every, full, compressed, smaller, every), strict=True))


RANGES: Final[dict[str, tuple[float, float]]] = {
    "clean_drop": (-1, 1),
    "upr": (0, float("inf")),  # above 1 when the attack mends more answers than it breaks
    "cae": (float("-inf"), 1),
    "csg": (float("-inf"), float("inf")),
    "amplification": (-2, 2),
}
"""Least and most of each of `RESAMPLED`."""


def by_image(rows: Sequence[Row]) -> NDArray[np.int64]:
    """Sum (n, c, c_K, c', c'_K) over the questions of each image: ``[C, 5]``, images sorted."""
    sums: dict[str, list[int]] = {}
    for row in rows:
        cluster = sums.setdefault(row.image, [0] * 5)
        for index, one in enumerate((1, *row[3:7])):
            cluster[index] += int(one)
    return np.array([sums[image] for image in sorted(sums)], dtype=np.int64)


def from_counts(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """`RESAMPLED` from sums of (n, c, c_K, c', c'_K), ``[R, 5]`` to ``[R, 5]``."""
    n, c, c_k, c_adv, c_k_adv = sums.T
    with np.errstate(divide="ignore", invalid="ignore"):
        upr = np.where(c > 0, c_adv / c, np.nan)
        cae = np.where(c_k > 0, 1 - c_k_adv / c_k, np.nan)
    drop, amplified = (c - c_k) / n, ((c_k - c_k_adv) - (c - c_adv)) / n
    return np.stack([drop, upr, cae, upr + cae - 1, amplified], axis=1)
