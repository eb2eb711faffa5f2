"""A suite, a minimal epsilon and self-checks, from the scenario to the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from workplace import SAMPLES, Workplace, cells, ledger

ATTACKS = """\
attacks:
  - noise
  - {type: suite, members: [noise, fgsm, pgd], steps: 3}
  - {type: minimal, attack: pgd, goal: compressed, steps: 6, epsilons: [64/255]}
epsilons: [16/255, 32/255]
"""


@pytest.fixture(scope="module")
def finished(
    model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Workplace:
    place = Workplace.build(tmp_path_factory.mktemp("suite"), model_folder, data_folder)
    text = place.scenario.read_text()
    start, end = text.index("attacks:"), text.index("gates:")
    place.scenario.write_text(text[:start] + ATTACKS + text[end:])
    done = place.redteam("run", "scenario.yaml", "--out", "run", "--json")
    assert done.returncode in (0, 1, 4), done.stderr
    (place.folder / "out.json").write_text(done.stdout)
    return place


def test_trials_say_what_made_them(finished: Workplace) -> None:
    run = finished.folder / "run"
    attack = {cell["id"]: cell for cell in cells(run)}
    makers: dict[str, set[str]] = {}
    for trial in ledger(run):
        assert trial["error"] is None
        makers.setdefault(attack[trial["cell"]]["attack"], set()).add(trial["made_by"])
    assert makers["noise"] == {""}
    assert makers["suite"] <= {"noise", "fgsm", "pgd", "clean"}
    assert makers["minimal"] <= {"pgd", "clean"}
    assert makers["suite"] - {"clean"}


def test_declared_and_used_stand_side_by_side(finished: Workplace) -> None:
    for cell in cells(finished.folder / "run"):
        declared, used = cell["declared"], cell["effort"]
        assert used["backwards"] <= declared["steps"]
        assert used["queries"] <= declared["queries"]
        if cell["attack"] == "suite":
            assert declared["steps"] == 0 + 1 + 3
            assert sum(cell["made_by"].values()) == SAMPLES
        if cell["attack"] == "noise":
            assert declared == {"steps": 0, "queries": 0}


def test_what_an_attack_judged_is_what_the_run_measures(finished: Workplace) -> None:
    """A minimal epsilon below the budget says: broken when compressed. The trial agrees."""
    run = finished.folder / "run"
    minimal = {cell["id"] for cell in cells(run) if cell["attack"] == "minimal"}
    seen = 0
    for trial in ledger(run):
        level = round(255 * trial["distance"]["linf"])
        right = {name: one["correct"] for name, one in trial["answers"].items()}
        if trial["cell"] in minimal and 0 < level < 64:
            assert right["clean_compressed"]
            assert not right["attacked_compressed"]
            seen += 1
        if trial["made_by"] == "clean":
            assert level == 0
            assert not (right["clean_full"] and right["clean_compressed"])
    assert seen, "nothing broke below the budget, so nothing was tested"


def test_a_run_that_repeats_says_nothing(finished: Workplace) -> None:
    for trial in ledger(finished.folder / "run"):
        assert not [check for check in trial["checks"] if check.startswith("not-repeatable")]


FICKLE = '''
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

from redteam import Attack, Knowledge

CALLS = count()


@dataclass(frozen=True, kw_only=True)
class Fickle(Attack):
    """Forgets its seed."""

    name: ClassVar[str] = "fickle"
    knowledge: ClassVar[Knowledge] = Knowledge.ENCODER

    def propose(self, view, batch, budget, rng):
        return batch.images + (1 + next(CALLS) % 2) / 255
'''


@pytest.mark.parametrize(("repeat", "fires"), [(2, True), (0, False)])
def test_a_result_that_changes_keeps_a_gate_from_passing(
    repeat: int, fires: bool, workplace: Workplace
) -> None:
    workplace.plugin("fickle_attack", FICKLE, attacks="fickle = fickle_attack:Fickle")
    text = workplace.scenario.read_text()
    start, end = text.index("attacks:"), text.index("engine:")
    text = text[:start] + "attacks: [fickle]\nepsilons: [32/255]\n" + text[end:]
    # No noise is beside it, which this gate, for at least so many failures, does not mind.
    text += f"gates: [{{metric: csfr, min: 0}}]\nchecks: {{repeat: {repeat}}}\n"
    workplace.scenario.write_text(text)
    done = workplace.redteam("run", "scenario.yaml", "--out", "run", "--json")
    out = json.loads(done.stdout)
    marked = {
        trial["sample"]
        for trial in ledger(workplace.folder / "run")
        if any(check.startswith("not-repeatable: a second run") for check in trial["checks"])
    }
    assert len(marked) == repeat
    found = [check["code"] for check in out["summary"]["checks"]]
    assert found == [*(["not-repeatable"] if fires else []), "no-control"]
    assert (out["verdict"], done.returncode) == (("inconclusive", 4) if fires else ("pass", 0))
    if fires:
        assert "self-check 'not-repeatable'" in out["why"]
        assert any("deterministic kernels" in note for note in out["notes"])
        page = (workplace.folder / "run" / "report.html").read_text()
        assert "deterministic kernels" in page
        assert "not-repeatable" in (workplace.folder / "run" / "summary.md").read_text()
