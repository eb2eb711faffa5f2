import math

import numpy as np
import pytest
from scipy import stats

from reports.bounds import (
    Bounds,
    Difference,
    Mean,
    Nothing,
    Proportion,
    Resampled,
    acceleration,
    hides,
)
from reports.design import Clusters
from reports.exact import lower_bound, upper_bound
from reports.paired import PairedTable, newcombe
from reports.statistics import left_out, resample


def proportion(events: int, n: int, per_image: int = 1) -> Proportion:
    values = np.array([1.0] * events + [0.0] * (n - events))
    return Proportion(Clusters.of(values, [f"i{i // per_image:05d}" for i in range(n)]))


def difference(newly: int, no_longer: int, n: int, both: int = 0) -> Difference:
    pairs = [(True, False)] * newly + [(False, True)] * no_longer + [(True, True)] * both
    pairs += [(False, False)] * (n - len(pairs))
    return Difference(pairs, [f"i{i}" for i in range(n)])


def mean(values: list[float], span: tuple[float, float] | None = None) -> Mean:
    return Mean(Clusters.of(np.array(values), [f"i{i}" for i in range(len(values))]), span)


def resampled(seed: int = 1, images: int = 60) -> Resampled:
    rng = np.random.default_rng(seed)
    hits = (rng.random(images) < 0.2).astype(np.int64)
    table = np.stack([np.ones(images, dtype=np.int64), hits], axis=1)
    value, draws = resample(table, share, seed=seed, draws=4_000)
    skew = acceleration(left_out(table, share)[:, 0])
    return Resampled(float(value[0]), images, draws[:, 0], images, skew)


def share(sums: np.ndarray) -> np.ndarray:
    return sums[:, 1:2] / sums[:, 0:1]


EVERY: list[Bounds] = [
    proportion(12, 100),
    proportion(12, 100, per_image=4),
    difference(9, 3, 100, both=20),
    mean([0.1, 0.4, 0.2, 0.9, 0.5, 0.35]),
    resampled(),
]


@pytest.mark.parametrize("found", EVERY, ids=lambda one: type(one).__name__)
def test_bounds_move_apart_as_the_confidence_rises(found: Bounds) -> None:
    levels = (0.6, 0.8, 0.9, 0.95, 0.99)
    low, high = [found.lower(one) for one in levels], [found.upper(one) for one in levels]
    assert low == sorted(low, reverse=True)
    assert high == sorted(high)
    assert low[0] <= found.value <= high[0]


@pytest.mark.parametrize("found", EVERY, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_a_p_value_is_the_level_at_which_the_bound_comes_to_the_limit(
    found: Bounds, confidence: float
) -> None:
    tail = 1 - confidence
    low, high = found.lower(confidence), found.upper(confidence)
    assert low is not None
    assert high is not None
    assert found.p_above(low - 1e-6) <= tail * 1.001
    assert found.p_above(low + 1e-6) >= tail * 0.999
    assert found.p_below(high + 1e-6) <= tail * 1.001
    assert found.p_below(high - 1e-6) >= tail * 0.999


def test_a_limit_on_the_other_side_is_no_surprise() -> None:
    for found in EVERY:
        assert found.p_above(found.value + 0.5) > 0.5
        assert found.p_below(found.value - 0.5) > 0.5


def test_independent_samples_have_the_exact_bounds() -> None:
    found = proportion(12, 100)
    assert (found.events, found.n, found.effective_n) == (12, 100, None)
    assert found.lower(0.95) == lower_bound(12, 100, 0.95)
    assert found.upper(0.95) == upper_bound(12, 100, 0.95)
    assert found.p_above(0.05) == pytest.approx(stats.binomtest(12, 100, 0.05, "greater").pvalue)


def test_questions_that_fall_together_widen_the_bounds() -> None:
    alone, together = proportion(12, 100), proportion(12, 100, per_image=4)
    assert together.value == alone.value
    assert together.effective_n is not None
    assert together.effective_n < 30
    assert together.lower(0.95) < alone.lower(0.95)
    assert together.upper(0.95) > alone.upper(0.95)
    assert together.p_above(0.05) > alone.p_above(0.05)


def test_all_or_nothing_never_looks_certain() -> None:
    assert proportion(0, 60, per_image=2).upper(0.95) == pytest.approx(1 - 0.05 ** (1 / 30))
    assert proportion(60, 60, per_image=2).lower(0.95) == pytest.approx(0.05 ** (1 / 30))


def test_a_mean_has_students_bounds() -> None:
    values = [0.1, 0.4, 0.2, 0.9, 0.5, 0.35]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    found = mean(values)
    assert found.lower(0.95) == pytest.approx(expected.low)
    assert found.upper(0.95) == pytest.approx(expected.high)
    assert found.p_above(0.2) == pytest.approx(
        stats.ttest_1samp(values, 0.2, alternative="greater").pvalue, rel=1e-4
    )


def test_equal_values_of_a_bounded_mean_hide_what_was_not_seen() -> None:
    found = mean([1.0] * 30, (0, 1))
    assert found.upper(0.95) == 1.0
    assert found.lower(0.95) == pytest.approx(0.05 ** (1 / 30))
    assert hides(0, 0.95) == 1.0


def test_one_picture_has_bounds_only_where_there_is_a_range() -> None:
    alone = Clusters.of(np.array([0.4, 0.6]), ["a", "a"])
    assert Mean(alone).lower(0.95) is None
    assert math.isclose(Mean(alone).p_above(0.1), 1.0)
    assert (Mean(alone, (0, 1)).lower(0.95), Mean(alone, (0, 1)).upper(0.95)) == (0, 1)


def test_the_bootstrap_agrees_with_scipys() -> None:
    rng = np.random.default_rng(5)
    values = rng.exponential(size=80)
    table = np.stack([np.ones(80), np.round(values * 1e6)], axis=1).astype(np.int64)

    def average(sums: np.ndarray) -> np.ndarray:
        return sums[:, 1:2] / sums[:, 0:1] / 1e6

    value, draws = resample(table, average, seed=1, draws=20_000)
    skew = acceleration(left_out(table, average)[:, 0])
    found = Resampled(float(value[0]), 80, draws[:, 0], 80, skew)
    oracle = stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, n_resamples=20_000, method="BCa",
        rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    # Ours is stretched as Student's quantile is, by 1.2 %, and both are random.
    width = oracle.high - oracle.low
    assert found.lower(0.95) == pytest.approx(oracle.low, abs=0.04 * width)
    assert found.upper(0.95) == pytest.approx(oracle.high, abs=0.04 * width)


def test_a_tail_of_less_than_one_draw_is_not_known() -> None:
    found = resampled()
    assert found.lower(1 - 1e-6) == -math.inf
    assert found.upper(1 - 1e-6) == math.inf
    bounded = Resampled(found.value, found.n, found.draws, found.images, least=0, most=1)
    assert (bounded.lower(1 - 1e-6), bounded.upper(1 - 1e-6)) == (0, 1)


def test_equal_resamples_hide_what_was_not_seen() -> None:
    found = Resampled(0.0, 40, np.zeros(1_000), 40)
    assert found.upper(0.95) == pytest.approx(hides(40, 0.95)) == pytest.approx(1 - 0.05**0.025)


def test_a_difference_is_newcombes_and_one_sample_wider() -> None:
    found = difference(9, 3, 100, both=20)
    expected = newcombe(PairedTable(20, 9, 3, 68), 0.9)
    assert found.value == pytest.approx(0.06)
    assert found.lower(0.95) == pytest.approx(expected.low - 0.01)
    assert found.upper(0.95) == pytest.approx(expected.high + 0.01)


def test_no_change_at_all_is_no_proof_of_none() -> None:
    assert difference(0, 0, 50, both=25).upper(0.95) >= hides(50, 0.95)


def test_an_empty_denominator_has_no_bounds() -> None:
    assert Nothing().lower(0.95) is None
    assert Nothing().upper(0.95) is None
    assert Nothing().p_above(0.1) == 1.0
