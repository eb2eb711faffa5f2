"""An attack on a border never runs without noise on the same border beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from redteam.plan import make_plan
from redteam.scenario import Scenario, load_scenario

TEXT = """\
name: controls
targets: [{{type: scenes, checkpoint: scenes-a}}]
surrogates: [{{type: scenes, checkpoint: scenes-b}}]
dataset: {{type: scenes, samples: 4}}
compressions: [{{type: fastv, retention: 0.25}}]
attacks:
{attacks}
epsilons: [16/255, 32/255]
"""

Load = Callable[..., Scenario]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def loader(*attacks: str) -> Scenario:
        path = tmp_path / "controls.yaml"
        path.write_text(TEXT.format(attacks="\n".join(f"  - {{{one}}}" for one in attacks)))
        return load_scenario(path)

    return loader


def labels(scenario: Scenario) -> list[str]:
    return [attack.label for attack in scenario.attacks]


def test_the_control_is_added_with_the_same_border_and_budgets(load: Load) -> None:
    scenario = load("type: transfer_caa, border: 0.1, frame: added")
    assert labels(scenario) == ["transfer_caa", "added-border noise (control)"]
    attack, control = scenario.attacks
    assert control.type == "noise"
    assert control.epsilons == attack.epsilons == (16 / 255, 32 / 255)
    shown = {name: control.options[name] for name in ("border", "frame", "norm", "distribution")}
    assert shown == {"border": 0.1, "frame": "added", "norm": "linf", "distribution": "sign"}
    cells = make_plan(scenario).cells
    assert {(cell.attack, cell.epsilon) for cell in cells if cell.knowledge == "none"} == {
        ("added-border noise (control)", 16 / 255),
        ("added-border noise (control)", 32 / 255),
    }
    assert scenario.resolved()["attacks"][1]["name"] == "added-border noise (control)"
    control.create()


def test_a_listed_control_is_enough(load: Load) -> None:
    listed = "type: noise, border: 0.125"
    assert labels(load("type: transfer_caa", listed)) == ["transfer_caa", "noise"]


@pytest.mark.parametrize(
    "other",
    [
        "type: noise",
        "type: noise, border: 0.25",
        "type: noise, border: 0.125, frame: added",
        "type: noise, border: 0.125, norm: l2",
    ],
)
def test_noise_elsewhere_is_no_control(load: Load, other: str) -> None:
    scenario = load("type: transfer_caa", other)
    assert labels(scenario) == ["transfer_caa", "noise", "border noise (control)"]


def test_only_missing_budgets_are_added(load: Load) -> None:
    scenario = load(
        "type: transfer_caa", "type: noise, border: 0.125, epsilons: [32/255, 8/255], name: own"
    )
    assert labels(scenario) == ["transfer_caa", "own", "border noise (control)"]
    assert scenario.attacks[2].epsilons == (16 / 255,)


def test_one_control_serves_all_attacks_on_a_border(load: Load) -> None:
    scenario = load(
        "type: transfer_caa, name: one, epsilons: [8/255]",
        "type: transfer_caa, name: two, template: null",
        "type: transfer_caa, name: three, frame: added",
        "type: transfer_caa, name: four, border: 0.2",
    )
    assert {one.label: one.epsilons for one in scenario.attacks[4:]} == {
        "border noise (control)": (8 / 255, 16 / 255, 32 / 255),
        "added-border noise (control)": (16 / 255, 32 / 255),
        "border noise (control 2)": (16 / 255, 32 / 255),
    }
    assert scenario.attacks[6].options["border"] == 0.2


def test_a_name_that_is_taken_is_not_taken_twice(load: Load) -> None:
    scenario = load("type: transfer_caa, name: border noise (control)")
    assert labels(scenario) == ["border noise (control)", "border noise (control 2)"]


def test_other_attacks_get_none(load: Load) -> None:
    assert labels(load("type: pgd", "type: noise")) == ["pgd", "noise"]
