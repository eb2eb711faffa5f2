"""Lists of stages in a scenario."""

from __future__ import annotations

from pathlib import Path

import pytest

from redteam.errors import ScenarioError
from redteam.scenario import load_scenario
from targets.compression import FastV, VisionZip
from targets.compression.pipeline import Pipeline

HEAD = """\
name: composed
targets: [{type: scenes}]
dataset: {type: scenes, samples: 2}
attacks: [{type: noise, epsilons: [8/255]}]
compressions:
"""


def written(folder: Path, compressions: str) -> Path:
    path = folder / "composed.yaml"
    path.write_text(HEAD + compressions)
    return path


def test_stages_become_one_compressor(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "  - stages: [{type: visionzip, retention: 0.5}, {type: fastv, keep_tokens: 9}]\n"
        "  - {name: mine, stages: [{type: fastv, keep_tokens: 9}]}\n",
    )
    first, second = load_scenario(path).compressions
    assert (first.label, second.label) == ("visionzip 50% + fastv K=2 9 tokens", "mine")
    assert first.create() == Pipeline(stages=(VisionZip(retention=0.5), FastV(keep_tokens=9)))
    assert first.spec["stages"][1]["layer"] == 2  # defaults are part of what ids are made of
    assert first.spec != second.spec


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{stages: []}", "a list of compressors"),
        ("{stages: fastv}", "a list of compressors"),
        ("{stages: [{type: fastw, retention: 0.5}]}", "fastv"),
        ("{stages: [{type: fastv}]}", "exactly one of retention"),
        ("{stages: [{type: fastv, retention: 2}]}", "stages"),
        ("{stages: [{stages: [{type: fastv, retention: 0.5}]}]}", "stages inside stages"),
        ("{retention: 0.5, stages: [{type: fastv, retention: 0.5}]}", "at each stage"),
    ],
)
def test_what_is_wrong_inside_is_found(tmp_path: Path, entry: str, message: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        load_scenario(written(tmp_path, f"  - {entry}\n"))
    assert message in str(caught.value)
    assert ":6:" in str(caught.value)


def test_the_order_is_checked_when_made(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "  - stages: [{type: fastv, keep_tokens: 9}, {type: visionzip, retention: 0.5}]\n",
    )
    with pytest.raises(ScenarioError, match="order they act"):
        load_scenario(path).compressions[0].create()
