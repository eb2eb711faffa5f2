"""Every rule of the honesty gate has a defence that fails it and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from audited import (
    EPSILONS,
    LARGE,
    MIDDLE,
    SMALL,
    N,
    Run,
    cell_of,
    facts,
)

from reports.honesty import RULES, State
from reports.records import Cell, Draws, GateSpec, PartFacts


def of(
    defense: str = "good", *attacks: str, epsilon: float | None = None
) -> Callable[[Cell], bool]:
    def wanted(cell: Cell) -> bool:
        if cell.defense != defense or (attacks and cell.attack not in attacks):
            return False
        return epsilon is None or cell.epsilon == epsilon

    return wanted


WHITE = ("caa adaptive", "caa adaptive 100")


def guard(run: Run, **changes: Any) -> None:
    run.change(of("good"), guard=facts(**changes))


def coded(run: Run, wanted: Callable[[Cell], bool], code: str) -> None:
    """A self-check on every sample of a cell."""
    run.row(wanted, codes=(code,))


def spend(run: Run, kind: str = "force_fallback", *, adaptive: bool = True) -> None:
    """An attack that wants the defence to spend more; of a detector, its alarm."""
    cell = cell_of("good", "caa adaptive", MIDDLE)
    spec = {**cell.spec, "attack": {"type": kind, "adaptive": adaptive, "steps": 50}}
    run.cells.append(cell.model_copy(update={"id": "force", "attack": kind, "spec": spec}))
    run.rows["force"] = [
        row._replace(fallbacks=(False, True), alarms=(i < 16, i < 160), watching=0.01)
        for i, row in enumerate(run.rows[cell.id])
    ]


def drawn(run: Run, count: int = 10, route: str = "eot") -> None:
    """It is random, and was asked under several draws: what broke, broke in half of them."""
    guard(run, stochastic=True, route=route)
    for cell in filter(of("good"), run.cells):
        run.rows[cell.id] = [
            row._replace(
                draws=Draws(
                    count=count,
                    clean=count,
                    attacked=count - (hit := (count // 2) * row.failure),
                    broken=hit,
                    eligible=count,
                    failures=hit,
                )
            )
            for row in run.rows[cell.id]
        ]


def kind_of(name: str, *calibration: str) -> dict[str, Any]:
    return {
        "kind": name,
        "parts": [PartFacts(id="d0", name="good", kind=name)],
        "calibration": list(calibration),
    }


def no_threat_model(run: Run) -> None:
    run.change(of("good", *WHITE), knows_defense=None)


def another_pipeline(run: Run) -> None:
    run.row(of("good", *WHITE), pipelines=("ffffffffffff", "0123456789ab"))


def own_form(run: Run) -> None:
    run.row(of("good", *WHITE), pipelines=("", "0123456789ab"))


def not_recorded(run: Run) -> None:
    run.row(of("good"), pipelines=("", ""))


def one_sample_elsewhere(run: Run) -> None:
    for attack in WHITE:
        cell = cell_of("good", attack, MIDDLE)
        first, *rest = run.rows[cell.id]
        run.rows[cell.id] = [first._replace(pipelines=("", "0123456789ab")), *rest]


def no_adaptive_attack(run: Run) -> None:
    run.drop(of("good", *WHITE))


def no_route(run: Run) -> None:
    guard(run, route="none")


def mostly_errors(run: Run) -> None:
    """One budget of the doubled attack failed on a tenth of the samples."""
    cell = cell_of("good", "caa adaptive 100", LARGE)
    run.rows[cell.id] = [row._replace(error=i % 10 == 0) for i, row in enumerate(run.rows[cell.id])]


def no_seconds(run: Run) -> None:
    run.row(of("good"), seconds=())


def weak_undefended(run: Run) -> None:
    run.outcome(of("none", *WHITE, epsilon=MIDDLE), 8)


def no_undefended_noise(run: Run) -> None:
    run.drop(of("none", "noise"))


def zero_gradients(run: Run) -> None:
    coded(run, of("good", "caa adaptive", epsilon=SMALL), "zero-gradient")


def no_progress(run: Run) -> None:
    coded(run, of("good", "caa adaptive", epsilon=SMALL), "no-progress")


def jagged_loss(run: Run) -> None:
    cell = cell_of("good", "caa adaptive", MIDDLE)
    values = (0.05, 0.16)
    run.rows[cell.id] = [
        row._replace(unstable=values[i] if i < 2 else None)
        for i, row in enumerate(run.rows[cell.id])
    ]


def stability_switched_off(run: Run) -> None:
    run.row(of("good"), unstable=None)
    run.scenario = {"checks": {"repeat": 2, "stability": 0}}


def last_iterate(run: Run) -> None:
    coded(run, of("good", "caa adaptive", epsilon=SMALL), "silent-success")


def only_the_surrogate_broke(run: Run) -> None:
    cell = cell_of("good", "caa adaptive", MIDDLE)
    run.rows[cell.id] = [row._replace(believed=i < 60) for i, row in enumerate(run.rows[cell.id])]


def never_doubled(run: Run) -> None:
    run.drop(of("good", "caa adaptive 100"))


def still_rising(run: Run) -> None:
    run.outcome(of("good", "caa adaptive 100", epsilon=MIDDLE), 60)


def not_decreasing(run: Run) -> None:
    coded(run, of("good", "caa adaptive 100", epsilon=SMALL), "not-decreasing")


def no_trace(run: Run) -> None:
    run.row(of("good", *WHITE), traced=False)


def survives_anything(run: Run) -> None:
    run.outcome(of("good", *WHITE, epsilon=LARGE), 300)


def never_unbounded(run: Run) -> None:
    run.change(lambda cell: cell.epsilon == LARGE, epsilon=32 / 255)


def two_budgets(run: Run) -> None:
    run.drop(lambda cell: cell.epsilon == SMALL)


def falling_curve(run: Run) -> None:
    run.outcome(of("good", *WHITE, epsilon=SMALL), 80)


def transfer_wins(run: Run) -> None:
    run.outcome(of("good", "caa", epsilon=SMALL), 40)


def noise_wins(run: Run) -> None:
    run.outcome(of("good", "noise", epsilon=MIDDLE), 52)


def single_step_wins(run: Run) -> None:
    cell = cell_of("good", "caa adaptive", MIDDLE)
    spec = {**cell.spec, "attack": {"type": "fgsm", "adaptive": True}}
    run.add(cell.model_copy(update={"id": "fgsm", "spec": spec}), 60)


def no_noise(run: Run) -> None:
    run.drop(of("good", "noise", epsilon=SMALL))


def nothing_transferred(run: Run) -> None:
    run.drop(of("good", "caa", epsilon=SMALL))


def black_box_wins(run: Run) -> None:
    run.outcome(of("good", "square adaptive", epsilon=MIDDLE), 46)


def few_questions(run: Run) -> None:
    run.change(of("good", "square adaptive"), declared={"steps": 0, "queries": 1000})


def no_black_box(run: Run) -> None:
    run.drop(of("good", "square adaptive", epsilon=MIDDLE))


def few_draws(run: Run) -> None:
    drawn(run)
    run.option(of("good", *WHITE), draws=4)
    run.option(of("none", *WHITE), draws=4)


def one_draw_of_it(run: Run) -> None:
    drawn(run, route="differentiable")


def few_draws_of_the_evaluation(run: Run) -> None:
    drawn(run, count=9)


def one_draw_of_the_evaluation(run: Run) -> None:
    guard(run, stochastic=True, route="eot")


def not_transferred_from_static(run: Run) -> None:
    guard(run, iterative=True)
    run.option(of("good", "caa"), type="pgd")


def few_in_common(run: Run) -> None:
    cell = cell_of("good", "caa", MIDDLE)
    run.rows[cell.id] = [row._replace(error=i >= 200) for i, row in enumerate(run.rows[cell.id])]


def parts_never_alone(run: Run) -> None:
    parts = [PartFacts(id=one, name=one, kind="selection") for one in ("a", "b")]
    guard(run, parts=parts)


def beams_never_alone(run: Run) -> None:
    guard(run, beams=3)


def misses_flags(run: Run) -> None:
    guard(run, **kind_of("detector", "other"))
    spend(run)


def leaked(run: Run) -> None:
    guard(run, **kind_of("fallback", "s3", "other"))
    spend(run)


def threshold_from_nowhere(run: Run) -> None:
    guard(run, **{**kind_of("fallback"), "calibration": None})
    spend(run)


def nobody_slows_it_down(run: Run) -> None:
    guard(run, **kind_of("fallback", "other"))


def nobody_raises_the_alarm(run: Run) -> None:
    guard(run, **kind_of("detector", "other"))
    run.row(of("good"), watched=True)


def who_does_not_know_it_raises_no_alarm(run: Run) -> None:
    nobody_raises_the_alarm(run)
    spend(run, adaptive=False)


def no_weights(run: Run) -> None:
    run.identity = {}


def lost_images(run: Run) -> None:
    run.row(of("good", "caa adaptive", epsilon=SMALL), saved=False)


def not_repeatable(run: Run) -> None:
    coded(run, of("good", "caa adaptive", epsilon=SMALL), "not-repeatable")


SPOILT: list[tuple[int, Callable[[Run], None]]] = [
    (1, no_threat_model),
    (2, another_pipeline),
    (2, own_form),
    (2, not_recorded),
    (2, one_sample_elsewhere),
    (3, no_adaptive_attack),
    (3, no_route),
    (3, mostly_errors),
    (4, no_seconds),
    (5, weak_undefended),
    (5, no_undefended_noise),
    (6, zero_gradients),
    (6, no_progress),
    (7, jagged_loss),
    (7, stability_switched_off),
    (8, last_iterate),
    (9, never_doubled),
    (9, still_rising),
    (9, not_decreasing),
    (9, no_trace),
    (10, only_the_surrogate_broke),
    (11, survives_anything),
    (11, never_unbounded),
    (12, two_budgets),
    (12, falling_curve),
    (13, transfer_wins),
    (13, noise_wins),
    (13, single_step_wins),
    (13, no_noise),
    (13, nothing_transferred),
    (14, black_box_wins),
    (14, few_questions),
    (14, no_black_box),
    (15, few_draws),
    (15, one_draw_of_it),
    (15, few_draws_of_the_evaluation),
    (15, one_draw_of_the_evaluation),
    (16, not_transferred_from_static),
    (17, few_in_common),
    (19, parts_never_alone),
    (19, beams_never_alone),
    (22, misses_flags),
    (23, leaked),
    (23, threshold_from_nowhere),
    (25, nobody_slows_it_down),
    (25, nobody_raises_the_alarm),
    (25, who_does_not_know_it_raises_no_alarm),
    (26, no_weights),
    (26, lost_images),
    (26, not_repeatable),
]


def blocking(run: Run) -> list[int]:
    return [finding.rule for finding in run.findings() if finding.blocks]


def test_a_good_defence_passes_every_rule_that_can_be_checked() -> None:
    findings = Run.good().findings()
    states = {one.rule: one.state for one in findings if one.level == "MUST"}
    assert not [one.sentence for one in findings if one.blocks]
    assert State.NOT_CHECKED not in states.values()
    applied = {rule for rule, state in states.items() if state is State.PASSED}
    assert applied == {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 17, 20, 26}


@pytest.mark.parametrize(("rule", "spoil"), SPOILT, ids=lambda one: getattr(one, "__name__", one))
def test_each_rule_fails_alone(rule: int, spoil: Callable[[Run], None]) -> None:
    run = Run.good()
    spoil(run)
    assert blocking(run) == [rule]
    found = next(one for one in run.findings() if one.blocks)
    assert found.message
    assert found.remedy
    (badge,) = [one["badge"] for one in run.badges().as_json() if one["defense"] == "good"]
    assert badge == "UNVERIFIED (upper bound)"


def test_every_rule_that_can_fail_has_a_defence_that_fails_it() -> None:
    spoilt = {rule for rule, _ in SPOILT}
    must = {rule.number for rule in RULES if rule.level == "MUST"}
    assert must - spoilt == {20}  # a run of its own, below
    assert [rule.number for rule in RULES] == sorted(rule.number for rule in RULES)
    assert {rule.number for rule in RULES} == set(range(1, 27))


@pytest.mark.parametrize(("count", "expected"), [(299, [20]), (300, [])])
def test_too_few_samples(count: int, expected: list[int]) -> None:
    run = Run(count)
    whole = Run.good()
    run.cells, run.rows = whole.cells, {key: all_[:count] for key, all_ in whole.rows.items()}
    assert blocking(run) == expected


def test_a_loss_that_an_older_run_did_not_record_is_not_checked() -> None:
    run = Run.good()
    run.row(of("good", *WHITE), judged=False, unstable=None, believed=None)
    for rule in (7, 8, 10):
        (found,) = [one for one in run.findings() if one.rule == rule]
        assert found.state is State.NOT_CHECKED
    assert blocking(run) == []


def test_an_attack_without_a_known_zero_tells_nothing_of_what_it_believes() -> None:
    run = Run.good()
    run.row(of("good"), believed=None)
    (found,) = [one for one in run.findings() if one.rule == 10]
    assert (found.state, blocking(run)) == (State.NOT_APPLICABLE, [])
    assert "margin_split" in found.message


def test_a_few_margins_near_zero_may_fall_either_way() -> None:
    run = Run.good()
    cell = cell_of("good", "caa adaptive", MIDDLE)
    run.rows[cell.id] = [row._replace(believed=i < 46) for i, row in enumerate(run.rows[cell.id])]
    assert blocking(run) == []


def test_a_mean_over_draws_is_what_a_jagged_loss_calls_for() -> None:
    run = Run.good()
    drawn(run)
    run.row(of("good"), unstable=None)
    (found,) = [one for one in run.findings() if one.rule == 7]
    assert found.state is State.PASSED
    assert "20 draws" in found.message


def test_an_attack_whose_loss_nobody_can_ask_for_is_not_checked() -> None:
    run = Run.good()
    run.row(of("good"), unstable=None)
    (found,) = [one for one in run.findings() if one.rule == 7]
    assert (found.state, blocking(run)) == (State.NOT_CHECKED, [])


def test_alarms_on_purpose_are_told_with_what_they_cost() -> None:
    run = Run.good()
    nobody_raises_the_alarm(run)
    spend(run)
    (found,) = [one for one in run.findings() if one.rule == 25]
    assert found.state is State.PASSED
    assert "160 of 320 samples raise the alarm (clean 16)" in found.message
    # Each 0.032 s and 0.01 s of watching, and another 0.032 s where flagged: half against 5 %.
    assert "1.33 times as long" in found.message
    assert "only recorded, no longer" in found.message
    assert blocking(run) == []
    run.rows["force"] = [row._replace(alarms=None) for row in run.rows["force"]]
    (found,) = [one for one in run.findings() if one.rule == 25]
    assert found.state is State.NOT_CHECKED, "runs from before say not which are flagged"


def test_random_defences_are_told_by_the_mean_and_the_worst_of_their_draws() -> None:
    run = Run.good()
    drawn(run)
    attack, evaluation, fixed = (one for one in run.findings() if one.rule == 15)
    states = (attack.state, evaluation.state, fixed.state)
    assert states == (State.PASSED, State.PASSED, State.NOT_CHECKED)
    assert "k = 10 draws" in evaluation.message
    assert "0.07 [" in evaluation.message, "45 of 320 in half of their draws"
    assert "worst of 10: 0.14 [" in evaluation.message
    assert blocking(run) == []
    (place,) = next(one for one in run.badges().as_json() if one["defense"] == "good")["places"]
    (middle,) = [one for one in place["budgets"] if one["epsilon"] == round(MIDDLE, 6)]
    assert middle["adaptive"]["draws"]["csfr"]["worst"]["value"] == round(45 / N, 6)


def test_one_draw_of_a_random_defence_decides_nothing_about_what_carries_over() -> None:
    run = Run.good()
    guard(run, stochastic=True, route="eot")
    (found,) = [one for one in run.findings() if one.rule == 10]
    assert found.state is State.NOT_CHECKED


@pytest.mark.parametrize(
    ("rule", "spoil"),
    [
        (18, lambda run: run.option(lambda cell: cell.attack in WHITE, restarts=1)),
        (21, lambda run: None),
        (24, lambda run: run.drop(of("oracle"))),
    ],
)
def test_advice_decides_nothing(rule: int, spoil: Callable[[Run], None]) -> None:
    run = Run.good()
    spoil(run)
    (found,) = [one for one in run.findings() if one.rule == rule]
    assert (found.level, found.state) == ("SHOULD", State.FAILED)
    assert blocking(run) == []


def test_a_hundred_noises_are_enough() -> None:
    run = Run.good()
    for epsilon in EPSILONS[:2]:
        for index in range(99):
            cell = cell_of("good", "noise", epsilon)
            run.add(cell.model_copy(update={"id": f"noise {index} {epsilon}"}), 3)
    (found,) = [one for one in run.findings() if one.rule == 21]
    assert found.state is State.PASSED


def test_parts_tried_alone_are_enough() -> None:
    run = Run.good()
    guard(run, parts=[PartFacts(id=one, name=one, kind="selection") for one in ("a", "oracle-id")])
    assert blocking(run) == [19]
    guard(run, parts=[PartFacts(id=one, name=one, kind="selection") for one in ("oracle-id",) * 2])
    assert blocking(run) == []


def test_a_run_from_before_anything_was_recorded_is_unverified() -> None:
    run = Run.good()
    run.change(of("good"), guard=None, knows_defense=None, knows_seed=None)
    run.row(of("good"), pipelines=("", ""), seconds=())
    assert blocking(run) == [1, 2, 3, 4]


@pytest.mark.parametrize("options", [{"type": "verbose"}, {"type": "force_fallback"}])
def test_a_defence_met_by_nothing_that_wants_wrong_answers_is_unverified(
    options: dict[str, Any],
) -> None:
    run = Run.good()
    run.drop(lambda cell: cell.defense == "good" and cell.attack != "caa adaptive")
    run.option(of("good"), **options)
    assert 3 in blocking(run)
    run.change(of("good"), epsilon=0.0)
    assert 3 in blocking(run)


def test_only_large_budgets_are_no_evidence() -> None:
    run = Run.good()
    run.drop(lambda cell: cell.attack in WHITE and cell.epsilon != LARGE)
    assert blocking(run)[0] == 3


def test_a_budget_at_which_nobody_knew_the_defence_is_unverified() -> None:
    """However well it is verified at others: there a gate would pass on the easy attack."""
    run = Run.good()
    easy = cell_of("good", "caa", 32 / 255)
    run.add(easy, 13)
    run.add(cell_of("none", "caa", 32 / 255), 200)
    gate = GateSpec(name="g", metric="csfr", max=0.2)
    badges = run.badges()
    assert badges.of(easy) == "UNVERIFIED (upper bound)"
    assert "no attack that knows it ran at ε 32/255" in str(badges.veto(gate, easy))
    known = cell_of("good", "caa", MIDDLE)
    assert badges.of(known) == "ADAPTIVE-VERIFIED"
    assert badges.veto(gate, known) is None


def test_numbers_are_the_worst_case_of_each_sample() -> None:
    run = Run.good()
    # The last ten samples, not the first, break under the plain attack.
    cell = cell_of("good", "caa", MIDDLE)
    run.rows[cell.id] = [
        row._replace(compressed_attacked=i < N - 10) for i, row in enumerate(run.rows[cell.id])
    ]
    (place,) = next(one for one in run.badges().as_json() if one["defense"] == "good")["places"]
    (middle,) = [one for one in place["budgets"] if one["epsilon"] == round(MIDDLE, 6)]
    assert middle["adaptive"]["csfr"]["none"]["value"] == round(181 / N, 6)
    assert middle["adaptive"]["csfr"]["defended"]["value"] == round(45 / N, 6)
    assert middle["non_adaptive"]["csfr"]["defended"]["value"] == round(10 / N, 6)
    assert place["clean"]["compressed"]["defended"]["n"] == N
    (times,) = [one for one in run.badges().timings() if one["defense"] == "good"]
    seconds = times["seconds"]["compressed"]
    assert seconds["none"] == {"mean": 0.02, "p95": 0.02}
    assert seconds["defended"]["mean"] < seconds["defended"]["p95"] == 0.0328
