"""Run folders of every schema version, and of every stage of one, can still be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import redteam

from reports.records import SCHEMA_VERSION
from reports.store import RunStore

RUNS = Path(__file__).parents[1] / "fixtures" / "runs"
FOLDERS = sorted(
    path.parent.relative_to(RUNS).as_posix() for path in RUNS.glob("*/*/manifest.json")
)
NEWER = {  # fields of a trial that came after the stage
    "1/first": ("effort", "demands", "pipelines", "detection", "objective", "draws"),
    "1/boxes": ("effort", "demands", "pipelines", "detection", "objective", "draws"),
    "1/effort": ("demands", "pipelines", "detection", "objective", "draws"),
    "1/demands": ("pipelines", "detection", "objective", "draws"),
    "1/defenses": ("detection", "objective", "draws"),
    "1/detectors": ("objective", "draws"),
}


@pytest.fixture(params=FOLDERS)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(RUNS / request.param, tmp_path / "runs" / "old"))


def test_every_version_has_a_stored_run() -> None:
    assert set(FOLDERS) == NEWER.keys()
    assert {int(name.split("/")[0]) for name in FOLDERS} == set(range(1, SCHEMA_VERSION + 1))


@pytest.mark.parametrize("name", FOLDERS)
def test_it_is_from_before_the_newer_fields(name: str) -> None:
    for line in (RUNS / name / "ledger.jsonl").read_text().splitlines():
        assert not set(NEWER[name]) & json.loads(line)["trial"].keys()


def test_it_can_be_reported(old: Path) -> None:
    done = redteam("report", old, "--json")
    summary = json.loads(done.out)["summary"]
    assert done.code == summary["exit_code"]
    assert summary["progress"]["missing"] == summary["progress"]["errors"] == 0
    assert (done.code, summary["verdict"]) in {(1, "fail"), (4, "inconclusive")}
    for name in ("report.html", "summary.md", "junit.xml", "results.sarif"):
        assert (old / name).stat().st_size > 1_000
    assert redteam("export", old, "--format", "csv").code == 0
    assert len((old / "trials.csv").read_text().splitlines()) == 1 + len(
        (old / "ledger.jsonl").read_text().splitlines()
    )


def test_it_can_be_listed(old: Path) -> None:
    (row,) = json.loads(redteam("runs", old.parent, "--json").out)
    assert (row["state"], row["name"], row["verdict"]) == ("complete", "mini", None)
    redteam("report", old)
    (row,) = json.loads(redteam("runs", old.parent, "--json").out)
    assert row["verdict"] in {"fail", "inconclusive"}


def test_its_samples_can_be_shown(old: Path) -> None:
    manifest = RunStore.read(old).manifest
    for sample in manifest.samples:
        done = redteam("show", old, "--sample", sample)
        assert done.code == 0, done.err
        assert done.out.count("\nfinding    ") == len(manifest.cells)
        assert done.out.count("\nkept       36 tokens clean, 36 attacked") == len(manifest.cells)
