"""Parts of a run: every unit in exactly one of them, and the merged folder equals the whole run."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_run import build

import reports
from redteam.cost import unit_cost
from redteam.errors import UsageError
from redteam.plan import Plan, make_plan
from redteam.scenario import load_limited
from redteam.sharding import Shard
from reports.errors import StoreError
from reports.ledger import Ledger
from reports.merge import merge
from reports.records import Answer
from reports.store import LEDGER, RunStore

PLAN: Plan = make_plan(load_limited("quickstart", ["engine.batch_size=8"], None))


@settings(deadline=None, max_examples=40)
@given(of=st.integers(1, 60), samples=st.integers(0, 100))
def test_each_unit_is_in_exactly_one_part(of: int, samples: int) -> None:
    units = list(PLAN.units(samples))
    parts = [Shard(index, of).part(units) for index in range(1, of + 1)]
    assert [unit.id for part in parts for unit in part] == [unit.id for unit in units]


def test_parts_cost_about_the_same() -> None:
    units = list(PLAN.units(64))
    fair = sum(map(unit_cost, units)) / 4
    largest = max(map(unit_cost, units))
    for index in range(1, 5):
        assert abs(sum(map(unit_cost, Shard(index, 4).part(units))) - fair) <= largest


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/", "a/b", "1/4/2", "-1/4", "1/0", ""])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="1 ≤ I ≤ N"):
        Shard.parse(text)


def test_a_part_is_read_as_it_is_written() -> None:
    assert Shard.parse(" 2/8 ") == Shard(2, 8)
    assert str(Shard(2, 8)) == "2/8"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return build(tmp_path / "whole", samples=12)


def split(whole: Path, into: int) -> list[Path]:
    """Folders that hold every n-th trial of a run."""
    source = RunStore.read(whole)
    trials = list(source.trials())
    folders = []
    for index in range(into):
        folder = whole.parent / f"part-{index}"
        with RunStore.create(folder, source.manifest, source.scenario_text()) as part:
            for one in trials[index::into]:
                for name in (one.clean_png, one.attacked_png, one.base_png):
                    if name is not None:
                        part.save_png(source.read_png(name))
            part.append(trials[index::into])
        folders.append(folder)
    return folders


def test_merged_parts_are_the_whole_run(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merged = merge(split(whole, 3), out)
    assert (merged.missing, merged.repeated, merged.notes) == (0, 0, ())
    reports.build_reports(whole)
    reports.build_reports(out)
    assert (out / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()
    images = {path.name for path in (whole / "images").rglob("*.png")}
    assert {path.name for path in (out / "images").rglob("*.png")} == images


def test_a_missing_part_is_missing(whole: Path, tmp_path: Path) -> None:
    parts = split(whole, 2)
    gone = len(RunStore.read(parts[1]).done())
    assert merge(parts[:1], tmp_path / "out").missing == gone
    assert reports.build_reports(tmp_path / "out").exit_code == 3


def test_the_same_folder_twice_counts_once(whole: Path, tmp_path: Path) -> None:
    merged = merge([whole, whole], tmp_path / "out")
    assert (merged.repeated, merged.missing) == (0, 0)


def test_what_was_measured_beats_an_error_and_disagreement_is_told(
    whole: Path, tmp_path: Path
) -> None:
    parts = split(whole, 2)
    source = RunStore.read(whole)
    good = [one for one in source.trials() if one.error is None][:2]
    failed = next(one for one in source.trials() if one.error is not None)
    assert good[0].answers is not None
    other = good[1].model_copy(
        update={"answers": good[0].answers.model_copy(
            update={"clean_full": Answer(text="something else", correct=False)})}
    )  # fmt: skip
    extra = tmp_path / "extra"
    with RunStore.create(extra, source.manifest) as part:
        for name in (other.clean_png, other.attacked_png, other.base_png):
            if name is not None:
                part.save_png(source.read_png(name))
        part.append([
            failed.model_copy(update={"cell": good[0].cell, "sample": good[0].sample}), other,
        ])  # fmt: skip
    merged = merge([extra, *parts], tmp_path / "out")
    assert merged.repeated == 2
    assert merged.disagreeing == 1
    stored = {(one.cell, one.sample): one for one in RunStore.read(tmp_path / "out").trials()}
    assert stored[good[0].cell, good[0].sample].error is None
    assert stored[good[1].cell, good[1].sample].answers == other.answers


def test_a_folder_of_another_run_is_refused(whole: Path, tmp_path: Path) -> None:
    other = build(tmp_path / "other", samples=5)
    with pytest.raises(StoreError, match="no part of the same run"):
        merge([whole, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_image_is_not_passed_on(whole: Path, tmp_path: Path) -> None:
    image = next((whole / "images").rglob("*.png"))
    image.write_bytes(b"changed")
    with pytest.raises(StoreError, match="was changed"):
        merge([whole], tmp_path / "out")


def test_nothing_and_an_existing_folder_are_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nothing to merge"):
        merge([], tmp_path / "out")
    with pytest.raises(StoreError, match="not empty"):
        merge([whole], whole)


def test_the_merged_ledger_is_a_ledger(whole: Path, tmp_path: Path) -> None:
    merge([whole], tmp_path / "out")
    assert len(list(Ledger(tmp_path / "out" / LEDGER).trials())) == len(
        list(Ledger(whole / LEDGER).trials())
    )
