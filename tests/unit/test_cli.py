"""The command line: fast, light, and with errors that say what to do. No model is loaded here."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import synthetic_run
from command import imported

from reports import build_reports

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "numpy", "pydantic", "yaml", "rich.table")


def redteam(
    *arguments: str, cwd: Path, code: int = 0, path: str = ""
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "redteam", *arguments],
        cwd=cwd,
        env={"PYTHONPATH": f"{path}:{ROOT}", "NO_COLOR": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    return done


def test_help_is_fast_and_light(tmp_path: Path) -> None:
    modules = imported(tmp_path, "--help")
    assert not modules & set(HEAVY)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        out = redteam("--help", cwd=tmp_path).stdout
        times.append(time.perf_counter() - started)
    for command in (
        "run",
        "measure",
        "validate",
        "plan",
        "list",
        "report",
        "gate",
        "compare",
        "power",
        "doctor",
        "init",
        "runs",
        "show",
        "replay",
        "export",
    ):
        assert f"\n  {command} " in out
    assert min(times) < 0.8, f"0.25 s on an idle machine, here {times}"


@pytest.mark.parametrize(
    "command",
    [
        ("--version",),
        ("validate", "quickstart"),
        ("list", "attacks"),
        ("list", "compressors", "--json"),
        ("list", "targets"),
        ("list", "datasets"),
        ("list", "defenses"),
        ("list", "metrics"),
        ("run", "--help"),
    ],
    ids=" ".join,
)
def test_no_torch(command: tuple[str, ...], tmp_path: Path) -> None:
    assert not imported(tmp_path, *command) & {"torch", "transformers"}


def test_report_needs_no_torch(tmp_path: Path) -> None:
    folder = synthetic_run.build(tmp_path / "run", samples=8)
    code = int(build_reports(folder).exit_code)
    (folder / "report.html").unlink()
    modules = imported(tmp_path, "report", str(folder), code=code)
    assert (folder / "report.html").is_file()
    assert not modules & {"torch", "transformers"}


def test_lists(tmp_path: Path) -> None:
    rows = json.loads(redteam("list", "attacks", "--json", cwd=tmp_path).stdout)
    caa = next(row for row in rows if row["name"] == "caa")
    assert caa["knowledge"] == "white_box"
    steps = next(option for option in caa["options"] if option["name"] == "steps")
    assert steps["allowed"] == "an integer ≥ 0"
    assert steps["help"]
    text = redteam("list", "compressors", cwd=tmp_path).stdout
    assert "fastv " in text
    assert "retention:" not in text
    text = redteam("list", "compressors", "fastv", cwd=tmp_path).stdout
    assert "retention: a number > 0 and ≤ 1, or null; default null" in text
    names = {
        row["name"] for row in json.loads(redteam("list", "metrics", "--json", cwd=tmp_path).stdout)
    }
    assert {"csfr", "csg", "upr"} <= names


BAD = {
    "option": ("run", "quickstart", "--limt", "3"),
    "scenario": ("run", "quickstrt"),
    "set": ("run", "quickstart", "--set", "attacks.caa.steps=many"),
    "file": ("run", "bad.yaml"),
    "listing": ("list", "attcks"),
    "folder": ("report", "nowhere"),
    "limit": ("run", "quickstart", "--limit", "0"),
}


@pytest.mark.parametrize("case", BAD)
def test_usage_errors_write_nothing(case: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: bad\nattacks:\n  - {type: nois}\n")
    done = redteam(*BAD[case], cwd=tmp_path, code=2)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]
    if case == "file":
        assert "bad.yaml:3:12: attacks[0].type: there is no attack 'nois'" in done.stderr
        assert "did you mean 'noise'?" in done.stderr


def test_init_writes_a_valid_scenario_once(tmp_path: Path) -> None:
    redteam("init", "mine.yaml", cwd=tmp_path)
    text = (tmp_path / "mine.yaml").read_text()
    assert "is valid" in redteam("validate", "mine.yaml", cwd=tmp_path).stdout
    (tmp_path / "mine.yaml").write_text("kept")
    assert "--force" in redteam("init", "mine.yaml", cwd=tmp_path, code=2).stderr
    assert (tmp_path / "mine.yaml").read_text() == "kept"
    redteam("init", "mine.yaml", "--force", cwd=tmp_path)
    assert (tmp_path / "mine.yaml").read_text() == text


def test_every_key_of_the_quickstart_is_explained() -> None:
    lines = (ROOT / "scenarios" / "quickstart.yaml").read_text().splitlines()
    for before, line in pairwise(lines):
        if line and not line.startswith((" ", "#", "-")):
            assert before.startswith("#"), f"{line!r} has no comment above it"


def test_a_shadowed_package_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "site" / "reports"
    folder.mkdir(parents=True)
    # Enough of ours for the command line to start, as an unrelated package would not even have.
    (folder / "__init__.py").write_text("")
    for name in ("errors.py", "verdict.py"):
        (folder / name).write_text((ROOT / "reports" / name).read_text())
    done = redteam("list", "attacks", cwd=tmp_path, code=3, path=str(tmp_path / "site"))
    assert f"package 'reports' of redteam is shadowed by {folder}" in done.stderr


def test_one_of_a_kind_can_be_listed(tmp_path: Path) -> None:
    one = redteam("list", "datasets", "pope", cwd=tmp_path).stdout
    assert one.startswith("pope  ")
    assert 'default "\\nAnswer the question' in one
    assert "\nscenes" not in one
    wrong = redteam("list", "compressors", "fastw", cwd=tmp_path, code=2)
    assert "did you mean 'fastv'" in wrong.stderr
