"""Subsets and filters: who is in, who is out, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redteam.batching import Batcher
from redteam.datasets.base import Sample
from redteam.datasets.filters import Filter, why_left_out, without
from redteam.datasets.scenes import Drawn, Scenes
from redteam.datasets.subset import choose
from redteam.engines import local
from redteam.engines.local import LocalEngine
from redteam.evaluation import Asker
from redteam.plan import make_plan
from redteam.scenario import Method, load_scenario
from redteam.screening import described, recorded, screen

IDS = [f"s{i}" for i in range(20)]
KINDS = ["a"] * 10 + ["b"] * 6 + ["c"] * 4


def test_all_and_the_first() -> None:
    assert choose(IDS, None, 0, KINDS) == list(range(20))
    assert choose(IDS, 20, 3, KINDS) == choose(IDS, 99, 3, KINDS) == list(range(20))
    assert choose(IDS, 3, None, KINDS) == [0, 1, 2]


@pytest.mark.parametrize(
    ("count", "shares"),
    [
        (10, {"a": 5, "b": 3, "c": 2}),
        (1, {"a": 1}),  # remainders .5 .3 .2
        (3, {"a": 1, "b": 1, "c": 1}),  # 1.5 .9 .6: the largest remainders are b and c
        (5, {"a": 3, "b": 1, "c": 1}),  # 2.5 1.5 1.0: a before b by name
    ],
)
def test_a_drawn_subset_is_stratified_and_in_order(count: int, shares: dict[str, int]) -> None:
    drawn = choose(IDS, count, 0, KINDS)
    assert drawn == sorted(drawn)
    assert Counter(KINDS[index] for index in drawn) == shares


def test_a_drawn_subset_depends_on_seed_and_ids_only() -> None:
    first = {IDS[index] for index in choose(IDS, 6, 0, KINDS)}
    assert {IDS[::-1][index] for index in choose(IDS[::-1], 6, 0, KINDS[::-1])} == first
    assert len({tuple(choose(IDS, 6, seed, KINDS)) for seed in range(8)}) > 4
    hits = Counter(index for seed in range(400) for index in choose(IDS, 10, seed, KINDS))
    assert min(hits.values()) > 140, "every sample has the same chance, here one half"
    assert max(hits.values()) < 260


def test_groups_stay_together() -> None:
    groups = [name for index in range(10) for name in [f"g{index}"] * 2]
    for count in (4, 5, 1):
        drawn = choose(IDS, count, 0, [""] * 20, groups)
        assert len(drawn) == count // 2 * 2
        assert all(number == 2 for number in Counter(groups[i] for i in drawn).values())
    assert choose(IDS, 5, None, [""] * 20, groups) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("rule", "clean", "black", "why"),
    [
        ("clean_right", True, None, ""),
        ("clean_right", True, True, ""),
        ("clean_right", False, None, "wrong at full tokens"),
        ("sighted", True, False, ""),
        ("sighted", True, True, "right on a black image"),
        ("sighted", False, None, "wrong at full tokens"),
        ("sighted", False, True, "wrong at full tokens"),
    ],
)
def test_rules(rule: Filter, clean: bool, black: bool | None, why: str) -> None:
    assert why_left_out(rule, clean, black) == why


def test_sighted_needs_the_black_image() -> None:
    with pytest.raises(ValueError, match="needs the answer on a black image"):
        why_left_out("sighted", True)


def test_without() -> None:
    samples = Scenes(samples=5).open()
    kept = without(samples, {samples.ids[0], samples.ids[3]})
    assert kept.ids == (samples.ids[1], samples.ids[2], samples.ids[4])
    assert [sample.id for sample in kept] == list(kept.ids)
    assert kept.identity == samples.identity
    assert len(kept) == 3


@pytest.fixture(scope="module")
def asker() -> Asker:
    from targets.scenes import load_scenes

    return Asker(load_scenes("scenes-a"), Batcher(16), seed=0, max_new_tokens=16)


@pytest.fixture(scope="module")
def samples() -> Drawn:
    """Drawn scenes, and a question whose fate is known by construction."""
    drawn = tuple(Scenes(samples=15).open())
    wrong = replace(drawn[0], id="wrong", answer="nonsense")
    return Drawn((*drawn, wrong))


def answers(asker: Asker, samples: Drawn, factor: int) -> dict[str, Any]:
    """Right or wrong, one by one, with the model itself and nothing of the code under test."""
    import torch

    from redteam.datasets.base import is_correct

    found = {}
    for sample in samples:
        image = torch.from_numpy(sample.image * np.uint8(factor)).permute(2, 0, 1)[None].float()
        text = asker.model.answer(image / 255, [sample.question]).texts[0]
        found[sample.id] = is_correct(text, sample)
    return found


@pytest.mark.parametrize("block", [4, 100])
def test_the_filters_on_drawn_scenes(asker: Asker, samples: Drawn, block: int) -> None:
    clean, black = answers(asker, samples, 1), answers(asker, samples, 0)
    wrong = {name for name, right in clean.items() if not right}
    blind = {name for name, right in clean.items() if right and black[name]}
    assert "wrong" in wrong
    assert blind, "some answers can be guessed"
    assert len(wrong | blind) < len(samples), "some cannot"
    found = screen(asker, samples, "clean_right", block)
    assert found == dict.fromkeys(wrong, "wrong at full tokens")
    found = screen(asker, samples, "sighted", block)
    assert found == dict.fromkeys(wrong, "wrong at full tokens") | dict.fromkeys(
        blind, "right on a black image"
    )


class Broken(Drawn):
    """Its second sample cannot be read."""

    def __getitem__(self, index: int) -> Sample:
        if index == 1:
            raise OSError("no such picture")
        return super().__getitem__(index)


def test_what_cannot_be_read_is_no_finding(asker: Asker) -> None:
    drawn = tuple(replace(one, answer="nonsense") for one in Scenes(samples=3).open())
    found = screen(asker, Broken(drawn), "sighted", 2)
    assert set(found) == {drawn[0].id, drawn[2].id}, "the second is left to the run"


def test_what_the_manifest_keeps() -> None:
    left_out = {"a": "right on a black image", "b": "wrong", "c": "right on a black image"}
    kept = described("sighted", 5, left_out)
    assert (kept["asked"], kept["kept"]) == (5, 2)
    assert kept["left_out"] == {"right on a black image": ["a", "c"], "wrong": ["b"]}
    assert recorded({"filter": kept}) == {"a", "b", "c"}
    assert recorded({}) == set()


TWO = """\
name: two
targets: [{type: scenes, checkpoint: scenes-a}, {type: scenes, checkpoint: scenes-b}]
dataset: {type: scenes, samples: 4, filter: clean_right}
compressions: [{type: uniform, retention: 0.5}]
attacks: [{type: noise}]
epsilons: [8/255]
engine: {device: cpu}
"""


def test_a_sample_stays_if_every_target_qualifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s.yaml").write_text(TWO)
    plan = make_plan(load_scenario(tmp_path / "s.yaml"))
    samples = plan.scenario.dataset.create().open()
    ids = samples.ids
    labels = [target.label for target in plan.scenario.targets]
    fates = {labels[0]: {ids[0]: "wrong"}, labels[1]: {ids[0]: "wrong", ids[2]: "wrong"}}
    opened: list[str] = []

    def opening(_: LocalEngine, target: Method) -> str:
        opened.append(target.label)
        return target.label

    monkeypatch.setattr(LocalEngine, "_open", opening)
    monkeypatch.setattr(local, "screen", lambda label, *_: fates[label])
    engine = LocalEngine(plan, samples, "cpu")
    assert engine.screen("clean_right") == {
        ids[0]: f"{labels[0]}: wrong",
        ids[2]: f"{labels[1]}: wrong",
    }
    assert engine._samples.ids == (ids[1], ids[3])
    assert opened == labels[::-1], "the first stays loaded"
