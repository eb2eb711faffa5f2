"""Gates on the change since a baseline: paired by sample, and never a pass without one."""

from pathlib import Path
from typing import Any

import pytest
from report_data import manifest
from small_run import CAA, attacked, broken, write

from reports import build_reports
from reports.baseline import Baselines
from reports.errors import ReportError, StoreError
from reports.matching import match, unlike
from reports.metrics import summarise
from reports.records import GateSpec
from reports.store import RunStore


def gate(base: Path | None, **changes: Any) -> GateSpec:
    fields: dict[str, Any] = {"name": "g", "metric": "csfr", "max_increase": 0.05}
    return GateSpec(**({"baseline": str(base or "")} | fields | changes))


def decided(folder: Path, given: Path | None = None) -> dict[str, Any]:
    store = RunStore.read(folder)
    others = Baselines(store.manifest, given)
    (found,) = summarise(store.manifest, store.trials(), (), others)["gates"]
    return found


def runs(tmp_path: Path, before: list[str], now: list[str], **changes: Any) -> dict[str, Any]:
    base = write(tmp_path / "base", {"c1": before})
    return decided(write(tmp_path / "run", {"c1": now}, gates=[gate(base, **changes)]))


def test_the_same_again_passes_once_there_are_enough_samples(tmp_path: Path) -> None:
    found = runs(tmp_path, broken(10, 200), broken(10, 200))
    assert found["verdict"] == "pass"
    (cell,) = found["cells"]
    assert cell["change"] == {"before": 10, "now": 10, "newly": 0, "no_longer": 0}
    assert (cell["value"], cell["n"]) == (0.0, 200)
    assert 0 < cell["bound_high"] <= 0.05
    assert found["baseline_run"]["scenario_hash"] == "0" * 16
    assert "10 of 200 samples now, 10 of the same before: 0 newly, 0 no longer" in found["reason"]


def test_too_few_samples_prove_nothing(tmp_path: Path) -> None:
    found = runs(tmp_path, broken(0, 20), broken(0, 20))
    assert (found["verdict"], found["more_samples_decide"]) == ("inconclusive", True)


def test_a_rise_beyond_the_limit_fails(tmp_path: Path) -> None:
    found = runs(tmp_path, broken(5, 200), broken(40, 200))
    assert found["verdict"] == "fail"
    assert "CSFR rose by 0.175" in found["reason"]
    assert found["cells"][0]["p_holm"] < 0.001


def test_a_fall_passes_a_gate_on_the_rise(tmp_path: Path) -> None:
    found = runs(tmp_path, broken(40, 200), broken(5, 200))
    assert found["verdict"] == "pass"
    assert "CSFR fell by 0.175" in found["reason"]


@pytest.mark.parametrize(("times", "verdict"), [(0, "pass"), (10, "inconclusive"), (60, "fail")])
def test_an_accuracy_may_fall_by_so_much(tmp_path: Path, times: int, verdict: str) -> None:
    limits = {"metric": "acc_compressed_attacked", "max_increase": None, "max_decrease": 0.05}
    found = runs(tmp_path, broken(0, 200), broken(times, 200), **limits)
    assert found["verdict"] == verdict


@pytest.mark.parametrize("metric", ["csg", "amplification", "clean_drop", "l2"])
def test_metrics_that_are_no_rates_are_compared_too(tmp_path: Path, metric: str) -> None:
    found = runs(tmp_path, broken(20, 200), broken(20, 200), metric=metric)
    assert found["verdict"] == "pass"
    found = runs(tmp_path / "b", broken(5, 200), broken(90, 200), metric=metric)
    assert found["verdict"] == ("fail" if metric in ("csg", "amplification") else "pass")


def test_pairs_are_the_samples_in_both_denominators(tmp_path: Path) -> None:
    # Ten samples are no longer right on the clean image: compression's affair, not the attack's.
    now = ["1010"] * 10 + broken(10, 190)
    (cell,) = runs(tmp_path, broken(20, 200), now)["cells"]
    assert cell["n"] == 190
    assert cell["change"] == {"before": 10, "now": 10, "newly": 0, "no_longer": 0}


def test_questions_that_share_an_image_are_worth_less(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"c1": broken(0, 200)}, per_image=4)
    run = write(tmp_path / "run", {"c1": broken(24, 200)}, per_image=4, gates=[gate(base)])
    (cell,) = decided(run)["cells"]
    assert cell["effective_n"] < 80
    alone = runs(tmp_path / "alone", broken(0, 200), broken(24, 200))["cells"][0]
    assert cell["bound_low"] < alone["bound_low"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"baseline": ""}, "no baseline run is named"),
        ({"baseline": "nowhere"}, "the baseline nowhere is not there"),
        ({"metric": "cbr", "where": {"attack": "pgd"}}, "No cell matches"),
    ],
)
def test_without_a_baseline_nothing_passes(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    found = runs(tmp_path, broken(0, 200), broken(0, 200), **change)
    assert found["verdict"] == "inconclusive"
    assert not found["more_samples_decide"]
    assert reason in found["reason"]


OTHER = {"attack": {"type": "caa", "steps": 10}}


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        ({"outcomes": broken(0, 100)}, "the samples differ: 100 samples in the baseline, 200 in"),
        ({"cell": attacked(spec=OTHER)}, "has other options (steps 10 → 30)"),
        ({"cell": attacked(epsilon=4 / 255)}, "no such cell at this epsilon and norm"),
        ({"cell": attacked(attack="pgd", spec={})}, "the baseline has no attack 'caa'"),
        ({"skip": 1}, "in the baseline 1 trial of 200 did not run"),
        ({"outcomes": ["error"] * 20 + broken(0, 180)}, "in the baseline 20 of 200 trials are err"),
        ({"scenario": {"dataset": {"type": "pope"}}}, "the data set differs: type pope → (absent)"),
        ({"per_image": 2}, "shows another image in the baseline"),
    ],
)
def test_an_unlike_baseline_never_passes(tmp_path: Path, base: dict[str, Any], reason: str) -> None:
    outcomes, one = base.pop("outcomes", broken(0, 200)), base.pop("cell", attacked())
    folder = write(tmp_path / "base", {"c1": outcomes}, cells=[one], **base)
    found = decided(write(tmp_path / "run", {"c1": broken(0, 200)}, gates=[gate(folder)]))
    assert (found["verdict"], found["more_samples_decide"]) == ("inconclusive", False)
    assert found["cells"][0]["cause"] == "baseline"
    assert reason in found["reason"]


def test_a_baseline_given_takes_the_place_of_those_named(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"c1": broken(0, 200)})
    run = write(tmp_path / "run", {"c1": broken(0, 200)}, gates=[gate(tmp_path / "nowhere")])
    assert decided(run)["verdict"] == "inconclusive"
    assert decided(run, base)["verdict"] == "pass"
    assert build_reports(run, base).exit_code == 0
    assert build_reports(run).exit_code == 4


def test_a_baseline_given_that_is_unlike_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"c1": broken(0, 100)})
    run = write(tmp_path / "run", {"c1": broken(0, 200)}, gates=[gate(None)])
    with pytest.raises(ReportError, match="cannot be compared with this run: the samples differ"):
        decided(run, base)
    with pytest.raises(StoreError, match="is not a run folder"):
        decided(run, tmp_path)


def test_a_run_is_no_baseline_of_itself(tmp_path: Path) -> None:
    run = write(tmp_path / "run", {"c1": broken(0, 200)}, gates=[gate(tmp_path / "run")])
    assert build_reports(run).exit_code == 4
    assert "is the run itself" in (run / "summary.md").read_text()
    with pytest.raises(ReportError, match="name an earlier run"):
        build_reports(run, run)


def test_a_self_check_stops_a_gate_on_a_change_too(tmp_path: Path) -> None:
    doubted = [attacked(knowledge="white_box")]  # no noise beside it
    base = write(tmp_path / "base", {"c1": broken(0, 200)}, cells=doubted)
    run = write(tmp_path / "run", {"c1": broken(0, 200)}, cells=doubted, gates=[gate(base)])
    found = decided(run)
    assert (found["verdict"], found["cells"][0]["cause"]) == ("inconclusive", "doubt")


def test_a_baseline_is_found_where_it_was_when_the_run_was_made(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"c1": broken(0, 200)})
    named = gate(None).model_copy(update={"baseline": "../base", "baseline_folder": str(base)})
    assert decided(write(tmp_path / "run", {"c1": broken(0, 200)}, gates=[named]))["verdict"] == (
        "pass"
    )


def test_the_hash_of_the_data_decides_where_both_have_one() -> None:
    def run(data: str, path: str) -> Any:
        return manifest(
            2,
            scenario={"dataset": {"type": "jsonl", "path": path}},
            provenance={"identity": {"data": data}},
        )

    assert unlike(run("a", "/here"), run("a", "/there")) == []
    assert unlike(run("a", "/here"), run("b", "/here")) == [
        "the data differ: hash a in the baseline, b in the run"
    ]


def test_a_setting_may_be_compared_with_another() -> None:
    before = [attacked("a", compression="fastv 25%", spec={**CAA, "compression": {"k": 1}})]
    now = [attacked("b", compression="visionzip 25%", spec={**CAA, "compression": {"k": 1}})]
    found = match(before, now)
    assert [(one.id, other.id) for one, other in found.pairs] == [("a", "b")]
    assert found.compared == ("compression: fastv 25% → visionzip 25%",)


def test_of_several_settings_each_meets_its_namesake() -> None:
    before = [attacked("a", compression="fastv"), attacked("b", compression="visionzip")]
    now = [attacked("c", compression="visionzip"), attacked("d", compression="prumerge")]
    found = match(before, now)
    assert [(one.id, other.id) for one, other in found.pairs] == [("b", "c")]
    assert [one.id for one in found.only_before] == ["a"]
    assert found.only_now == ((now[1], "the baseline has no compression 'prumerge'"),)


def test_options_that_changed_under_a_label_are_told() -> None:
    before = [attacked("a", spec={**CAA, "target": {"revision": "one"}})]
    now = [attacked("b", spec={**CAA, "target": {"revision": "two"}})]
    assert match(before, now).compared == ("target scenes-a: revision one → two",)
