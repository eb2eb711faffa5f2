import pytest
from known import Known
from report_data import cell, manifest, trial

from reports.bounds import Bounds, Nothing
from reports.deciding import Measured, Run, decide
from reports.gate import CellDecision, ExitCode, GateDecision, Progress, Verdict, conclude, covers
from reports.metrics import summarise
from reports.records import Cell, GateSpec

FULL = Progress(expected=100, measured=100, errors=0)


def gate(**changes: object) -> GateSpec:
    return GateSpec(**({"name": "g", "metric": "csfr", "max": 0.1} | changes))


def made(
    gates: list[GateSpec],
    cells: list[Cell],
    found: Bounds | dict[str, Bounds] | None,
    progress: Progress = FULL,
) -> list[GateDecision]:
    def measured(spec: GateSpec, one: Cell) -> Measured:
        return Measured(found[one.id] if isinstance(found, dict) else found)

    return decide(gates, Run(cells, measured, lambda _: progress))


def decision(
    found: Bounds | None, spec: GateSpec | None = None, progress: Progress = FULL
) -> CellDecision:
    (one,) = made([spec or gate()], [cell()], found, progress)
    assert one.verdict is one.cells[0].verdict
    return one.cells[0]


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.00, 0.05, Verdict.PASS),
        (0.00, 0.10, Verdict.PASS),  # within includes the limit itself
        (0.05, 0.11, Verdict.INCONCLUSIVE),
        (0.10, 0.20, Verdict.INCONCLUSIVE),  # beyond does not
        (0.11, 0.20, Verdict.FAIL),
    ],
)
def test_a_maximum_is_decided_by_the_bound_on_its_far_side(
    low: float, high: float, verdict: Verdict
) -> None:
    assert decision(Known((low + high) / 2, low, high)).verdict is verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.90, 0.95, Verdict.PASS),
        (0.85, 0.95, Verdict.INCONCLUSIVE),
        (0.80, 0.89, Verdict.FAIL),
    ],
)
def test_a_minimum_likewise(low: float, high: float, verdict: Verdict) -> None:
    spec = gate(max=None, min=0.9)
    assert decision(Known(0.9, low, high), spec).verdict is verdict


def test_a_gate_may_state_both_ends() -> None:
    spec = gate(max=0.6, min=0.4)
    assert decision(Known(0.5, 0.45, 0.55), spec).verdict is Verdict.PASS
    assert decision(Known(0.5, 0.45, 0.65), spec).verdict is Verdict.INCONCLUSIVE
    assert decision(Known(0.3, 0.25, 0.35), spec).verdict is Verdict.FAIL


GOOD = Known(0.01, 0.0, 0.02)
BAD = Known(0.5, 0.4, 0.6)


@pytest.mark.parametrize(
    ("found", "progress", "reason"),
    [
        (None, FULL, "no bounds"),
        (Nothing(), FULL, "denominator is empty"),
        (Known(0.01, None, None), FULL, "a point cannot gate"),
        (GOOD, Progress(expected=100, measured=94, errors=6), "errors"),
        (GOOD, Progress(expected=100, measured=99, errors=0), "did not run"),
    ],
)
def test_what_was_not_measured_never_passes(
    found: Bounds | None, progress: Progress, reason: str
) -> None:
    one = decision(found, progress=progress)
    assert one.verdict is Verdict.INCONCLUSIVE
    assert reason in one.reason
    assert one.cause in ("unmeasured", "incomplete")


def test_a_few_errors_are_tolerated() -> None:
    progress = Progress(expected=100, measured=95, errors=5)
    assert decision(GOOD, progress=progress).verdict is Verdict.PASS


def test_errors_do_not_excuse_a_failure() -> None:
    progress = Progress(expected=100, measured=50, errors=50)
    assert decision(BAD, progress=progress).verdict is Verdict.FAIL


def test_the_worst_cell_decides() -> None:
    cells = [cell("a"), cell("b"), cell("c")]
    found = {"a": GOOD, "b": BAD, "c": Known(0.1, 0.05, 0.2)}
    (one,) = made([gate()], cells, found)
    assert one.verdict is Verdict.FAIL
    assert [each.verdict for each in one.cells] == [
        Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE,
    ]  # fmt: skip
    assert "0.500" in one.reason


def test_of_cells_that_pass_the_one_nearest_to_the_limit_is_named() -> None:
    cells = [cell("a"), cell("b", attack="pgd"), cell("c")]
    near = Known(0.05, 0.02, 0.09)
    (one,) = made([gate()], cells, {"a": GOOD, "b": near, "c": GOOD})
    assert one.verdict is Verdict.PASS
    assert "pgd" in one.reason


def test_a_gate_that_matches_nothing_is_inconclusive() -> None:
    (one,) = made([gate(where={"attack": "cca"})], [cell()], GOOD)
    assert one.verdict is Verdict.INCONCLUSIVE
    assert "attack = cca" in one.reason
    assert not one.more_samples_decide


@pytest.mark.parametrize(
    ("where", "matches"),
    [
        ({}, True),
        ({"attack": "caa"}, True),
        ({"attack": "caa", "epsilon": 8 / 255}, True),
        ({"epsilon": 0.031372549}, True),  # as a person or a YAML dump may round it
        ({"epsilon": 16 / 255}, False),
        ({"attack": "pgd"}, False),
        ({"colour": "red"}, False),
    ],
)
def test_where_selects_cells(where: dict[str, str | float], matches: bool) -> None:
    assert covers(gate(where=where), cell()) is matches


def verdict_of(gates: list[GateSpec], outcomes: dict[str, int], planned: int | None = None) -> dict:
    trials = [trial(f"{o}{i}", o) for o, times in outcomes.items() for i in range(times)]
    samples = [t.sample for t in trials] + [f"x{i}" for i in range((planned or 0) - len(trials))]
    control = [cell(attack="noise", knowledge="none")]  # which no self-check is about
    run = manifest(0, gates=gates, cells=control).model_copy(update={"samples": samples})
    return summarise(run, trials)


@pytest.mark.parametrize(
    ("gates", "outcomes", "planned", "verdict", "code"),
    [
        ([gate()], {"1111": 100}, None, "pass", ExitCode.PASS),
        ([gate()], {"1110": 50, "1111": 50}, None, "fail", ExitCode.FAIL),
        ([gate()], {"1110": 10, "1111": 90}, None, "inconclusive", ExitCode.INCONCLUSIVE),
        ([], {"1110": 100}, None, "not_gated", ExitCode.PASS),
        ([gate()], {"1111": 100}, 120, "inconclusive", ExitCode.INCOMPLETE),
        ([gate()], {"1110": 100}, 120, "fail", ExitCode.INCOMPLETE),
        ([], {"error": 10}, None, "not_gated", ExitCode.INCOMPLETE),
        ([gate()], {}, None, "inconclusive", ExitCode.NOTHING_SELECTED),
    ],
)
def test_the_exit_code_says_what_happened(
    gates: list[GateSpec], outcomes: dict[str, int], planned: int | None, verdict: str, code: int
) -> None:
    summary = verdict_of(gates, outcomes, planned)
    assert (summary["verdict"], summary["exit_code"]) == (verdict, code)
    assert summary["why"].endswith(".")


def test_a_run_without_gates_says_so() -> None:
    summary = verdict_of([], {"1111": 10})
    assert summary["headline"] == "Not gated"
    assert "does not decide" in summary["why"]


def test_a_gate_uses_its_own_confidence() -> None:
    outcomes = {"1110": 17, "1111": 83}
    strict = verdict_of([gate(confidence=0.99)], outcomes)["gates"][0]
    loose = verdict_of([gate(confidence=0.8)], outcomes)["gates"][0]
    assert (strict["verdict"], loose["verdict"]) == ("inconclusive", "fail")
    assert strict["cells"][0]["low"] < loose["cells"][0]["low"]


def test_a_decision_carries_what_readers_need() -> None:
    spec = gate(where={"attack": "caa"}, line=12)
    (one,) = made([spec], [cell()], GOOD)
    assert (one.line, one.where, one.limit) == (12, {"attack": "caa"}, "csfr ≤ 0.1")
    assert type(one).model_validate_json(one.model_dump_json()) == one
    assert one.cells[0].label == "scenes-a · fastv · caa · ε 8/255"


def test_no_gates_and_nothing_planned_is_nothing_selected() -> None:
    found = conclude([], Progress(expected=0, measured=0, errors=0))
    assert found.exit_code is ExitCode.NOTHING_SELECTED


def test_an_unreadable_label_cannot_reorder_the_verdict() -> None:
    odd: Cell = cell(compression="fast\u202ev\n")
    (one,) = made([gate()], [odd], GOOD)
    assert "\u202e" not in one.reason
    assert "\n" not in one.reason
