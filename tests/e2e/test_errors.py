"""An error is never a finding: what could not be measured is in no metric, and the rest goes on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import stub_place
import torch
from workplace import SAMPLES, Workplace, cells, ledger

RUN = ("run", "scenario.yaml", "--out", "run")


@pytest.fixture
def stub(tmp_path: Path) -> Workplace:
    return stub_place.build(tmp_path / "place")


def ask(place: Workplace, index: int, question: str) -> None:
    """Change the question of one sample."""
    path = place.folder / "data.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[index]["question"] = question
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def errors(place: Workplace) -> list[dict[str, Any]]:
    return [trial for trial in ledger(place.folder / "run") if trial["error"]]


@pytest.mark.parametrize(
    ("question", "kind"), [("raise", "ZeroDivisionError"), ("memory", "OutOfMemoryError")]
)
def test_one_sample_that_breaks_the_model_costs_itself_only(
    question: str, kind: str, stub: Workplace
) -> None:
    ask(stub, 1, question)
    done = stub.redteam(*RUN, "--json")
    assert done.returncode == 4, done.stderr
    assert {(one["sample"], one["error"]["type"]) for one in errors(stub)} == {("s1", kind)}
    for one in errors(stub):
        assert one["answers"] is None
        assert "Traceback" in one["error"]["traceback"]
        assert one["error"]["where"] == "clean, all tokens"
    found = json.loads(done.stdout)["summary"]
    assert found["progress"]["errors"] == stub_place.CELLS
    assert found["progress"]["measured"] == stub_place.CELLS * (stub_place.SAMPLES - 1)
    assert all(cell["n"] <= stub_place.SAMPLES - 1 for cell in found["cells"])


def test_too_many_errors_take_the_pass_away(stub: Workplace) -> None:
    stub.edit("metric: csfr, max: 0.5", "metric: csfr, max: 1")
    assert stub.redteam(*RUN).returncode == 0
    shutil.rmtree(stub.folder / "run")
    ask(stub, 1, "raise")
    done = stub.redteam(*RUN, "--json")
    assert done.returncode == 4
    gate = json.loads(done.stdout)["summary"]["gates"][0]
    assert "errors, more than the 5% a pass tolerates" in json.dumps(gate)


def test_errors_are_kept_until_they_are_to_be_retried(stub: Workplace) -> None:
    ask(stub, 1, "raise")
    stub.redteam(*RUN)
    before = ledger(stub.folder / "run")
    stub.redteam(*RUN)
    assert ledger(stub.folder / "run") == before, "an error does not vanish by itself"
    source = stub.folder / "plugins" / "stub_target.py"
    broken = source.read_text()
    try:
        _replant(source, broken.replace('"raise" in questions', '"never" in questions'))
        done = stub.redteam(*RUN, "--retry-errors", "--json")
        assert json.loads(done.stdout)["summary"]["progress"]["errors"] == 0
        after = ledger(stub.folder / "run")
        assert after[: len(before)] == before, "the record of the error stays"
        assert {one["sample"] for one in after[len(before) :]} == {"s1"}
        assert len(after) == len(before) + stub_place.CELLS
    finally:
        _replant(source, broken)


def _replant(source: Path, text: str) -> None:
    """Change a plugin as an upgrade does: for the next process, which this one stands for."""
    import sys

    source.write_text(text)
    sys.modules.pop("stub_target", None)


def test_a_stopped_run_with_errors_goes_on_where_it_stopped(stub: Workplace) -> None:
    ask(stub, 0, "raise")
    stub.redteam(*RUN)
    path = stub.folder / "run" / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]))
    stub.redteam(*RUN)
    assert path.read_bytes().count(b"\n") == len(lines), "errors are measured once"


def test_broken_weights_give_errors_and_no_answers(workplace: Workplace) -> None:
    """One embedding is NaN, as in a damaged checkpoint or after an overflow in float16."""
    from safetensors.torch import load_file, save_file

    from tests.conformance import tiny

    model = workplace.folder / "model"
    source = model.resolve()
    model.unlink()
    shutil.copytree(source, model)
    weights = load_file(model / "model.safetensors")
    name = next(key for key in weights if key.endswith("embed_tokens.weight"))
    with torch.no_grad():
        weights[name][tiny.WORDS.index("sign")] = math.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    ask(workplace, 2, "is there a green sign ?")
    workplace.edit("  - {type: caa, steps: 4}\n", "")
    done = workplace.redteam(*RUN, "--json")
    assert done.returncode in (1, 4), done.stderr
    found = {(one["sample"], one["error"]["type"]) for one in errors(workplace)}
    assert found == {("s2", "NonFiniteError"), ("s2", "AttackError")}
    assert len(errors(workplace)) == len(cells(workplace.folder / "run"))
    for trial in ledger(workplace.folder / "run"):
        assert (trial["answers"] is None) == (trial["sample"] == "s2")
    assert all(cell["n"] <= SAMPLES - 1 for cell in cells(workplace.folder / "run"))
