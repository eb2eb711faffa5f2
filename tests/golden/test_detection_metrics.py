"""Detection metrics against slow references, and scikit-learn where it is installed."""

from __future__ import annotations

import random

import pytest

from reports.detection import areas, aupr, auroc, flagged, threshold


def slow_auroc(negative: list[float], positive: list[float]) -> float:
    """Every pair asked."""
    wins = sum((p > n) + (p == n) / 2 for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


def slow_aupr(negative: list[float], positive: list[float]) -> float:
    """Every threshold tried, from the highest."""
    area = recall = 0.0
    for limit in sorted({*negative, *positive}, reverse=True):
        hit = sum(p >= limit for p in positive)
        alarm = sum(n >= limit for n in negative)
        area += (hit / len(positive) - recall) * hit / (hit + alarm)
        recall = hit / len(positive)
    return area


def drawn(seed: int, ties: bool) -> tuple[list[float], list[float]]:
    rng = random.Random(seed)  # noqa: S311
    negative = [rng.gauss(0, 1) for _ in range(rng.randint(1, 40))]
    positive = [rng.gauss(0.7, 1.5) for _ in range(rng.randint(1, 40))]
    if ties:
        return [round(n) for n in negative], [round(p) for p in positive]
    return negative, positive


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_areas(seed: int, ties: bool) -> None:
    negative, positive = drawn(seed, ties)
    assert auroc(negative, positive) == pytest.approx(slow_auroc(negative, positive))
    assert aupr(negative, positive) == pytest.approx(slow_aupr(negative, positive))


@pytest.mark.parametrize("seed", range(4))
def test_areas_are_those_of_scikit_learn(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    negative, positive = drawn(seed, True)
    truth, scores = [0] * len(negative) + [1] * len(positive), negative + positive
    assert auroc(negative, positive) == pytest.approx(metrics.roc_auc_score(truth, scores))
    assert aupr(negative, positive) == pytest.approx(metrics.average_precision_score(truth, scores))


def test_hand_made() -> None:
    assert auroc([0, 0], [1]) == 1
    assert aupr([0, 0], [1]) == 1
    assert auroc([1], [0]) == 0
    assert aupr([1], [0]) == 0.5
    assert auroc([2, 2], [2]) == 0.5
    assert aupr([2, 2], [2]) == pytest.approx(1 / 3)
    assert auroc([], [1]) is None
    assert aupr([1], []) is None


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("count", [1, 19, 20, 21, 100, 400])
def test_thresholds_keep_the_rate_and_are_the_least_that_do(rate: float, count: int) -> None:
    rng = random.Random(count)  # noqa: S311
    clean = [round(rng.gauss(0, 1), 1) for _ in range(count)]
    limit = threshold(clean, rate)
    assert limit is not None
    assert sum(one > limit for one in clean) <= rate * count
    lower = [one for one in clean if one < limit]
    if lower:
        assert sum(one > max(lower) for one in clean) > rate * count
    assert threshold([], rate) is None


def test_nothing_is_flagged_at_its_own_level() -> None:
    limit = threshold([0.0] * 50, 0.05)
    assert limit == 0.0
    assert flagged([0.0, 0.0, 1e-9], limit).value == pytest.approx(1 / 3)
    assert flagged([1.0], None).value is None


def test_intervals_hold_the_value_and_pair_pictures() -> None:
    negative, positive = drawn(3, False)
    count = min(len(negative), len(positive))
    negative, positive = negative[:count], positive[:count]
    names = [f"i{index // 2}" for index in range(count)]
    area, precision = areas(negative, positive, (names, names), seed=1, draws=500)
    for one, value in ((area, auroc(negative, positive)), (precision, aupr(negative, positive))):
        assert one.value == pytest.approx(value)
        assert one.low is not None
        assert one.high is not None
        assert 0 <= one.low < one.value < one.high <= 1
    again, _ = areas(negative, positive, (names, names), seed=1, draws=500)
    assert again == area
    assert areas([], positive, ([], names), seed=1)[0].value is None


def test_perfect_separation_still_has_a_width() -> None:
    names = [f"i{index}" for index in range(10)]
    area, _ = areas([0.0] * 10, [1.0] * 10, (names, names), seed=0, draws=200)
    assert area.value == area.high == 1
    assert area.low is not None
    assert area.low < 0.8


def test_the_bootstrap_resamples_pictures() -> None:
    """Against a slow one that draws pictures with replacement."""
    rng, count = random.Random(5), 60  # noqa: S311
    negative = [rng.gauss(0, 1) for _ in range(count)]
    positive = [rng.gauss(0.3, 1) for _ in range(count)]
    names = [f"i{index}" for index in range(count)]
    values = []
    for _ in range(1000):
        some = [rng.randrange(count) for _ in range(count)]
        values.append(slow_auroc([negative[i] for i in some], [positive[i] for i in some]))
    values.sort()
    area, _ = areas(negative, positive, (names, names), seed=2, draws=1000)
    assert area.low == pytest.approx(values[25], abs=0.03)
    assert area.high == pytest.approx(values[974], abs=0.03)
