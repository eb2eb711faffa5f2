"""Gates decided together: families, causes, and what stands beside every decision."""

from collections.abc import Mapping

import pytest
from known import Known
from report_data import cell, manifest, trial
from scipy import stats

from reports.bounds import Bounds
from reports.deciding import Measured, Run, decide
from reports.gate import GateDecision, Progress, Verdict, conclude
from reports.metrics import summarise
from reports.records import GateSpec
from reports.statistics import Estimate
from reports.verdict import ExitCode, Inconclusive, shell_code

FULL = Progress(expected=100, measured=100, errors=0)
GOOD = Known(0.01, 0.0, 0.02)
OPEN = Known(0.1, 0.05, 0.2)


def bad(p: float) -> Known:
    return Known(0.2, 0.11, 0.3, p)


def gate(name: str = "g", **changes: object) -> GateSpec:
    return GateSpec(**({"name": name, "metric": "csfr", "max": 0.1} | changes))


def made(
    gates: list[GateSpec], found: Mapping[str, Bounds | None], progress: Progress = FULL
) -> list[GateDecision]:
    """Decide gates on cells that have these bounds."""
    run = Run(
        [cell(name, attack=name) for name in found],
        lambda _, one: Measured(found[one.id]),
        lambda _: progress,
        clean_drop=lambda _: Estimate(0.02, 0.0, 0.05, 64),
    )
    return decide(gates, run)


def test_a_failure_has_to_stand_among_all_decisions_of_the_family() -> None:
    (alone,) = made([gate()], {"a": bad(0.02)})
    (among,) = made([gate()], {"a": bad(0.02), "b": GOOD, "c": GOOD})
    assert (alone.verdict, alone.family_size) == (Verdict.FAIL, 1)
    assert (among.verdict, among.family_size) == (Verdict.INCONCLUSIVE, 3)
    assert among.cells[0].cause == "multiplicity"
    assert among.cells[0].p_holm == pytest.approx(0.06)
    assert among.more_samples_decide
    assert "not as one of 3 decisions" in among.reason


def test_the_strongest_failure_is_judged_hardest_and_the_next_less() -> None:
    (one,) = made([gate()], {"a": bad(0.02), "b": bad(0.001), "c": GOOD})
    # 3 × 0.001 fails, so one is left out: 2 × 0.02 fails too.
    assert [each.verdict for each in one.cells] == [Verdict.FAIL, Verdict.FAIL, Verdict.PASS]
    assert [each.p_holm for each in one.cells] == pytest.approx([0.04, 0.003, 1.0])


def test_gates_of_other_families_do_not_count() -> None:
    found = {"a": bad(0.02), "b": GOOD, "c": GOOD}
    mine = gate("mine", where={"attack": "a"}, family="release")
    others = gate("others", where={"attack": "b"})
    assert made([mine, others], found)[0].verdict is Verdict.FAIL
    together = [mine.model_copy(update={"family": ""}), gate("all")]
    first, second = made(together, found)
    assert first.verdict is Verdict.INCONCLUSIVE
    assert first.family_size == second.family_size == 4


def test_what_was_never_measured_counts_in_the_family_all_the_same() -> None:
    (one,) = made([gate()], {"a": bad(0.02), "b": None, "c": None})
    assert one.family_size == 3
    assert one.cells[0].verdict is Verdict.INCONCLUSIVE


def test_a_pass_needs_no_correction() -> None:
    found = {f"a{i}": Known(0.05, 0.02, 0.0999) for i in range(40)}
    (one,) = made([gate()], found)
    assert one.verdict is Verdict.PASS
    assert one.family_size == 40


def test_both_limits_share_the_risk() -> None:
    (one,) = made([gate(min=0.0)], {"a": bad(0.03)})
    assert one.verdict is Verdict.INCONCLUSIVE
    assert "if either limit may be broken" in one.reason
    (one,) = made([gate(min=0.0)], {"a": bad(0.02)})
    assert one.verdict is Verdict.FAIL


@pytest.mark.parametrize(
    ("found", "progress", "cause", "more"),
    [
        (OPEN, FULL, "samples", True),
        (None, FULL, "unmeasured", False),
        (OPEN, Progress(expected=100, measured=90, errors=10), "incomplete", False),
    ],
)
def test_only_a_want_of_samples_can_be_waved_through(
    found: Bounds | None, progress: Progress, cause: str, more: bool
) -> None:
    (one,) = made([gate()], {"a": found}, progress)
    assert one.cells[0].cause == cause
    conclusion = conclude([one], FULL)
    assert one.more_samples_decide is conclusion.more_samples_decide is more
    codes = {
        policy: shell_code(conclusion.exit_code, policy, more_samples_decide=more)
        for policy in (None, *Inconclusive)
    }
    waved = ExitCode.PASS if more else ExitCode.INCONCLUSIVE
    assert codes == {
        None: ExitCode.INCONCLUSIVE,
        Inconclusive.FAIL: ExitCode.FAIL,
        Inconclusive.WARN: waved,
        Inconclusive.PASS: waved,
    }


def test_one_cell_that_was_not_measured_spoils_the_waving_through() -> None:
    (one,) = made([gate()], {"a": OPEN, "b": None})
    assert not one.more_samples_decide
    assert "no bounds" in one.reason  # what more samples do not mend is named first


@pytest.mark.parametrize(
    "code",
    [one for one in ExitCode if one is not ExitCode.INCONCLUSIVE],
)
@pytest.mark.parametrize("policy", list(Inconclusive))
def test_no_policy_touches_another_exit_code(code: ExitCode, policy: Inconclusive) -> None:
    assert shell_code(code, policy, more_samples_decide=True) is code


def test_what_compression_alone_costs_stands_beside() -> None:
    (one,) = made([gate()], {"a": bad(1e-6)})
    assert one.cells[0].clean_drop == {"value": 0.02, "low": 0.0, "high": 0.05, "n": 64}
    assert "Compression alone, without an attack, costs 0.020" in one.reason
    assert "(n = 64)" in one.reason
    (clean,) = made([gate(metric="clean_drop")], {"a": bad(1e-6)})
    assert "Compression alone" not in clean.reason  # it is what the gate is about


def trials(broken: int, n: int, cells: int) -> list:
    return [
        trial(f"s{i}", "1110" if i < broken else "1111", f"c{c}")
        for c in range(cells)
        for i in range(n)
    ]


def test_counts_and_bounds_of_a_real_run() -> None:
    run = manifest(100, gates=[gate()], cells=[cell("c0", attack="noise", knowledge="none")])
    summary = summarise(run, trials(3, 100, 1))
    (decided,) = summary["gates"][0]["cells"]
    assert (decided["events"], decided["n"], decided["value"]) == (3, 100, 0.03)
    exact = stats.binomtest(3, 100).proportion_ci(0.9, method="exact")
    assert decided["bound_low"] == pytest.approx(exact.low, abs=1e-6)
    assert decided["bound_high"] == pytest.approx(exact.high, abs=1e-6)
    assert (decided["verdict"], decided["effective_n"]) == ("pass", None)
    assert "3 of 100" in decided["reason"]
    assert decided["low"] == summary["cells"][0]["metrics"]["csfr"]["low"]  # Wilson, for showing


def test_many_cells_of_a_real_run_share_the_risk() -> None:
    # 17 of 100 against a limit of 0.1: p = 0.0206, so 3 cells have 0.0618 together.
    for cells, verdict in ((1, "fail"), (3, "inconclusive")):
        named = [cell(f"c{i}", attack="noise", knowledge="none") for i in range(cells)]
        found = [
            trial(f"s{i}", "1110" if c == 0 and i < 17 else "1111", f"c{c}")
            for c in range(cells)
            for i in range(100)
        ]
        summary = summarise(manifest(100, gates=[gate()], cells=named), found)
        assert summary["gates"][0]["verdict"] == verdict
        assert summary["gates"][0]["cells"][0]["p"] == pytest.approx(0.0206, abs=1e-4)


def test_a_summary_from_before_is_still_read() -> None:
    old = {
        "name": "g", "metric": "csfr", "max": 0.1, "min": None, "where": {"attack": "caa"},
        "confidence": 0.95, "line": 23, "verdict": "fail", "reason": "…",
        "cells": [{"cell": "9f2c41d0", "label": "…", "verdict": "fail", "reason": "…",
                   "value": 0.4, "low": 0.307, "high": 0.501, "n": 95, "doubt": ""}],
    }  # fmt: skip
    found = GateDecision.model_validate(old)
    assert (found.family, found.family_size, found.more_samples_decide) == ("", 0, False)
    assert (found.cells[0].bound_low, found.cells[0].cause) == (None, "")


def test_a_gate_from_before_is_still_read() -> None:
    old = {"name": "g", "metric": "csfr", "max": 0.1, "min": None, "where": {}, "confidence": 0.95}
    found = GateSpec.model_validate(old)
    assert not found.compares
    assert found.limits == (None, 0.1)
