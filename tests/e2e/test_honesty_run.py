"""A masked gradient is caught by a real run of the scenes LVLM, and its honest twin is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from workplace import Workplace

TOYS = '''
"""One defence twice: it shows fewer colours. One of the two lies about its gradient."""

from dataclasses import dataclass
from typing import ClassVar

from redteam import AdaptiveRoute, InputDefense

LEVELS = 63


@dataclass(frozen=True, kw_only=True)
class Masked(InputDefense):
    """Rounds colours, whose gradient is zero, and claims that it has one."""

    name: ClassVar[str] = "masked"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.DIFFERENTIABLE

    def transform(self, images, generators):
        return (images * LEVELS).round() / LEVELS


@dataclass(frozen=True, kw_only=True)
class Honest(InputDefense):
    """Rounds colours, and says that an attack has to go around the rounding."""

    name: ClassVar[str] = "honest"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.BPDA

    def transform(self, images, generators):
        return (images * LEVELS).round() / LEVELS
'''
SCENARIO = """\
name: masked
seed: 3
targets: [{type: scenes, checkpoint: scenes-a}]
dataset: {type: scenes, split: test, samples: 4}
compressions: [{type: fastv, layer: 2, retention: 0.25}]
attacks:
  - {type: noise}
  - {type: pgd, path: compressed, steps: 20, random_start: false}
  - {type: pgd, path: compressed, steps: 20, random_start: false, adaptive: true}
epsilons: [16/255, 192/255]
defenses: [none, {type: masked}, {type: honest}]
gates:
  - {metric: compressed_asr, max: 1.0, where: {attack: pgd adaptive, defense: masked}}
checks: {repeat: 0}
engine: {type: local, batch_size: 4, device: cpu}
"""


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = Workplace(tmp_path_factory.mktemp("masked"))
    place.scenario.write_text(SCENARIO)
    place.plugin("toys", TOYS, defenses="masked = toys:Masked\nhonest = toys:Honest")
    done = place.redteam("run", "scenario.yaml", "--out", "run", "--json")
    assert done.returncode in (0, 1, 4), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def rules(finished: dict[str, Any], defense: str) -> dict[int, dict[str, Any]]:
    (one,) = [d for d in finished["summary"]["defenses"] if d["defense"] == defense]
    (place,) = one["places"]
    return {rule["rule"]: rule for rule in place["rules"] if rule["level"] == "MUST"}


def asr(finished: dict[str, Any], defense: str) -> float:
    """Attack success of the adaptive attack at the large budget."""
    (value,) = [
        cell["metrics"]["compressed_asr"]["value"]
        for cell in finished["summary"]["cells"]
        if (cell["attack"], cell["defense"]) == ("pgd adaptive", defense)
        if cell["epsilon"] > 0.5
    ]
    return float(value)


def failed(finished: dict[str, Any], defense: str) -> set[int]:
    return {n for n, rule in rules(finished, defense).items() if rule["state"] == "failed"}


def test_a_masked_gradient_is_caught(finished: dict[str, Any]) -> None:
    masked, honest = failed(finished, "masked"), failed(finished, "honest")
    # What four samples, two budgets and no attack by queries leave open, in both.
    assert honest - {11} == {5, 9, 12, 14, 20}
    assert masked == honest | {6, 7, 11, 13}
    assert asr(finished, "masked") < asr(finished, "honest")
    zero = rules(finished, "masked")[6]
    assert "zero-gradient" in zero["message"]
    assert "BPDA" in zero["remedy"]


def test_both_sides_recorded_what_they_used(finished: dict[str, Any]) -> None:
    for defense in ("masked", "honest"):
        assert rules(finished, defense)[2]["state"] == "passed"


def test_a_gate_does_not_pass_on_it(finished: dict[str, Any]) -> None:
    (gate,) = finished["summary"]["gates"]
    assert gate["verdict"] == "inconclusive"
    assert all("masked (unverified)" in cell["label"] for cell in gate["cells"])
    assert all(cell["doubt"] for cell in gate["cells"])
    assert any("masked is UNVERIFIED" in note for note in finished["notes"])
