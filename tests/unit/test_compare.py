"""Two runs side by side."""

from pathlib import Path
from typing import Any

import pytest
from report_data import trial
from scipy import stats
from small_run import CAA, attacked, broken, write

from reports.aggregate import expectation, worst_case
from reports.baseline import Baseline
from reports.compare import Comparison, compare
from reports.errors import ReportError
from reports.measure import row_of
from reports.verdict import ExitCode


def compared(
    tmp_path: Path, before: dict[str, list[str]], now: dict[str, list[str]], **changes: Any
) -> Comparison:
    base = write(tmp_path / "base", before, **changes)
    run = write(tmp_path / "run", now, **changes)
    return compare(Baseline.read(base), Baseline.read(run))


def test_what_broke_and_what_was_mended_is_named(tmp_path: Path) -> None:
    found = compared(tmp_path, {"c1": broken(3, 60)}, {"c1": broken(2, 60, first=2)})
    (one,) = found.cells
    assert (one.attacked.broke, one.attacked.mended) == (["s3"], ["s0", "s1"])
    assert (one.attacked.n, one.attacked.before, one.attacked.now) == (60, 57, 58)
    assert one.state == "no difference shown"
    assert found.exit_code is ExitCode.PASS
    assert "no proof" in found.next


def test_a_loss_beyond_chance_is_worse(tmp_path: Path) -> None:
    found = compared(tmp_path, {"c1": broken(0, 60)}, {"c1": broken(12, 60)})
    (one,) = found.cells
    assert (found.exit_code, one.state) == (ExitCode.FAIL, "worse")
    assert one.attacked.p == pytest.approx(stats.binomtest(12, 12, 0.5).pvalue, rel=1e-5)
    assert one.attacked.difference["value"] == -0.2
    assert one.attacked.difference["high"] < 0
    assert one.csfr[0]["value"] == 0.0
    assert one.csfr[1]["value"] == 0.2


def test_a_gain_is_better_and_no_failure(tmp_path: Path) -> None:
    found = compared(tmp_path, {"c1": broken(12, 60)}, {"c1": broken(0, 60)})
    assert (found.exit_code, found.cells[0].state) == (ExitCode.PASS, "better")


def test_chance_is_shared_by_all_cells(tmp_path: Path) -> None:
    # 7 of 7 discordant pairs: p = 0.0156, of five cells 0.078.
    names = [f"c{i}" for i in range(5)]
    cells = [attacked(name, attack=name, spec={}) for name in names]
    same, worse = broken(0, 60), broken(7, 60)
    found = compared(tmp_path / "one", {"c0": same}, {"c0": worse}, cells=cells[:1])
    assert found.exit_code is ExitCode.FAIL
    before, now = dict.fromkeys(names, same), dict.fromkeys(names, same) | {"c0": worse}
    found = compared(tmp_path / "five", before, now, cells=cells)
    assert found.exit_code is ExitCode.PASS
    assert found.cells[0].p_holm == pytest.approx(5 * 2 * 0.5**7)


def test_what_compression_alone_broke_is_told_apart(tmp_path: Path) -> None:
    now = ["1010"] * 8 + ["1110"] * 4 + ["1111"] * 48
    (one,) = compared(tmp_path, {"c1": broken(0, 60)}, {"c1": now}).cells
    assert len(one.attacked.broke) == 12
    assert one.broke_clean == 8
    assert (len(one.clean.broke), len(one.clean.mended)) == (8, 0)
    assert [drop["value"] for drop in one.clean_drop] == [0.0, round(8 / 60, 6)]
    assert [drop["n"] for drop in one.clean_drop] == [60, 60]


def test_questions_of_one_picture_are_no_independent_witnesses(tmp_path: Path) -> None:
    before, now = {"c1": broken(0, 80)}, {"c1": broken(8, 80)}
    alone = compared(tmp_path / "alone", before, now).cells[0]
    together = compared(tmp_path / "together", before, now, per_image=8).cells[0]
    assert alone.state == "worse"
    assert together.state == "no difference shown"
    assert together.attacked.effective_n < 20


def test_several_attacks_have_a_worst_case(tmp_path: Path) -> None:
    cells = [attacked(name, attack=name, knowledge="white_box", spec={}) for name in ("caa", "pgd")]
    before = {"caa": broken(0, 60), "pgd": broken(0, 60)}
    now = {"caa": broken(6, 60), "pgd": broken(6, 60, first=6)}
    found = compared(tmp_path, before, now, cells=cells)
    *each, worst = found.cells
    assert [one.state for one in each] == ["no difference shown"] * 2
    assert worst.label == "scenes-a · fastv · worst of caa, pgd · ε 8/255"
    assert (len(worst.attacked.broke), worst.state) == (12, "worse")
    assert found.exit_code is ExitCode.FAIL


def test_cells_without_a_partner_are_named_with_the_reason(tmp_path: Path) -> None:
    same = broken(0, 40)
    more = {"attack": {"type": "pgd", "steps": 5}}
    base = write(
        tmp_path / "base",
        {"a": same, "b": same},
        cells=[attacked("a"), attacked("b", attack="pgd", spec=more)],
    )
    run = write(tmp_path / "run", {"a": same}, cells=[attacked("a")])
    found = compare(Baseline.read(base), Baseline.read(run))
    assert found.only_before == ["scenes-a · fastv · pgd · ε 8/255"]
    assert found.exit_code is ExitCode.INCONCLUSIVE
    found = compare(Baseline.read(run), Baseline.read(base))
    assert found.only_now == [
        ("scenes-a · fastv · pgd · ε 8/255", "the baseline has no attack 'pgd'")
    ]
    assert found.exit_code is ExitCode.PASS  # what is new takes nothing away


def test_an_incomplete_run_is_not_comparable(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"c1": broken(0, 40)})
    run = write(tmp_path / "run", {"c1": broken(0, 40)}, skip=4)
    found = compare(Baseline.read(base), Baseline.read(run))
    assert found.cells[0].state == "not comparable"
    assert "in the run 4 trials of 40 did not run" in found.cells[0].why
    assert found.exit_code is ExitCode.INCONCLUSIVE


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"outcomes": broken(0, 30)}, "40 samples in the baseline, 30 in the run, 30 in both"),
        ({"scenario": {"dataset": {"type": "pope"}}}, "the data set differs"),
        ({"per_image": 2}, "39 of 40|another question, answer or image under the same id"),
        ({"cells": [attacked(attack="pgd", spec={})]}, "the baseline has no attack 'pgd'"),
    ],
)
def test_other_data_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    base = write(tmp_path / "base", {"c1": broken(0, 40)})
    run = write(tmp_path / "run", {"c1": changes.pop("outcomes", broken(0, 40))}, **changes)
    with pytest.raises(ReportError, match=reason):
        compare(Baseline.read(base), Baseline.read(run))


def test_another_setting_is_what_is_compared(tmp_path: Path) -> None:
    fast, zip_ = attacked(spec={**CAA}), attacked("z", compression="visionzip", spec={**CAA})
    base = write(tmp_path / "base", {"c1": broken(0, 60)}, cells=[fast])
    run = write(tmp_path / "run", {"z": broken(12, 60)}, cells=[zip_])
    found = compare(Baseline.read(base), Baseline.read(run))
    assert found.compared == ["compression: fastv → visionzip"]
    assert found.exit_code is ExitCode.FAIL


def test_other_seeds_and_answers_are_told(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"c1": broken(0, 40)}, scenario={})
    run = write(
        tmp_path / "run",
        {"c1": broken(0, 40)},
        seed=7,
        scenario={"answers": {"max_new_tokens": 64}},
    )
    assert compare(Baseline.read(base), Baseline.read(run)).compared == [
        "seed: 0 → 7",
        "answers: default → {'max_new_tokens': 64}",
    ]


def rows(outcomes: list[str]) -> dict[str, Any]:
    return {f"s{i}": row_of(trial(f"s{i}", one)) for i, one in enumerate(outcomes)}


def test_the_worst_case_is_taken_sample_by_sample() -> None:
    found = worst_case([rows(["1111", "1100", "1110", "1111"]), rows(["1110", "1110", "1111"])])
    kept = {name: (row.full_attacked, row.compressed_attacked) for name, row in found.items()}
    # A failure that spares the full path is worse than one that does not: only it is a finding.
    assert kept == {"s0": (True, False), "s1": (True, False), "s2": (True, False)}
    assert worst_case([]) == {}


def test_errors_have_no_worst_case() -> None:
    assert list(worst_case([rows(["1111", "1111"]), rows(["error", "1111"])])) == ["s1"]


def test_an_expectation_is_over_draws_first() -> None:
    draws = [rows(["1110", "1111"]), rows(["1110", "1110"])]
    found = expectation(draws, lambda row: row.failure)
    assert (found.value, found.n) == (0.75, 2)
    more = expectation(draws * 50, lambda row: row.failure)
    assert (more.low, more.high) == (found.low, found.high)  # draws are no further samples
    assert expectation([], lambda row: row.failure).value is None
