import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from report_data import cell, manifest, trial
from scipy import stats

from reports.design import Clusters
from reports.exact import at_least, at_most, lower_bound, upper_bound
from reports.metrics import summarise
from reports.multiplicity import holm
from reports.paired import PairedTable, newcombe
from reports.records import GateSpec
from reports.verdict import ExitCode, Inconclusive, Verdict, shell_code

counts = st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
levels = st.floats(0.6, 0.999)


@given(counts, levels)
def test_bounds_hold_the_value_and_mirror_each_other(
    count: tuple[int, int], confidence: float
) -> None:
    k, n = count
    low, high = lower_bound(k, n, confidence), upper_bound(k, n, confidence)
    assert 0 <= low <= k / n <= high <= 1
    assert math.isclose(low, 1 - upper_bound(n - k, n, confidence), abs_tol=1e-10)


@given(counts, levels)
def test_a_bound_is_where_the_tail_is_what_is_left(
    count: tuple[int, int], confidence: float
) -> None:
    k, n = count
    if k > 0:
        assert math.isclose(
            at_least(k, n, lower_bound(k, n, confidence)), 1 - confidence, rel_tol=1e-6
        )
    if k < n:
        assert math.isclose(
            at_most(k, n, upper_bound(k, n, confidence)), 1 - confidence, rel_tol=1e-6
        )


@given(st.integers(1, 60), st.floats(0.001, 0.999), st.floats(0.6, 0.99))
def test_whatever_the_truth_a_bound_is_wrong_no_more_often_than_it_says(
    n: int, rate: float, confidence: float
) -> None:
    chance = stats.binom.pmf(np.arange(n + 1), n, rate)
    above = sum(chance[k] for k in range(n + 1) if lower_bound(k, n, confidence) > rate)
    below = sum(chance[k] for k in range(n + 1) if upper_bound(k, n, confidence) < rate)
    assert max(above, below) <= 1 - confidence + 1e-9


@given(st.lists(st.floats(0, 1), max_size=12))
def test_correction_only_raises_and_keeps_the_order(p_values: list[float]) -> None:
    found = holm(p_values)
    assert all(
        p <= one <= min(1, len(p_values) * p) + 1e-12
        for p, one in zip(p_values, found, strict=True)
    )
    ranked = sorted(zip(p_values, found, strict=True))
    assert [one for _, one in ranked] == sorted(found)


@given(st.tuples(*[st.integers(0, 80)] * 4).filter(any), levels)
def test_newcombe_stays_in_range_and_holds_the_difference(
    counts: tuple[int, int, int, int], confidence: float
) -> None:
    found = newcombe(PairedTable(*counts), confidence)
    assert -1 <= found.low <= found.value + 1e-12
    assert found.value - 1e-12 <= found.high <= 1


@given(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=60),
    st.floats(0.55, 0.999),
)
def test_shared_images_never_make_samples_worth_more(
    answers: list[tuple[int, bool]], confidence: float
) -> None:
    values = np.array([float(event) for _, event in answers])
    found = Clusters.of(values, [f"i{image}" for image, _ in answers])
    assert 0 < found.effective_size(confidence) <= found.n


def verdict(broken: int, n: int, limit: float, per_image: int) -> Verdict:
    found = [
        trial(f"s{i}", "1110" if i < broken else "1111", image=f"i{i // per_image}")
        for i in range(n)
    ]
    control = [cell(attack="noise", knowledge="none")]
    gates = [GateSpec(name="g", metric="csfr", max=limit)]
    return Verdict(summarise(manifest(n, gates=gates, cells=control), found)["verdict"])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 60), st.sampled_from([0.05, 0.3]))
def test_one_more_failure_never_makes_the_verdict_better(
    n: int, one: int, other: int, limit: float
) -> None:
    fewer, more = sorted((min(one, n), min(other, n)))
    assert verdict(fewer, n, limit, 1).severity <= verdict(more, n, limit, 1).severity


@given(st.sampled_from(ExitCode), st.sampled_from([None, *Inconclusive]), st.booleans())
def test_no_policy_passes_anything_but_a_want_of_samples(
    code: ExitCode, policy: Inconclusive | None, more: bool
) -> None:
    found = shell_code(code, policy, more_samples_decide=more)
    if found is ExitCode.PASS and code is not ExitCode.PASS:
        assert (code, more) == (ExitCode.INCONCLUSIVE, True)
        assert policy in (Inconclusive.WARN, Inconclusive.PASS)
