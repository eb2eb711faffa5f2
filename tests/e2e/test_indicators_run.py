"""A real run tells defences that an attack fails on for the wrong reason from an honest one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from workplace import Workplace

TOYS = '''
"""Three defences of the image: a smooth one, one whose loss jumps, one with two faces."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import avg_pool2d

from redteam import AdaptiveRoute, InputDefense


def blurred(images):
    return avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)


@dataclass(frozen=True, kw_only=True)
class Smooth(InputDefense):
    """Blurs a little."""

    name: ClassVar[str] = "smooth"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.DIFFERENTIABLE

    def transform(self, images, generators):
        return (0.7 * images + 0.3 * blurred(images)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Jagged(InputDefense):
    """Shows the negative of every other picture: one level more, and all is different."""

    name: ClassVar[str] = "jagged"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.DIFFERENTIABLE

    def transform(self, images, generators):
        odd = (images.detach() * 255).round().double().sum((1, 2, 3)) % 2
        odd = odd.to(images).view(-1, 1, 1, 1)
        return odd * (1 - images) + (1 - odd) * images


@dataclass(frozen=True, kw_only=True)
class TwoFaced(InputDefense):
    """Does nothing to whoever takes a gradient, and blurs what is deployed."""

    name: ClassVar[str] = "twofaced"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.DIFFERENTIABLE

    def transform(self, images, generators):
        return images if images.requires_grad else blurred(blurred(images))
'''
SCENARIO = """\
name: indicators
seed: 3
targets: [{type: scenes, checkpoint: scenes-a}]
dataset: {type: scenes, split: test, samples: 6}
compressions: [{type: visionzip, retention: 0.25}]
attacks:
  - {type: apgd, path: compressed, loss: margin, steps: 12, adaptive: true}
epsilons: [8/255]
defenses: [none, {type: smooth}, {type: jagged}, {type: twofaced}]
checks: {repeat: 0, stability: 2, points: 16}
engine: {type: local, batch_size: 34, device: cpu}
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = Workplace(tmp_path_factory.mktemp("indicators"))
    place.scenario.write_text(SCENARIO)
    names = {"smooth": "Smooth", "jagged": "Jagged", "twofaced": "TwoFaced"}
    lines = "\n".join(f"{name} = indicator_toys:{one}" for name, one in names.items())
    place.plugin("indicator_toys", TOYS, defenses=lines)
    done = place.redteam("run", "scenario.yaml", "--out", "run", "--json")
    assert done.returncode in (0, 1, 4), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    ledger = (place.folder / "run" / "ledger.jsonl").read_text().splitlines()
    found["trials"] = [json.loads(line)["trial"] for line in ledger]
    return found


def rule(finished: dict[str, Any], defense: str, number: int) -> dict[str, Any]:
    (one,) = [d for d in finished["summary"]["defenses"] if d["defense"] == defense]
    (found,) = [found for found in one["places"][0]["rules"] if found["rule"] == number]
    return dict(found)


@pytest.mark.parametrize(
    ("defense", "state"), [("smooth", "passed"), ("jagged", "failed"), ("twofaced", "passed")]
)
def test_a_jagged_loss_is_told_from_a_smooth_one(
    finished: dict[str, Any], defense: str, state: str
) -> None:
    found = rule(finished, defense, 7)
    assert found["state"] == state, found
    assert "2 samples" in found["message"]


def test_only_the_first_samples_were_looked_around(finished: dict[str, Any]) -> None:
    told = [trial["objective"]["unstable"] is not None for trial in finished["trials"]]
    assert sum(told) == 3 * 2, "of each defence two, of none nothing"


def test_every_image_is_the_best_of_its_way(finished: dict[str, Any]) -> None:
    for trial in finished["trials"]:
        assert trial["objective"]["kept"] == trial["objective"]["best"]
    for defense in ("smooth", "jagged", "twofaced"):
        assert rule(finished, defense, 8)["state"] == "passed"


@pytest.mark.parametrize(("defense", "state"), [("smooth", "passed"), ("twofaced", "failed")])
def test_success_on_what_is_not_deployed_is_none(
    finished: dict[str, Any], defense: str, state: str
) -> None:
    found = rule(finished, defense, 10)
    assert found["state"] == state, found
    assert " of 0 images" not in found["message"], "the attack believed in some"
