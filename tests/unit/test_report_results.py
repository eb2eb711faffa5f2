"""Stages, retention, heat map and trade-off of the report: the numbers of the summary, drawn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from report_data import cell, manifest, tokens, trial

from reports.html import heat, retention, stages, svg, tradeoff
from reports.metrics import summarise
from reports.records import Demand, Demands, Manifest, Trial

OUTCOMES = ("1111", "1111", "1110", "1100", "1101", "1011", "0111")
EPSILONS = (4 / 255, 8 / 255, 96 / 255)


def demands(kept: int) -> Demands:
    every, some = (Demand(tokens=n, generated=2, seconds=0.01) for n in (100, kept))
    return Demands(
        clean_full=every, clean_compressed=some, attacked_full=every, attacked_compressed=some
    )


@pytest.fixture(scope="module")
def run() -> tuple[Manifest, list[Trial]]:
    """FastV at two retentions and another method, two attacks, three budgets."""
    settings = {
        "fastv 25%": ("fastv", 25),
        "fastv 50%": ("fastv", 50),
        "divprune": ("divprune", 10),
    }
    planned = manifest(
        len(OUTCOMES),
        cells=[
            cell(
                f"{label}/{attack}/{index}",
                compression=label,
                attack=attack,
                epsilon=epsilon,
                spec={"compression": {"type": kind, "layer": 2, "retention": kept / 100}},
            )
            for label, (kind, kept) in settings.items()
            for attack in ("caa", "pgd")
            for index, epsilon in enumerate(EPSILONS)
        ],
    )
    trials = [
        trial(f"s{i}", outcome, one.id, demands=demands(settings[one.compression][1]))
        for one in planned.cells
        for i, outcome in enumerate(OUTCOMES)
        if not (one.attack == "pgd" and one.compression == "divprune")
    ]
    return planned, trials


@pytest.fixture(scope="module")
def cells(run: tuple[Manifest, list[Trial]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = summarise(*run)["cells"]
    return found


def test_every_measured_sample_is_in_one_stage(cells: list[dict[str, Any]]) -> None:
    found = stages.counts(cells[0]["outcomes"])
    assert found == {"held": 2, "csf": 1, "both": 1, "full-only": 1, "alone": 1, "wrong": 1}
    every = {f"{i:04b}": 1 for i in range(16)}
    assert sum(stages.counts(every).values()) == 16
    assert stages.counts(every)["csf"] == 1


def test_a_stage_is_as_long_as_its_share(cells: list[dict[str, Any]]) -> None:
    (row, *_) = stages.chart(cells)[0].rows
    assert row.value == "1 of 7"
    widths = [float(w) for w in re.findall(r'width="([\d.]+)%" height="16"', str(row.drawings[0]))]
    assert widths == pytest.approx([200 / 7, *[100 / 7] * 5], abs=0.01)
    assert "broken only when compressed: 1" in str(row.drawings[0])


def test_outcomes_leave_errors_out() -> None:
    found = summarise(manifest(3), [trial("s0", "1110"), trial("s1", "error"), trial("s2", "0000")])
    assert found["cells"][0]["outcomes"] == {"1110": 1, "0000": 1}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"demands": demands(25)}, 0.25),
        ({"tokens": tokens()}, 0.5),  # two of a grid of two by two
        ({"tokens": tokens(boxes=[(0.0, 0.0, 1.0, 1.0)] * 8)}, 0.25),
        ({}, None),
    ],
)
def test_retention_is_what_was_measured(given: dict[str, Any], expected: float | None) -> None:
    found = summarise(manifest(1), [trial("s0", "1111", **given)])
    assert found["cells"][0]["retention"] == expected


def test_settings_of_one_method_make_a_curve(
    run: tuple[Manifest, list[Trial]], cells: list[dict[str, Any]]
) -> None:
    charts = retention.retention_charts(run[0], cells)
    assert [one.title for one in charts] == ["fastv", "divprune"]
    names = [[name for _, name in one.legend] for one in charts]
    assert names == [
        ["clean: compression alone", "caa, 8/255", "pgd, 8/255"],
        ["clean: compression alone", "caa, 8/255"],
    ], "the largest budget below 64/255, and only what was measured"
    assert "at 25 %" in charts[0].description
    assert "at 50 %" in charts[0].description
    assert charts[0].note.startswith("Compression alone costs 0.00 [")


def test_a_curve_ends_with_all_tokens(
    run: tuple[Manifest, list[Trial]], cells: list[dict[str, Any]]
) -> None:
    drawing = str(retention.retention_charts(run[0], cells)[0].drawing)
    knots = re.findall(r'<circle cx="([\d.]+)%" cy="([\d.]+)" r="4" class="knot clean', drawing)
    assert [float(x) for x, _ in knots] == pytest.approx([9 + 22, 9 + 44, 9 + 88])


def test_large_budgets_are_shown_where_there_are_no_others(
    run: tuple[Manifest, list[Trial]], cells: list[dict[str, Any]]
) -> None:
    large = [one for one in cells if one["epsilon"] > 0.3]
    charts = retention.retention_charts(run[0], large)
    assert charts[0].legend[1][1] == "caa, 96/255"


def test_the_heat_map_has_every_pair_and_what_compression_costs(
    cells: list[dict[str, Any]],
) -> None:
    maps = heat.heat_maps(cells)
    assert [one.title for one in maps] == [f"ε {n}/255, ℓ∞" for n in (96, 8, 4)]
    assert maps[0].columns == ("fastv 25%", "fastv 50%", "divprune")
    rows = dict(maps[0].rows)
    assert rows.keys() == {"caa", "pgd"}
    csfr = rows["caa"][0]
    assert csfr is not None
    assert (csfr["value"], csfr["n"]) == (0.2, 5)
    missing = rows["pgd"][2]
    assert missing is not None
    assert missing["value"] is None, "planned and not measured is no 0"
    alone = maps[0].alone[0]
    assert alone is not None
    assert alone["n"] == 7
    few = [one for one in cells if (one["attack"], one["compression"]) != ("pgd", "fastv 25%")]
    assert dict(heat.heat_maps(few)[0].rows)["pgd"][0] is None


def summary(*, adaptive: bool, seconds: bool) -> dict[str, Any]:
    rate = {"none": {"value": 0.6, "low": 0.5, "high": 0.7, "n": 90},
            "defended": {"value": 0.2, "low": 0.1, "high": 0.3, "n": 90}}  # fmt: skip
    nothing = {"attacks": [], "csfr": {"none": {"value": None}, "defended": {"value": None}}}
    attacked = {"attacks": ["caa"], "csfr": rate}
    times = {"none": {"mean": 0.01, "p95": 0.02}, "defended": {"mean": 0.03, "p95": 0.04}}
    place = {
        "target": "scenes-a", "compression": "fastv", "badge": "UNVERIFIED (upper bound)",
        "clean": {"compressed": {"none": {"value": 0.98}, "defended": {"value": 0.9}}},
        "budgets": [{"epsilon": 8 / 255, "large": False,
                     "adaptive": attacked if adaptive else nothing, "non_adaptive": attacked}],
    }  # fmt: skip
    where = {"defense": "hybrid", "target": "scenes-a", "compression": "fastv"}
    return {
        "defenses": [{"defense": "hybrid", "places": [place]}],
        "timings": {"defenses": [{**where, "seconds": {"compressed": times if seconds else {}}}]},
    }


def test_a_defence_trades_clean_accuracy_and_time() -> None:
    (found,) = tradeoff.trade_offs(summary(adaptive=True, seconds=True))
    (dot,) = found.dots
    assert dot.robust == pytest.approx((0.4, 0.8, 0.7, 0.9))
    assert dot.clean == (0.98, 0.9)
    assert dot.slower == pytest.approx(3)
    assert "holds 0.40 → 0.80 [0.70, 0.90]" in dot.words
    assert "attacks that know it" in dot.words
    assert 'class="hollow"' in str(found.clean)
    assert "time of an answer" in str(found.speed)


def test_unknown_times_and_attacks_are_said() -> None:
    (found,) = tradeoff.trade_offs(summary(adaptive=False, seconds=False))
    assert "do not know it" in found.dots[0].words
    assert "time unknown" in found.dots[0].words
    assert found.speed == ""
    assert tradeoff.trade_offs({"defenses": [], "timings": {}}) == []


def test_runs_of_dropped_tokens_are_one_rectangle_a_row() -> None:
    drawn = str(svg.overlay((2, 4), kept=[1], evidence=None))
    assert 'd="M0 0h1v1h-1zM2 0h2v1h-2zM0 1h4v1h-4z"' in drawn


def test_a_report_of_a_run_with_several_retentions(
    run: tuple[Manifest, list[Trial]], tmp_path: Path
) -> None:
    from reports import build_reports
    from reports.store import RunStore

    with RunStore.create(tmp_path / "run", run[0]) as store:
        store.append(run[1])
    page = build_reports(tmp_path / "run").report.read_text(encoding="utf-8")
    for words in ("Where samples fail", "Accuracy against retention", "Attack × compressor",
                  "accuracy lost to compression alone", "2 other budgets"):  # fmt: skip
        assert words in page
