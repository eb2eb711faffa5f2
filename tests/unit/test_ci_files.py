"""The GitHub action, the GitLab job and their page: they say only what the command line can do."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from redteam.cli import app

ROOT = Path(__file__).parents[2]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
GITLAB = yaml.safe_load((ROOT / "ci" / "gitlab-redteam.yml").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
STEPS = {step.get("name", step.get("uses")): step for step in ACTION["runs"]["steps"]}
FILES = ("action.yml", "ci/gitlab-redteam.yml", "docs/ci.md")


def command_lines(text: str) -> list[tuple[list[str], bool]]:
    """Every ``redteam …`` in a text, and whether it is a whole line, not a word in a sentence.

    Shell variables are plain words.
    """
    text = text.replace('"${arguments[@]}"', 'SCENARIO --out "$OUT"')
    text = re.sub(r'"\$\{policy\[@\]\}"|"\$@"', "--inconclusive warn", text)
    found = []
    for tick, line in re.findall(r"(?m)(?:^\s*|(`))redteam ([a-z][^`\n]*)", text):
        bare = re.sub(r"\s*(?:\|\| .*|#.*)$", "", line)
        found.append((shlex.split(bare), not tick))
    return found


LINES = [
    pytest.param(words, whole, id=f"{name}: {' '.join(words)[:60]}")
    for name in FILES
    for words, whole in command_lines((ROOT / name).read_text(encoding="utf-8"))
]


def commands() -> dict[str, Any]:
    found: dict[str, Any] = getattr(typer.main.get_command(app), "commands")  # noqa: B009
    return found


@pytest.mark.parametrize(("words", "whole"), LINES)
def test_every_command_line_is_understood(words: list[str], whole: bool) -> None:
    command = commands()[words[0]]
    command.make_context(words[0], list(words[1:]), resilient_parsing=not whole)


def test_the_commands_were_found() -> None:
    named = {param.values[0][0] for param in LINES if param.values[1]}  # type: ignore[index]
    assert named >= {"run", "report", "gate", "compare", "power", "show", "replay", "export"}
    for wrong in (["run", "x.yaml", "--no-such-option"], ["run"], ["export", "r", "--format", "x"]):
        with pytest.raises(Exception, match=r"No such option|Missing|is not one of"):
            test_every_command_line_is_understood(wrong, True)


def usage(text: str) -> dict[str, set[str]]:
    """Options of each command in the overview of docs/cli.md."""
    block = re.search(r"```\n(redteam run .*?)```", text, re.DOTALL)
    assert block
    lines = [line.split() for line in block[1].splitlines() if line.startswith("redteam ")]
    return {
        words[1]: set(re.findall(r"--[a-z-]+", " ".join(words))) for words in lines if words[1:]
    }


def test_the_overview_names_commands_and_options_that_exist() -> None:
    known_commands = commands()
    told = usage((ROOT / "docs" / "cli.md").read_text(encoding="utf-8"))
    assert {"run", "report", "runs", "show", "replay", "export"} <= told.keys()
    told.pop("--version")
    for name, options in told.items():
        known = {option for param in known_commands[name].params for option in param.opts}
        assert options <= known, name


# The action.


def expressions(value: Any) -> list[str]:
    return re.findall(r"inputs\.([a-z-]+)", yaml.safe_dump(value))


def test_inputs_are_declared_and_used() -> None:
    assert set(expressions(ACTION["runs"]) + expressions(ACTION["outputs"])) == set(
        ACTION["inputs"]
    )
    for name, one in ACTION["inputs"].items():
        assert one["description"].strip(), name
        assert one.get("required") or "default" in one, name
        assert f"`{name}`" in PAGE, name
    for name in ACTION["outputs"]:
        assert f"`{name}`" in PAGE, name


def test_no_input_is_written_into_a_script() -> None:
    """An expression in a script is replaced before the shell reads it: it could become code."""
    for step in ACTION["runs"]["steps"]:
        assert "${{" not in step.get("run", "")
        assert ("run" in step) == ("shell" in step)


def test_examples_use_inputs_that_exist() -> None:
    found = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(found) >= 5
    steps = []
    for text in found:
        data = yaml.safe_load(text)
        if isinstance(data, dict) and "jobs" in data:
            data = data["jobs"]["redteam"]["steps"]
        steps += [one for one in data if isinstance(one, dict)] if isinstance(data, list) else []
    ours = [step for step in steps if step.get("uses", "").startswith("OWNER/redteam@")]
    assert len(ours) == 2
    for step in ours:
        assert set(step["with"]) <= set(ACTION["inputs"])


def test_examples_of_gates_are_valid(tmp_path: Path) -> None:
    from redteam.scenario import load_scenario

    text = (ROOT / "scenarios" / "ci-gate.yaml").read_text(encoding="utf-8")
    head = text[: text.index("# Every gate names a metric")]
    gates = re.findall(r"```yaml\n(gates:.*?)```", PAGE, re.DOTALL)
    assert len(gates) == 2
    for one in gates:
        (tmp_path / "s.yaml").write_text(head + one)
        assert len(load_scenario(tmp_path / "s.yaml").gates) == 1


FAKE = """\
#!/bin/bash
printf '%s\\n' "$*" >> "$LOG"
case "$1" in
  run) out=$(echo "$*" | sed 's/.*--out \\([^ ]*\\).*/\\1/')
       if [ "$RUN_CODE" != 2 ]; then
         mkdir -p "$out"
         echo '{"verdict": "inconclusive"}' > "$out/summary.json"
         echo '## summary' > "$out/summary.md"
         echo '{}' > "$out/results.sarif"
       fi
       exit "$RUN_CODE" ;;
  report) echo '{"verdict": "pass"}' > "$2/summary.json"; exit "$REPORT_CODE" ;;
esac
"""


def executed(tmp_path: Path, script: str, **environment: str) -> tuple[int, list[str]]:
    """Run a script with a `redteam` that only notes how it was called."""
    fake = tmp_path / "bin" / "redteam"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(FAKE)
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    variables = {
        "PATH": f"{fake.parent}:{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "GITHUB_OUTPUT": str(tmp_path / "output"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "step-summary"),
        "RUN_CODE": "0",
        "REPORT_CODE": "0",
        **environment,
    }
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script], cwd=tmp_path, env=variables,
        capture_output=True, text=True,
    )  # fmt: skip
    log = tmp_path / "log"
    return done.returncode, log.read_text().splitlines() if log.exists() else []


def inputs(**changes: str) -> dict[str, str]:
    names = ("SCENARIO", "OUT", "SET", "LIMIT", "DEVICE", "BASELINE", "INCONCLUSIVE")
    assert set(names) == STEPS["Run the scenario"]["env"].keys()
    return dict.fromkeys(names, "") | {"SCENARIO": "s.yaml", "OUT": "out"} | changes


def outputs(tmp_path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in (tmp_path / "output").read_text().splitlines())


SCRIPT = STEPS["Run the scenario"]["run"]


def test_the_action_runs_and_reports_the_verdict(tmp_path: Path) -> None:
    given = inputs(
        SET="seed=1\nattacks.caa.steps=5\n", LIMIT="4", DEVICE="cpu", INCONCLUSIVE="warn"
    )
    code, calls = executed(tmp_path, SCRIPT, **given, RUN_CODE="4")
    assert code == 0, "the verdict is the last step, so that everything is sent first"
    assert calls == [
        "run s.yaml --out out --set seed=1 --set attacks.caa.steps=5 --limit 4 --device cpu "
        "--inconclusive warn"
    ]
    assert outputs(tmp_path) == {"exit-code": "4", "verdict": "inconclusive", "sarif": "true"}
    assert (tmp_path / "step-summary").read_text() == "## summary\n"


@pytest.mark.parametrize(
    ("run", "report", "code", "verdict"),
    [("4", "0", "0", "pass"), ("0", "1", "1", "pass"), ("1", "4", "4", "pass")],
)
def test_a_baseline_decides_anew(
    tmp_path: Path, run: str, report: str, code: str, verdict: str
) -> None:
    given = inputs(BASELINE="base", INCONCLUSIVE="fail")
    _, calls = executed(tmp_path, SCRIPT, **given, RUN_CODE=run, REPORT_CODE=report)
    assert calls[1:] == ["report out --baseline base --inconclusive fail"]
    assert outputs(tmp_path)["exit-code"] == code
    assert outputs(tmp_path)["verdict"] == verdict


@pytest.mark.parametrize("run", ["2", "3", "5", "130"])
def test_what_did_not_run_is_not_decided_anew(tmp_path: Path, run: str) -> None:
    _, calls = executed(tmp_path, SCRIPT, **inputs(BASELINE="base"), RUN_CODE=run)
    assert len(calls) == 1
    assert outputs(tmp_path)["exit-code"] == run
    assert ("sarif" in outputs(tmp_path)) == (run != "2")


def test_hostile_inputs_stay_words(tmp_path: Path) -> None:
    evil = "$(touch owned); touch owned #`touch owned`"
    given = inputs(SCENARIO=evil, SET=f"a={evil}", INCONCLUSIVE=evil)
    executed(tmp_path, SCRIPT, **given)
    assert not (tmp_path / "owned").exists()


def test_the_last_step_is_the_verdict(tmp_path: Path) -> None:
    last = ACTION["runs"]["steps"][-1]
    for code in (0, 1, 4):
        assert executed(tmp_path, last["run"], CODE=str(code))[0] == code


@pytest.mark.parametrize(
    ("extras", "requirement", "installed"),
    [
        ("", "", "/action"),
        ("data,art", "", "/action[data,art]"),
        ("", "redteam==0.1.0", "redteam==0.1.0"),
        ("data", "redteam==0.1.0", None),
    ],
)
def test_what_is_installed(
    tmp_path: Path, extras: str, requirement: str, installed: str | None
) -> None:
    script = STEPS["Install redteam"]["run"].replace("python -m pip", "redteam")
    given = {"EXTRAS": extras, "REQUIREMENT": requirement, "GITHUB_ACTION_PATH": "/action"}
    code, calls = executed(tmp_path, script, **given)
    assert calls == ([] if installed is None else [f"install {installed}"])
    assert code == (2 if installed is None else 0)


# GitLab.


def test_the_gitlab_job_does_the_same(tmp_path: Path) -> None:
    job = GITLAB[".redteam"]
    script = job["script"][-1]
    given = {
        "REDTEAM_SCENARIO": "s.yaml", "REDTEAM_OUT": "out", "REDTEAM_BASELINE": "base",
        "REDTEAM_INCONCLUSIVE": "fail",
    }  # fmt: skip
    code, calls = executed(tmp_path, script, **given, RUN_CODE="4", REPORT_CODE="1")
    assert calls == [
        "run s.yaml --out out --inconclusive fail",
        "report out --baseline base --inconclusive fail",
    ]
    assert code == 1
    code, calls = executed(tmp_path, script, **{**given, "REDTEAM_INCONCLUSIVE": ""}, RUN_CODE="3")
    assert (code, calls[2:]) == (3, ["run s.yaml --out out"])
    assert set(given) < set(job["variables"])
    assert job["artifacts"]["when"] == "always"
    for name in ("REDTEAM_PACKAGE", "REDTEAM_SCENARIO"):
        guard = next(line for line in job["script"] if f"{name}:?" in line)
        assert executed(tmp_path, guard, **{name: ""})[0] != 0
        assert executed(tmp_path, guard, **{name: "x"})[0] == 0
