"""What is reported of random defences over the draws of the evaluation."""

from __future__ import annotations

import pytest
from report_data import manifest, trial

from reports import draws
from reports.measure import row_of
from reports.metrics import summarise
from reports.records import Draws, Trial


def drawn(sample: str, failures: int, count: int = 4, eligible: int | None = None) -> Trial:
    able = count if eligible is None else eligible
    found = Draws(
        count=count, clean=able, attacked=count - failures, broken=failures, eligible=able,
        failures=failures,
    )  # fmt: skip
    return trial(sample, "1110" if failures else "1111", draws=found)


def test_expected_is_a_mean_of_means_and_worst_is_any() -> None:
    rows = [row_of(drawn(f"s{i}", hit)) for i, hit in enumerate((4, 1, 0, 0))]
    found = draws.over_draws(rows)
    assert found is not None
    assert found["draws"] == 4
    assert found["csfr"]["expected"]["value"] == pytest.approx((1 + 0.25) / 4)
    assert found["csfr"]["worst"]["value"] == 0.5
    assert found["csfr"]["expected"]["n"] == 4, "draws of a sample are no further samples"


def test_draws_that_were_wrong_already_count_for_nothing() -> None:
    rows = [row_of(drawn("a", 1, eligible=2)), row_of(drawn("b", 0, eligible=0))]
    found = draws.over_draws(rows)
    assert found is not None
    assert found["csfr"]["expected"]["value"] == 0.5
    assert found["csfr"]["expected"]["n"] == 1


def test_one_draw_is_no_section() -> None:
    assert draws.over_draws([row_of(trial("s0"))]) is None
    summary = summarise(manifest(1), [trial("s0")])
    assert "draws" not in summary["cells"][0]
    assert draws.table(summary) is None


def test_the_table_states_the_number() -> None:
    plan = manifest(4)
    summary = summarise(plan, [drawn(f"s{i}", hit) for i, hit in enumerate((4, 1, 0, 0))])
    shown = draws.table(summary)
    assert shown is not None
    row = dict(zip(shown.columns, shown.rows[0], strict=True))
    assert row["k"] == "4"
    assert row["CSFR, expected"].startswith("0.31 [")
    assert row["CSFR, worst of k"].startswith("0.50 [")
