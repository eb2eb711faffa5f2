import math

from hypothesis import given
from hypothesis import strategies as st
from report_data import manifest, trial

from reports.metrics import measure, row_of, summarise
from reports.statistics import unseen, wilson
from reports.text import plain

bits = st.text("01", min_size=4, max_size=4)
tables = st.lists(st.tuples(bits, st.integers(0, 12)), min_size=1, max_size=60)


def rows_of(table: list[tuple[str, int]]) -> list:
    return [
        row_of(trial(f"s{i}", outcome, image=f"image-{image}"))
        for i, (outcome, image) in enumerate(table)
    ]


@given(tables)
def test_csfr_is_cbr_times_the_survival_of_the_full_path(table: list[tuple[str, int]]) -> None:
    found = measure(rows_of(table), seed=0, names=("csfr", "cbr"))
    eligible = [outcome for outcome, _ in table if outcome[:2] == "11"]
    survived = [outcome for outcome in eligible if outcome[2] == "1"]
    if not eligible:
        assert found["csfr"].value is None
    elif not survived:
        assert found["cbr"].value is None
        assert found["csfr"].value == 0
    else:
        share = len(survived) / len(eligible)
        assert math.isclose(found["csfr"].value, found["cbr"].value * share, abs_tol=1e-12)


@given(tables)
def test_csg_is_upr_plus_cae_minus_one(table: list[tuple[str, int]]) -> None:
    found = measure(rows_of(table), seed=0, names=("upr", "cae", "csg"))
    upr, cae, csg = (found[name].value for name in ("upr", "cae", "csg"))
    if upr is None or cae is None:
        assert csg is None
    else:
        assert math.isclose(csg, upr + cae - 1, abs_tol=1e-12)


@given(tables)
def test_every_interval_holds_its_value_and_counts_its_denominator(
    table: list[tuple[str, int]],
) -> None:
    found = measure(rows_of(table), seed=0)
    for name, estimate in found.items():
        assert (estimate.value is None) == (estimate.n == 0), name
        if estimate.low is not None:
            assert estimate.low <= estimate.value <= estimate.high, name
        assert estimate.n <= len(table), name


@given(tables, st.randoms(use_true_random=False))
def test_the_order_of_trials_does_not_matter(table: list[tuple[str, int]], random: object) -> None:
    trials = [trial(f"s{i}", bits, image=f"i{image}") for i, (bits, image) in enumerate(table)]
    planned = manifest(len(trials))
    shuffled = list(trials)
    random.shuffle(shuffled)
    assert summarise(planned, trials) == summarise(planned, shuffled)


@given(st.integers(0, 500), st.integers(1, 500), st.floats(0.5, 0.999))
def test_wilson_lies_in_the_unit_interval_and_is_symmetric(k: int, n: int, level: float) -> None:
    k = min(k, n)
    one, other = wilson(k, n, level), wilson(n - k, n, level)
    assert 0 <= one.low <= one.value <= one.high <= 1
    assert math.isclose(one.low, 1 - other.high, abs_tol=1e-12)


@given(st.integers(1, 1000))
def test_more_images_leave_less_unseen(clusters: int) -> None:
    assert unseen(clusters + 1) < unseen(clusters)


@given(st.text())
def test_plain_text_has_no_hidden_character(text: str) -> None:
    shown = plain(text)
    assert all(character.isprintable() for character in shown)
    assert plain(shown) == shown
