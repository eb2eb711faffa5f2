"""Minimal epsilons: the median with its interval, the curve, and what is left out."""

from __future__ import annotations

from typing import Any

import pytest
from judged_run import searched
from report_data import cell, trial

from reports.measure import row_of
from reports.reading import minimal_text
from reports.records import Distance, Trial
from reports.statistics import wilson
from reports.survival import minimal_epsilon


def found(trials: list[Trial], goal: str = "compression_only") -> dict[str, Any]:
    spec = {"attack": {"type": "minimal", "goal": goal}}
    made = minimal_epsilon(cell(epsilon=16 / 255, spec=spec), [row_of(one) for one in trials])
    result: dict[str, Any] = made["minimal_epsilon"]
    return result


def test_other_attacks_have_none() -> None:
    rows = [row_of(one) for one in searched("c1", [1, 2])]
    assert minimal_epsilon(cell(spec={"attack": {"type": "pgd"}}), rows) == {}
    assert minimal_epsilon(cell(), rows) == {}


def test_the_curve_falls_to_what_holds() -> None:
    got = found(searched("c1", [2, 2, 3, 5, None]))
    assert (got["n"], got["broken"], got["held"]) == (5, 4, 1)
    assert [round(one["epsilon"] * 255) for one in got["curve"]] == [2, 3, 5]
    assert [one["holding"]["value"] for one in got["curve"]] == [0.6, 0.4, 0.2]
    assert round(got["median"] * 255) == 3
    assert got["curve"][0]["holding"]["low"] == pytest.approx(wilson(3, 5).low, abs=1e-6)


def test_the_interval_of_the_median_is_where_the_band_crosses_one_half() -> None:
    levels: list[int | None] = [1 + i // 5 for i in range(60)]  # five samples a level, 1 to 12
    got = found(searched("c1", levels))
    held = {level: wilson(60 - 5 * level, 60) for level in range(1, 13)}
    assert round(got["median"] * 255) == 6
    assert round(got["low"] * 255) == min(k for k, one in held.items() if one.low <= 0.5)
    assert round(got["high"] * 255) == min(k for k, one in held.items() if one.high <= 0.5)
    assert got["low"] < got["median"] < got["high"]


def test_a_median_beyond_the_search_is_not_made_up() -> None:
    got = found(searched("c1", [4, *[None] * 9]))
    assert (got["median"], got["low"], got["high"]) == (None, None, None)
    assert "beyond the budget; 9 hold at 16/255" in minimal_text(got, 16 / 255)
    some = found(searched("c1", [*[4] * 8, *[None] * 8]))
    assert some["median"] is not None
    assert some["high"] is None
    assert "at 4/255 (95 % interval 4/255 to beyond the budget)" in minimal_text(some, 16 / 255)


def test_what_could_not_be_broken_is_left_out() -> None:
    wrong = trial("w", "0111", "c1", distance=Distance(linf=0.0, l2=0.0, psnr=None))
    failed = trial("e", "error", "c1")
    got = found([*searched("c1", [2, None]), wrong, failed])
    assert got["n"] == 2
    assert found([failed])["n"] == 0


@pytest.mark.parametrize(
    ("goal", "broken"), [("compression_only", 1), ("compressed", 2), ("full", 2)]
)
def test_the_goal_says_what_is_a_break(goal: str, broken: int) -> None:
    outcomes = ("1110", "1100", "1101", "1111")
    assert found([trial(name, name, "c1") for name in outcomes], goal)["broken"] == broken
