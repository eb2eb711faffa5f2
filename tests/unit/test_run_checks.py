"""Each run-level self-check has a run that fires it and a near one that does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from known import Known
from report_data import cell, trial

from reports.checks import MAX_SHARE, REMEDY, Doubt, grouped, run_checks, vetoes
from reports.deciding import Measured, Run, decide
from reports.gate import Progress, Verdict
from reports.measure import Row, row_of
from reports.records import Cell, Demand, Demands, GateSpec

N = 40
HELD, BROKEN, BOTH = "1111", "1110", "1100"


def rows(cell_id: str, broken: int, *, outcome: str = BROKEN, codes: int = 0) -> list[Row]:
    """N samples: the first `broken` fail; the last `codes` carry a self-check."""
    return [
        row_of(
            trial(
                f"s{i}",
                outcome if i < broken else HELD,
                cell_id,
                checks=["unfinished: more would go further"] if i >= N - codes else [],
            )
        )
        for i in range(N)
    ]


def noise(id: str = "noise", **changes: Any) -> Cell:
    return cell(id, **({"attack": "noise", "knowledge": "none"} | changes))


def others(cells: list[Cell], found: Mapping[str, list[Row]]) -> list[Doubt]:
    """All doubts but that there is no noise, which has tests of its own."""
    return [doubt for doubt in run_checks(cells, found) if doubt.code != "no-control"]


def codes(cells: list[Cell], found: Mapping[str, list[Row]]) -> list[tuple[str, str]]:
    return [(doubt.code, doubt.cell.id) for doubt in others(cells, found)]


def test_an_attack_no_better_than_noise_is_in_doubt() -> None:
    cells = [noise(), cell("caa")]
    assert codes(cells, {"noise": rows("noise", 2), "caa": rows("caa", 4)}) == [("no-gain", "caa")]
    assert codes(cells, {"noise": rows("noise", 2), "caa": rows("caa", 12)}) == []


def test_the_gain_is_paired_and_needs_more_than_chance() -> None:
    cells = [noise(), cell("caa")]
    # Five samples broken only by the attack: p = 0.0625; six: p = 0.03.
    assert codes(cells, {"noise": rows("noise", 0), "caa": rows("caa", 5)}) == [("no-gain", "caa")]
    assert codes(cells, {"noise": rows("noise", 0), "caa": rows("caa", 6)}) == []


def test_an_attack_that_breaks_the_full_path_gains_too() -> None:
    cells = [noise(), cell("pgd", attack="pgd")]
    found = {"noise": rows("noise", 0), "pgd": rows("pgd", 20, outcome=BOTH)}
    assert codes(cells, found) == []


def test_an_attack_that_beats_noise_at_another_budget_works() -> None:
    cells = [
        noise("n1", epsilon=2 / 255),
        cell("c1", epsilon=2 / 255),
        noise("n2"),
        cell("c2"),
    ]
    found = {"n1": rows("n1", 0), "c1": rows("c1", 1), "n2": rows("n2", 0)}
    assert codes(cells, {**found, "c2": rows("c2", 20)}) == []
    assert codes(cells, {**found, "c2": rows("c2", 1)}) == [("no-gain", "c1"), ("no-gain", "c2")]


@pytest.mark.parametrize(
    "other",
    [
        {"compression": "visionzip"},
        {"epsilon": 4 / 255},
        {"target": "b"},
        {"norm": "l2"},
        {"defense": "d"},
        {"spec": {"attack": {"type": "noise", "border": 0.1}}},
    ],
)
def test_noise_of_another_kind_is_no_control(other: dict[str, Any]) -> None:
    cells = [noise(**other), cell("caa")]
    found = {"noise": rows("noise", 0), "caa": rows("caa", 0)}
    assert codes(cells, found) == []
    assert [(one.code, one.cell.id) for one in run_checks(cells, found)] == [("no-control", "caa")]


def test_an_attack_without_noise_beside_it_is_in_doubt() -> None:
    """However little it broke: nothing tells a weak attack from a model that withstands it."""
    for broken in (0, 12):
        (found,) = run_checks([cell("caa")], {"caa": rows("caa", broken)})
        assert found.code == "no-control"
        assert vetoes(GateSpec(name="g", metric="csfr", max=0.5), [found]) is found
        assert vetoes(GateSpec(name="g", metric="csfr", min=0.2), [found]) is None


def test_noise_at_one_budget_serves_the_others_where_the_attack_beats_it() -> None:
    cells = [noise("n2"), cell("c2"), cell("c1", epsilon=2 / 255)]
    found = {"n2": rows("n2", 0), "c2": rows("c2", 20), "c1": rows("c1", 1)}
    assert run_checks(cells, found) == []
    found["c2"] = rows("c2", 1)
    assert [one.code for one in run_checks(cells, found)] == ["no-gain", "no-control"]


def test_noise_without_a_sample_in_common_is_another_trouble() -> None:
    assert run_checks([noise(), cell("caa")], {"noise": [], "caa": rows("caa", 0)}) == []


def test_an_attack_on_availability_has_to_demand_more_than_noise() -> None:
    def demanding(id: str, tokens: list[int]) -> list[Row]:
        one = Demand(tokens=10, generated=2, seconds=0.1)
        return [
            row_of(
                trial(
                    f"s{i}",
                    HELD,
                    id,
                    checks=["unfinished: more"],
                    demands=Demands(
                        clean_full=one,
                        clean_compressed=one,
                        attacked_full=one,
                        attacked_compressed=one.model_copy(update={"tokens": number}),
                    ),
                )
            )
            for i, number in enumerate(tokens)
        ]

    cells = [noise(), cell("t", attack="t", spec={"attack": {"type": "token_count"}})]
    found = {"noise": demanding("noise", [11] * 40)}
    assert codes(cells, {**found, "t": demanding("t", [15] * 40)}) == []
    doubts = run_checks(cells, {**found, "t": demanding("t", [10] * 40)})
    assert [one.code for one in doubts] == ["unfinished", "no-gain"]
    assert "of 40 samples it made 0 demand more than noise" in doubts[1].message
    assert "and 40 less" in doubts[1].message


@pytest.mark.parametrize("border", [None, 0.125])
def test_noise_in_the_same_place_is(border: float | None) -> None:
    """Whatever else their options are: noise always has a frame, most attacks have none."""
    cells = [
        noise(spec={"attack": {"type": "noise", "border": border, "frame": "inside"}}),
        cell("caa", spec={"attack": {"type": "caa"} | ({"border": border} if border else {})}),
    ]
    found = {"noise": rows("noise", 0), "caa": rows("caa", 0)}
    assert codes(cells, found) == [("no-gain", "caa")]


def test_the_strongest_control_counts() -> None:
    cells = [noise("uniform"), noise("sign", attack="sign"), cell("caa")]
    found = {"uniform": rows("uniform", 0), "sign": rows("sign", 18), "caa": rows("caa", 20)}
    assert codes(cells, found) == [("no-gain", "caa")]


def test_no_budget_is_no_attack() -> None:
    cells = [noise(epsilon=0.0), cell("caa", epsilon=0.0)]
    assert codes(cells, {"noise": rows("noise", 0), "caa": rows("caa", 0, codes=N)}) == []


def test_a_curve_that_falls_is_in_doubt_at_the_larger_budget() -> None:
    cells = [cell("small", epsilon=4 / 255), cell("large", epsilon=8 / 255)]
    found = {"small": rows("small", 30), "large": rows("large", 15)}
    doubts = others(cells, found)
    assert [(one.code, one.cell.id) for one in doubts] == [("non-monotone", "large")]
    assert "30 of 40 samples at ε 4/255, but in 15 at ε 8/255" in doubts[0].message
    assert codes(cells, {"small": rows("small", 18), "large": rows("large", 15)}) == []  # chance
    assert codes(cells, {"small": rows("small", 15), "large": rows("large", 30)}) == []
    apart = [cells[0], cells[1].model_copy(update={"attack": "pgd"})]
    assert codes(apart, found) == []


def test_damage_that_is_no_longer_compression_specific_is_in_doubt_too() -> None:
    cells = [cell("small", epsilon=4 / 255), cell("large", epsilon=8 / 255)]
    found = {"small": rows("small", 20), "large": rows("large", 20, outcome=BOTH)}
    doubts = others(cells, found)
    assert [one.code for one in doubts] == ["non-monotone"]
    assert "breaks only the compressed path" in doubts[0].message


@pytest.mark.parametrize("knowledge", ["surrogate", "query", "scores"])
def test_an_attack_without_gradients_may_not_beat_all_that_have_them(knowledge: str) -> None:
    black = cell("black", attack="square", knowledge=knowledge)
    cells = [cell("caa"), cell("pgd", attack="pgd", knowledge="white_box"), black]
    found = {"caa": rows("caa", 5), "pgd": rows("pgd", 7, outcome=BOTH)}
    assert codes(cells, {**found, "black": rows("black", 20)}) == [
        ("stronger-black-box", "caa"),
        ("stronger-black-box", "pgd"),
    ]
    assert codes(cells, {**found, "black": rows("black", 8)}) == []
    assert codes([black], {"black": rows("black", 20)}) == []


def test_attacks_with_gradients_count_together() -> None:
    """Each breaks another half: neither is masked, though the black box beats either."""
    first = rows("a", 20)
    second = [row_of(trial(f"s{i}", BROKEN if i >= 20 else HELD, "b")) for i in range(N)]
    cells = [cell("a"), cell("b", attack="b"), cell("q", attack="q", knowledge="query")]
    assert codes(cells, {"a": first, "b": second, "q": rows("q", 35)}) == []


@pytest.mark.parametrize("code", MAX_SHARE)
def test_a_code_on_more_than_its_share_of_the_unbroken_is_in_doubt(code: str) -> None:
    few = int(MAX_SHARE[code] * N)

    def made(times: int, outcome: str = HELD) -> list[Row]:
        return [
            row_of(trial(f"s{i}", outcome, "c1", checks=[f"{code}: why"] if i < times else []))
            for i in range(N)
        ]

    assert codes([cell()], {"c1": made(few)}) == []
    assert codes([cell()], {"c1": made(few + 1)}) == [(code, "c1")]
    assert codes([cell()], {"c1": made(N, BROKEN)}) == [], "the attack succeeded"
    assert codes([cell()], {"c1": made(N, "0011")}) == [], "nothing to break"
    assert codes([noise("c1")], {"c1": made(N)}) == []


def test_unfinished_is_lifted_by_twice_the_steps() -> None:
    def caa(id: str, steps: int, **options: Any) -> Cell:
        return cell(id, attack=id, spec={"attack": {"type": "caa", "steps": steps, **options}})

    short, long = caa("short", 10), caa("long", 20)
    found = {"short": rows("short", 10, codes=10), "long": rows("long", 10)}
    assert codes([short], found) == [("unfinished", "short")]
    assert codes([short, long], found) == []
    more = {**found, "long": rows("long", 12)}
    assert codes([short, long], more) == [("unfinished", "short")], "5 points more"
    assert codes([short, caa("long", 19)], found) == [("unfinished", "short")]
    assert codes([short, caa("long", 20, alpha=0.1)], found) == [("unfinished", "short")]


def test_a_single_result_that_changes_is_in_doubt() -> None:
    found = rows("c1", 20)
    found[3] = found[3]._replace(codes=("not-repeatable",))
    doubts = others([cell()], {"c1": found})
    assert [one.code for one in doubts] == ["not-repeatable"]
    assert "1 sample" in doubts[0].message


def doubt(code: str = "no-gain", id: str = "c1", **changes: Any) -> Doubt:
    return Doubt(code, cell(id, **changes), f"what was seen in {id}")


def test_entries_are_one_for_each_code_and_attack() -> None:
    found = grouped([doubt(), doubt(id="c2"), doubt(attack="pgd", id="c3"), doubt("unfinished")])
    assert [(one.code, one.cells) for one in found] == [
        ("no-gain", ["c1", "c2"]),
        ("no-gain", ["c3"]),
        ("unfinished", ["c1"]),
    ]
    assert found[0].message.endswith("what was seen in c1; likewise in 1 other cell")
    assert all(one.remedy == REMEDY[one.code] for one in found)


@pytest.mark.parametrize(
    ("metric", "limits", "code", "stops"),
    [
        ("csfr", {"max": 0.1}, "no-gain", True),
        ("upr", {"min": 0.9}, "unfinished", True),
        ("acc_compressed_attacked", {"min": 0.9}, "zero-gradient", True),
        ("csfr", {"min": 0.1}, "unfinished", False),  # a weak attack does not reach it by weakness
        ("csfr", {"min": 0.1}, "not-repeatable", True),
        ("csfr", {"min": 0.1, "max": 0.5}, "unfinished", True),
        ("acc_compressed_clean", {"min": 0.9}, "no-gain", False),  # no attack in it
        ("clean_drop", {"max": 0.1}, "not-repeatable", False),
        ("length_full_clean", {"max": 9}, "no-gain", False),
        ("jaccard", {"min": 0.5}, "no-gain", True),
        (
            "csfr",
            {"max_increase": 0.1},
            "no-gain",
            True,
        ),  # a weaker attack would look like progress
        ("csfr", {"max_decrease": 0.1}, "no-gain", False),
        ("acc_compressed_attacked", {"max_decrease": 0.1}, "no-gain", True),
        ("acc_compressed_clean", {"max_decrease": 0.1}, "no-gain", False),
    ],
)
def test_what_a_doubt_can_stop(
    metric: str, limits: dict[str, float], code: str, stops: bool
) -> None:
    gate = GateSpec(name="g", metric=metric, **limits)
    assert (vetoes(gate, [doubt(code)]) is not None) is stops
    assert vetoes(gate, []) is None


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.0, 0.05, Verdict.INCONCLUSIVE),
        (0.2, 0.3, Verdict.FAIL),
        (0.05, 0.2, Verdict.INCONCLUSIVE),
    ],
)
def test_a_doubt_only_ever_takes_a_pass_away(low: float, high: float, verdict: Verdict) -> None:
    gate = GateSpec(name="g", metric="csfr", max=0.1)
    run = Run(
        [cell()],
        lambda *_: Measured(Known((low + high) / 2, low, high)),
        lambda _: Progress(expected=100, measured=100, errors=0),
        lambda *_: "it broke 1 of 40 samples (no-gain): give it more steps",
    )
    (made,) = decide([gate], run)
    assert made.verdict is verdict
    assert ("no-gain" in made.reason) is (high <= 0.1)
    assert (made.cells[0].cause == "doubt") is (high <= 0.1)
