import numpy as np
import pytest
from scipy import stats

from reports.bounds import Difference
from reports.exact import lower_bound, upper_bound
from reports.power import ChangeGate, RateGate


@pytest.mark.parametrize("n", [1, 28, 29, 64, 200, 1_000])
@pytest.mark.parametrize("limit", [0.02, 0.1, 0.5])
def test_counts_are_those_a_gate_decides_on(n: int, limit: float) -> None:
    gate = RateGate(limit)
    most, fewest = gate.passes_up_to(n), gate.fails_from(n)
    assert most < 0 or upper_bound(most, n, 0.95) <= limit
    assert most + 1 > n or upper_bound(most + 1, n, 0.95) > limit
    assert fewest > n or lower_bound(fewest, n, 0.95) > limit
    assert lower_bound(fewest - 1, n, 0.95) <= limit


def by_enumeration(limit: float, rate: float, power: float, decisions: int, most: int) -> int:
    """The first n from which on every n up to `most` has the chance, by scipy's sums."""
    last = 0
    for n in range(1, most):
        counts = np.arange(n + 1)
        if rate < limit:
            right = counts[stats.binom.cdf(counts, n, limit) <= 0.05]
        else:
            right = counts[stats.binom.sf(counts - 1, n, limit) <= 0.05 / decisions]
        if stats.binom.pmf(right, n, rate).sum() < power:
            last = n
    return last + 1


@pytest.mark.parametrize(
    ("limit", "rate", "power", "decisions"),
    [
        (0.1, 0.0, 0.8, 1),
        (0.1, 0.02, 0.9, 1),
        (0.1, 0.05, 0.8, 7),
        (0.1, 0.2, 0.8, 1),
        (0.1, 0.2, 0.8, 12),
        (0.5, 0.9, 0.95, 3),
        (0.3, 0.15, 0.5, 1),
    ],
)
def test_samples_are_those_an_enumeration_finds(
    limit: float, rate: float, power: float, decisions: int
) -> None:
    found = RateGate(limit, decisions=decisions).samples(rate, power)
    assert found == by_enumeration(limit, rate, power, decisions, 400)


def test_chances_are_binomial_sums() -> None:
    gate = RateGate(0.1)
    assert gate.passes_up_to(64) == 2
    assert gate.chance_to_pass(64, 0.02) == pytest.approx(stats.binom.cdf(2, 64, 0.02))
    assert gate.chance_to_fail(64, 0.3) == pytest.approx(
        stats.binom.sf(gate.fails_from(64) - 1, 64, 0.3)
    )
    assert gate.chance_to_pass(10, 0.0) == 0.0


@pytest.mark.parametrize("n", [20, 64, 300])
def test_at_the_limit_a_wrong_decision_is_as_rare_as_it_says(n: int) -> None:
    gate = RateGate(0.1, 0.9)
    assert gate.chance_to_pass(n, 0.1) <= 0.1
    assert gate.chance_to_fail(n, 0.1) <= 0.1


def test_nearer_to_the_limit_takes_more() -> None:
    gate = RateGate(0.1)
    needed = [gate.samples(rate, 0.8) for rate in (0.0, 0.02, 0.05, 0.08)]
    assert needed == sorted(needed)
    assert gate.samples(0.1, 0.8) is None
    assert gate.samples(0.099_999, 0.8) is None  # more than a million


def test_a_minimum_is_the_mirror_image() -> None:
    assert RateGate(0.9).mirrored.limit == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0.0,), "the limit is 0"), ((0.1, 0.4), "confidence is 0.4"), ((0.1, 0.9, 0), "0 decisions")],
)
def test_nonsense_is_refused_with_the_value(arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RateGate(*arguments)


def test_more_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rate 1\.5, power 0\.8"):
        RateGate(0.1).samples(1.5, 0.8)
    with pytest.raises(ValueError, match="max_increase 2"):
        ChangeGate(2)
    with pytest.raises(ValueError, match="no longer ≤ before"):
        ChangeGate(0.05).chance_to_pass(100, 0.1, 0.0, 0.2)


def simulated(gate: ChangeGate, n: int, before: float, newly: float, no_longer: float) -> float:
    rng, passes = np.random.default_rng(1), 0
    shares = (before - no_longer, newly, no_longer, 1 - before - newly)
    kinds = [(True, True), (True, False), (False, True), (False, False)]
    images = [str(i) for i in range(n)]
    for _ in range(400):
        pairs = [kinds[kind] for kind in rng.choice(4, size=n, p=shares)]
        passes += Difference(pairs, images).upper(gate.confidence) <= gate.max_increase
    return passes / 400


@pytest.mark.parametrize(
    ("n", "before", "newly", "no_longer"), [(150, 0.1, 0.02, 0.02), (200, 0.4, 0.05, 0.04)]
)
def test_the_chance_of_a_change_is_what_a_simulation_finds(
    n: int, before: float, newly: float, no_longer: float
) -> None:
    gate = ChangeGate(0.06)
    chance = gate.chance_to_pass(n, before, newly, no_longer)
    assert 0.1 < chance < 0.95
    assert chance == pytest.approx(simulated(gate, n, before, newly, no_longer), abs=0.07)


def test_samples_for_a_change() -> None:
    gate = ChangeGate(0.05)
    found = gate.samples(0.1, 0.02, 0.02, 0.8)
    assert gate.chance_to_pass(found, 0.1, 0.02, 0.02) >= 0.8
    assert gate.chance_to_pass(found - 1, 0.1, 0.02, 0.02) < 0.8
    assert gate.samples(0.1, 0.0, 0.0, 0.8) < found < gate.samples(0.1, 0.05, 0.05, 0.8)
    assert gate.samples(0.1, 0.08, 0.02, 0.8) is None  # the true rise is beyond the limit
