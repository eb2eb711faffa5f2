"""A second run takes the images of the first, and only where everything that made them is equal."""

from __future__ import annotations

from pathlib import Path

import pytest
from workplace import SAMPLES, Workplace, ledger

from attacks.base import Attack
from redteam.cache import NOTE


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
    "changed", [("--no-cache",), ("--seed", "4"), ("--set", "attacks.caa.steps=3")]
)
def test_what_is_not_the_same_is_made(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, changed: tuple[str, ...]
) -> None:
    broken(monkeypatch)
    place.redteam("run", "scenario.yaml", "--out", "second", *changed)
    failed = [t for t in ledger(place.folder / "second") if t["error"]]
    assert failed
    assert {t["error"]["message"] for t in failed} == {"an attack was run"}


def test_the_images_equal_those_of_a_run_without_it(place: Workplace) -> None:
    place.redteam("run", "scenario.yaml", "--out", "second")
    place.redteam("run", "scenario.yaml", "--out", "third", "--no-cache")
    assert images(place, "first") == images(place, "second") == images(place, "third")
