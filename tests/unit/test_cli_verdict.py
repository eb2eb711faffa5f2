"""The commands gate, compare and power, and --inconclusive, through the command line itself."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import synthetic_run
from small_run import attacked, broken, write

from redteam.cli import main
from reports import build_reports
from reports.records import GateSpec

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def redteam(*arguments: str | Path, code: int = 0) -> Done:
    out, err, found = io.StringIO(), io.StringIO(), 0
    words = ["redteam", *map(str, arguments)]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "argv", words),
            mock.patch.dict("os.environ", NO_COLOR="1"),
        ):
            main()
    except SystemExit as end:
        found = int(end.code or 0)
    assert found == code, out.getvalue() + err.getvalue()
    return Done(found, out.getvalue(), err.getvalue())


def gate(**changes: Any) -> GateSpec:
    return GateSpec(**({"name": "no hole", "metric": "csfr", "max": 0.1} | changes))


@pytest.fixture
def open_run(tmp_path: Path) -> Path:
    """A run that only lacks samples."""
    return write(tmp_path / "open", {"c1": broken(10, 100)}, gates=[gate()])


@pytest.fixture
def unmeasured_run(tmp_path: Path) -> Path:
    """A run whose gate has nothing to decide from."""
    return write(tmp_path / "unmeasured", {"c1": ["0000"] * 100}, gates=[gate()])


@pytest.mark.parametrize("command", ["report", "gate"])
@pytest.mark.parametrize(
    ("policy", "enough", "lacking"),
    [((), 4, 4), ("fail", 1, 1), ("warn", 0, 4), ("pass", 0, 4)],
)
def test_inconclusive(
    command: str,
    policy: str | tuple[()],
    enough: int,
    lacking: int,
    open_run: Path,
    unmeasured_run: Path,
) -> None:
    option = ("--inconclusive", policy) if policy else ()
    for folder, code in ((open_run, enough), (unmeasured_run, lacking)):
        done = redteam(command, folder, *option, "--json", code=code)
        assert (done.json["verdict"], done.json["exit_code"]) == ("inconclusive", code)
        warned = "passed with a warning" in done.err
        assert warned is (policy == "warn" and code == 0)
        assert ("more samples alone would not decide" in done.err) is (
            policy in ("warn", "pass") and code == 4
        )


def test_the_record_stays_inconclusive_whatever_the_shell_gets(open_run: Path) -> None:
    redteam("report", open_run, "--inconclusive", "pass")
    summary = json.loads((open_run / "summary.json").read_text())
    assert (summary["verdict"], summary["exit_code"]) == ("inconclusive", 4)
    assert summary["more_samples_decide"]


@pytest.mark.parametrize("policy", ["warn", "pass"])
def test_nothing_run_and_too_many_errors_never_pass(tmp_path: Path, policy: str) -> None:
    half = ["error"] * 50 + broken(0, 50)
    cases: dict[str, tuple[Path, int]] = {
        "errors": (write(tmp_path / "e", {"c1": half}, gates=[gate()]), 4),
        "missing": (write(tmp_path / "m", {"c1": half}, gates=[gate()], skip=9), 3),
        "nothing": (write(tmp_path / "n", {"c1": []}, gates=[gate()]), 5),
        "all errors": (write(tmp_path / "a", {"c1": ["error"] * 9}, gates=[gate()]), 3),
        "no noise beside it": (
            write(
                tmp_path / "doubted",
                {"c1": broken(0, 100)},
                cells=[attacked(knowledge="white_box")],
                gates=[gate()],
            ),
            4,
        ),
    }
    for folder, code in cases.values():
        redteam("gate", folder, "--inconclusive", policy, code=code)


def test_a_failure_is_no_matter_of_policy(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", {"c1": broken(50, 100)}, gates=[gate()])
    redteam("gate", folder, "--inconclusive", "pass", code=1)


def test_an_unknown_policy_is_refused(open_run: Path) -> None:
    done = redteam("gate", open_run, "--inconclusive", "ignore", code=2)
    assert "fail" in done.err
    assert "warn" in done.err


def test_gate_decides_again_and_writes_nothing(open_run: Path) -> None:
    before = sorted(path.name for path in open_run.iterdir())
    done = redteam("gate", open_run, code=4)
    assert sorted(path.name for path in open_run.iterdir()) == before
    assert "10 of 100" in done.out
    assert "clean drop" in done.out
    assert "next     raise dataset.samples" in done.out
    assert redteam("gate", open_run, "--json", code=4).json["gates"][0]["cells"][0]["events"] == 10


def test_other_gates_than_the_runs(open_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "gates.yaml"
    file.write_text("gates:\n  - {metric: csfr, max: 0.3, where: {attack: caa, epsilon: 8/255}}\n")
    found = redteam("gate", open_run, "--gates", file, "--json").json
    assert [one["name"] for one in found["gates"]] == ["csfr ≤ 0.3, caa, epsilon 8/255"]
    file.write_text("name: x\ngates: [{metric: csfr, max: 0.01}]\n")  # a scenario will do
    redteam("gate", open_run, "--gates", file, code=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gates: [{metric: csfrr, max: 0.1}]\n", "did you mean 'csfr'"),
        ("gates: [{metric: csfr}]\n", "states no limit"),
        ("gates: [{metric: csfr, max: 0.1, where: {attack: pgd}}]\n", "no attack of this scenario"),
        ("gates: [{metric: csfr, maks: 0.1}]\n", "unknown key"),
        ("gates: [{metric: csfr, max: 0.1, max_increase: 0.1}]\n", "write two gates"),
        ("gates: [{metric: csfr, baseline: runs/a}]\n", "names a baseline and no limit"),
        ("gates: [{metric: csfr, max_increase: -0.1}]\n", "-0.1 is not allowed"),
        ("name: x\n", "gates: is missing"),
        ("- 1\n", "has no gates"),
        ("gates: []\n", "states no gates"),
    ],
)
def test_wrong_gates_are_named_with_the_place(
    text: str, message: str, open_run: Path, tmp_path: Path
) -> None:
    file = tmp_path / "gates.yaml"
    file.write_text(text)
    done = redteam("gate", open_run, "--gates", file, code=2)
    assert message in done.err
    assert "gates.yaml" in done.err


def test_a_run_without_gates_asks_for_some(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", {"c1": broken(0, 9)})
    assert "give some with --gates FILE" in redteam("gate", folder, code=2).err


def test_a_baseline_on_the_command_line(tmp_path: Path) -> None:
    change = GateSpec(name="no worse", metric="csfr", max_increase=0.05)
    run = write(tmp_path / "run", {"c1": broken(10, 200)}, gates=[change])
    base = write(tmp_path / "base", {"c1": broken(10, 200)})
    worse = write(tmp_path / "worse", {"c1": broken(60, 200)}, gates=[change])
    assert "no baseline run is named" in redteam("gate", run, code=4).out
    done = redteam("gate", run, "--baseline", base)
    assert "10 of 200, before 10" in done.out
    assert f"against {base}" in done.out
    redteam("gate", worse, "--baseline", base, code=1)
    assert redteam("report", run, "--baseline", base, "--json").json["verdict"] == "pass"
    other = write(tmp_path / "other", {"c1": broken(0, 100)})
    done = redteam("gate", run, "--baseline", other, code=2)
    assert "the samples differ: 100 samples in the baseline, 200 in the run" in done.err


def test_compare_says_what_broke_and_what_to_do(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"c1": broken(0, 60)})
    run = write(tmp_path / "run", {"c1": broken(12, 60)})
    done = redteam("compare", base, run, code=1)
    assert "broke   12 of 60 samples right before: s0, s1, s2, s3, s4 and 7 more" in done.out
    assert "clean drop" in done.out
    assert "next     look at the samples that broke" in done.out
    found = redteam("compare", base, run, "--json", code=1).json
    assert found["cells"][0]["attacked"]["broke"] == [f"s{i}" for i in range(12)]
    assert "no proof that nothing got worse" in redteam("compare", base, base).out


def test_compare_refuses_other_samples(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"c1": broken(0, 60)})
    run = write(tmp_path / "run", {"c1": broken(0, 50)})
    done = redteam("compare", base, run, code=2)
    assert "60 samples in the baseline, 50 in the run, 50 in both" in done.err
    assert done.out == ""
    assert "is not a run folder" in redteam("compare", base, tmp_path, code=2).err


def test_compare_of_a_realistic_run(tmp_path: Path) -> None:
    folder = synthetic_run.build(tmp_path / "run", samples=8)
    found = redteam("compare", folder, folder, "--json", code=4).json
    assert len(found["cells"]) == 18 + 6  # with the worst case of each corner
    assert {one["attacked"]["p"] for one in found["cells"]} == {1.0}
    open_ = {one["label"]: one["why"] for one in found["cells"] if one["state"] == "not comparable"}
    assert len(open_) == 3 + 3  # of pgd on visionzip one of eight trials is an error
    assert all("in the baseline 1 of 8 trials are errors" in why for why in open_.values())


def test_power_of_a_limit() -> None:
    rows = redteam("power", "--limit", "0.1", "--rate", "0,0.05,0.2", "--json").json[0]["rows"]
    assert [(row["true"], row["decision"], row["samples"]) for row in rows] == [
        ("0", "pass", 29),
        ("0.05", "pass", 203),
        ("0.2", "fail", 89),
    ]
    assert "     203" in redteam("power").out


def test_power_of_a_minimum_mirrors_it() -> None:
    arguments = ("power", "--min", "--limit", "0.9", "--rate", "0.95", "--json")
    assert redteam(*arguments).json[0]["rows"][0]["samples"] == 203


def test_power_with_shared_images_and_many_decisions() -> None:
    rate = ("power", "--rate", "0.2", "--json")
    alone = redteam(*rate).json[0]["rows"][0]["samples"]
    many = redteam(*rate, "--decisions", "12").json[0]["rows"][0]["samples"]
    shared = redteam(*rate, "--design-effect", "2").json[0]["rows"][0]["samples"]
    assert many == 154 > alone == 89
    assert shared == 2 * alone


def test_power_of_a_change() -> None:
    table = redteam("power", "--max-increase", "0.05", "--json").json[0]
    samples = [row["samples"] for row in table["rows"]]
    assert samples == sorted(samples)
    assert table["title"] == "rate rises by ≤ 0.05, from 0.1"


def test_power_of_a_scenario() -> None:
    tables = redteam("power", "--scenario", "ci-gate", "--json").json
    assert [len(table["rows"]) for table in tables] == [7, 7]
    assert "2 decisions in its family" in tables[0]["title"]
    assert "with the scenario's 64 samples" in tables[0]["notes"][0]
    assert "at most 2 events" in tables[0]["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--limit", "0"), "--limit: 0 is not allowed"),
        (("--rate", "few"), "--rate: 'few' is not allowed"),
        (("--power", "1"), "--power: 1 is not allowed"),
        (("--confidence", "0.4"), "--confidence: 0.4 is not allowed"),
        (("--max-increase", "0.05", "--before", "0.01", "--no-longer", "0.2"), "no longer ≤"),
        (("--scenario", "compressors"), "states no gates"),
    ],
)
def test_power_refuses_what_makes_no_sense(arguments: tuple[str, ...], message: str) -> None:
    assert message in redteam("power", *arguments, code=2).err


@pytest.mark.parametrize(
    "command", [("gate", "RUN"), ("compare", "RUN", "RUN"), ("power",), ("power", "--help")]
)
def test_no_torch(command: tuple[str, ...], tmp_path: Path) -> None:
    folder = write(tmp_path / "run", {"c1": broken(0, 60)}, gates=[gate()])
    words = [str(folder) if word == "RUN" else word for word in command]
    script = (
        "import sys, atexit\n"
        "atexit.register(lambda: print(*sorted({'torch', 'transformers', 'scipy'}"
        " & set(sys.modules)), file=sys.stderr))\n"
        f"sys.argv = ['redteam', *{words!r}]\n"
        "from redteam.cli import main\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_reports_of_a_run_with_every_kind_of_gate(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"c1": broken(10, 200)})
    gates = [
        gate(),
        gate(name="apart", family="release", metric="csg"),
        GateSpec(name="no worse", metric="csfr", max_increase=0.05, baseline=str(base)),
    ]
    folder = write(tmp_path / "run", {"c1": broken(10, 200)}, gates=gates)
    built = build_reports(folder)
    page = built.report.read_text()
    assert "one-sided 95% bounds" in page
    assert "no worse" in built.markdown.read_text()
