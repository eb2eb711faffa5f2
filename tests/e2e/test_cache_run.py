"""A second run takes the images of the first, and only where everything that made them is equal."""

from __future__ import annotations

from pathlib import Path

import pytest
from workplace import SAMPLES, Workplace, ledger

from attacks.base import Attack
from redteam.cache import NOTE
from reports.store import RunStore


@pytest.fixture
def place(workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    monkeypatch.setenv("REDTEAM_CACHE", str(tmp_path / "cache"))
    workplace.edit("gates:", "checks: {repeat: 0}\ngates:")
    assert workplace.redteam("run", "scenario.yaml", "--out", "first").returncode == 4
    return workplace


def images(place: Workplace, name: str) -> dict[tuple[str, str], tuple[str, tuple[float, ...]]]:
    return {
        (t["cell"], t["sample"]): (t["attacked_png"], tuple(t["loss"]))
        for t in ledger(place.folder / name)
    }


def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no attack can be run."""

    def refuse(*_: object) -> None:
        raise AssertionError("an attack was run")

    monkeypatch.setattr(Attack, "__call__", refuse)


def test_known_images_are_not_made_again(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    place.edit("  - {type: noise}\n", "")
    place.edit("where: {attack: noise}", "where: {attack: caa}")
    place.edit("gates:", "defenses: [none, {type: random_floor, rho: 0.5}]\ngates:")
    broken(monkeypatch)
    done = place.redteam("run", "scenario.yaml", "--out", "second")
    assert done.returncode in (0, 1, 4), done.stderr
    first = {one for one in images(place, "first").values() if one[1]}
    trials = ledger(place.folder / "second")
    assert len(trials) == 8 * SAMPLES
    for trial in trials:
        assert trial["error"] is None
        assert NOTE in trial["checks"]
        assert trial["effort"]["backwards"] > 0, "what it took then"
        assert (trial["attacked_png"], tuple(trial["loss"])) in first


@pytest.mark.parametrize(
    "changed",
    [
        ("--no-cache",),
        ("--seed", "4"),
        ("--set", "attacks.caa.steps=3"),
        ("--set", "engine.attack_precision=bfloat16"),
    ],
)
def test_what_is_not_the_same_is_made(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, changed: tuple[str, ...]
) -> None:
    broken(monkeypatch)
    place.redteam("run", "scenario.yaml", "--out", "second", *changed)
    failed = [t for t in ledger(place.folder / "second") if t["error"]]
    assert failed
    assert {t["error"]["message"] for t in failed} == {"an attack was run"}


REDUCED = ("--set", "engine.attack_precision=bfloat16")


def test_reduced_precision_makes_other_images_under_the_same_names(place: Workplace) -> None:
    """It decides which image is made, so the manifest has it and a resume refuses another."""
    place.redteam("run", "scenario.yaml", "--out", "second", *REDUCED)
    one, two = (RunStore.read(place.folder / name).manifest for name in ("first", "second"))
    assert two.provenance["identity"]["attack_precision"] == "bfloat16"
    assert "attack_precision" not in one.provenance["identity"]
    assert [cell.id for cell in one.cells] == [cell.id for cell in two.cells]
    seeds = [
        {(t["cell"], t["sample"]): t["seed"] for t in ledger(place.folder / name)}
        for name in ("first", "second")
    ]
    assert seeds[0] == seeds[1]
    plain, reduced = images(place, "first"), images(place, "second")
    assert plain != reduced
    for trial in ledger(place.folder / "second"):
        assert trial["error"] is None
    clean = [
        {(t["cell"], t["sample"]): t["answers"] for t in ledger(place.folder / name)}
        for name in ("first", "second")
    ]
    kept = [key for key in plain if plain[key][0] == reduced[key][0]]
    assert kept, "what takes no gradients is the same"
    assert all(clean[0][key] == clean[1][key] for key in kept), "answers are in its own precision"
    path = place.folder / "second" / "ledger.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))  # not complete
    again = place.redteam("run", "scenario.yaml", "--out", "second")
    assert again.returncode == 2
    assert "attack_precision" in again.stderr


def test_half_weights_cannot_be_judged_in_full_precision(place: Workplace) -> None:
    done = place.redteam(
        "run", "scenario.yaml", "--out", "third", *REDUCED, "--set", "targets.0.dtype=bfloat16"
    )
    assert done.returncode == 2
    assert "has bfloat16 weights" in done.stderr


def test_the_images_equal_those_of_a_run_without_it(place: Workplace) -> None:
    place.redteam("run", "scenario.yaml", "--out", "second")
    place.redteam("run", "scenario.yaml", "--out", "third", "--no-cache")
    assert images(place, "first") == images(place, "second") == images(place, "third")
