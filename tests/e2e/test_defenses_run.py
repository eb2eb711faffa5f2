"""Defences and attacks that know them, through the command line, on the tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from workplace import SAMPLES, Workplace, cells, ledger

DEFENSES = "[none, translation_consensus, {type: random_floor, rho: 0.5}, resize_pad, oracle]"


@pytest.fixture(scope="module")
def finished(
    model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Workplace:
    place = Workplace.build(tmp_path_factory.mktemp("defended"), model_folder, data_folder)
    place.edit("  - {type: fastv, layer: 2, retention: 0.25}\n", "")
    place.edit("  - {type: noise}\n  - {type: pgd, steps: 3, epsilons: [32/255]}\n", "")
    place.edit(
        "  - {type: caa, steps: 4}\n",
        "  - {type: caa, steps: 3}\n  - {type: caa, steps: 3, adaptive: true, draws: 2}\n",
    )
    place.edit("where: {attack: noise}", "where: {attack: caa}")
    place.edit("gates:", f"defenses: {DEFENSES}\ngates:")
    done = place.redteam("run", "scenario.yaml", "--out", "run", "--json")
    assert done.returncode in (0, 1, 4), done.stderr
    (place.folder / "out.json").write_text(done.stdout)
    return place


def by_cell(place: Workplace) -> dict[tuple[str, str], dict[str, dict[str, object]]]:
    run = place.folder / "run"
    names = {cell["id"]: (cell["attack"], cell["defense"]) for cell in cells(run)}
    found: dict[tuple[str, str], dict[str, dict[str, object]]] = {}
    for trial in ledger(run):
        assert trial["error"] is None, trial["error"]
        found.setdefault(names[trial["cell"]], {})[trial["sample"]] = trial
    return found


def test_every_cell_that_has_a_meaning_is_there(finished: Workplace) -> None:
    trials = by_cell(finished)
    defended = {"none", "translation_consensus", "random_floor", "resize_pad"}
    assert set(trials) == {("caa", one) for one in (*defended, "oracle (unverified)")} | {
        ("caa adaptive", one) for one in defended
    }
    assert all(len(rows) == SAMPLES for rows in trials.values())
    notes = json.loads((finished.folder / "out.json").read_text())["notes"]
    assert any("oracle is UNVERIFIED (upper bound)" in n and "no route" in n for n in notes)
    assert any("translation_consensus is UNVERIFIED (upper bound)" in n for n in notes)
    assert any("caa adaptive is not run against oracle" in n for n in notes)


def test_the_attack_went_through_what_is_deployed(finished: Workplace) -> None:
    """By hashes of both sides, on every sample; who does not know the defence has none."""
    hashes = {}
    for (attack, defense), rows in by_cell(finished).items():
        found = {json.dumps(trial["pipelines"]) for trial in rows.values()}
        assert len(found) == 1
        hashes[attack, defense] = json.loads(found.pop())
    defended = ("translation_consensus", "random_floor", "resize_pad")
    for defense in defended:
        plain, knowing = hashes["caa", defense], hashes["caa adaptive", defense]
        assert plain["deployed"] == knowing["deployed"] == knowing["attacked"] != ""
        assert plain["attacked"] == ""
    assert len({hashes["caa", one]["deployed"] for one in (*defended, "oracle (unverified)")}) == 4
    assert hashes["caa", "none"] is None
    assert hashes["caa adaptive", "none"] is None


def test_one_image_serves_all_defences_unless_the_attack_knows_them(finished: Workplace) -> None:
    trials = by_cell(finished)

    def images(attack: str, defense: str) -> list[object]:
        return [trial["attacked_png"] for trial in trials[attack, defense].values()]

    plain = images("caa", "none")
    for defense in ("translation_consensus", "random_floor", "resize_pad"):
        assert images("caa", defense) == plain
        own = images("caa adaptive", defense)
        assert own != plain
        assert own != images("caa adaptive", "none")


def test_effort_counts_every_pass_through_the_defence(finished: Workplace) -> None:
    trials = by_cell(finished)
    taken = {}
    for (attack, defense), rows in trials.items():
        efforts = [trial["effort"] for trial in rows.values()]
        taken[attack, defense] = {effort["backwards"] for effort in efforts}  # type: ignore[index]
    assert taken["caa", "translation_consensus"] == taken["caa adaptive", "none"] == {3}
    assert taken["caa adaptive", "translation_consensus"] == {3 * 4}
    assert taken["caa adaptive", "random_floor"] == {3 * 2}
    assert taken["caa adaptive", "resize_pad"] == {3 * 2}


def test_selection_defences_change_the_kept_set_and_not_its_size(finished: Workplace) -> None:
    trials = by_cell(finished)
    for sample, undefended in trials["caa", "none"].items():
        clean = undefended["tokens"]["kept_clean"]  # type: ignore[index]
        for defense in ("translation_consensus", "random_floor"):
            tokens = trials["caa", defense][sample]["tokens"]
            assert len(tokens["kept_clean"]) == len(clean)  # type: ignore[index]
            assert len(tokens["kept_attacked"]) == len(clean)  # type: ignore[index]
        oracle = trials["caa", "oracle (unverified)"][sample]["tokens"]
        assert oracle["kept_attacked"] == oracle["kept_clean"] == clean  # type: ignore[index]


def test_the_full_path_knows_nothing_of_the_selection(finished: Workplace) -> None:
    trials = by_cell(finished)
    for sample, undefended in trials["caa", "none"].items():
        for defense in ("translation_consensus", "random_floor", "oracle (unverified)"):
            for path in ("clean_full", "attacked_full"):
                defended = trials["caa", defense][sample]["answers"]
                assert defended[path] == undefended["answers"][path]  # type: ignore[index]


def test_what_does_not_go_together_costs_nothing(finished: Workplace) -> None:
    done = finished.redteam(
        "run",
        "scenario.yaml",
        "--out",
        "other",
        "--set",
        "compressions=[{type: divprune, retention: 0.25}]",
    )
    assert done.returncode == 2
    assert "'translation_consensus' does not go with compression 'divprune 25%'" in done.stderr
    assert not (finished.folder / "other").exists()
