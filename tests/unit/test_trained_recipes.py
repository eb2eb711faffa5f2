"""The recipes of trained compressors: their readings, and runs of a few steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from targets.compression import Explainability, QueCC, TokenFLEX, compress, trained
from targets.scenes import packing, passes, world
from targets.scenes.compressors import (
    questions,
    train_explainability,
    train_quecc,
    train_tokenflex,
    training,
)
from targets.scenes.compressors.card import write_card


@pytest.fixture(scope="module")
def model() -> Any:
    return questions.frozen("scenes-a")


@pytest.fixture(scope="module")
def asked() -> questions.Questions:
    return questions.draw("validation", 0, 5)


def projected(model: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        tokens: Tensor = model.model.multi_modal_projector(questions.tower(model, images)[-1])
    return tokens


def test_a_question_is_read_as_the_model_reads_it(model: Any, asked: Any) -> None:
    tokens = projected(model, asked.images)[asked.scene]
    with torch.no_grad():
        found = questions.read(model, tokens, asked)
        assert bool(questions.correct(found.logits, asked.targets).all())
        for row in range(len(asked)):
            words = [int(word) for word in asked.words[row] if word > 0]
            reply = [int(word) for word in asked.targets[row] if word != packing.IGNORE]
            ids = torch.tensor([[1, *[4] * 144, *words, *reply[:-1]]])
            pixels = passes.pixels(asked.images[asked.scene[row]][None])
            truth = model(input_ids=ids, pixel_values=pixels).logits[0, -len(reply) :]
            assert torch.allclose(found.logits[row, : len(reply)], truth, rtol=0, atol=1e-4)


def test_packed_questions_are_read_as_single_ones(model: Any, asked: Any) -> None:
    """With fewer tokens than training ever packs, too."""
    packed = packing.pack("validation", 0, 5)
    tokens = projected(model, asked.images)[:, 20:56]
    with torch.no_grad():
        one_by_one = questions.read(model, tokens[asked.scene], asked).logits
        together = questions.read_packed(model, tokens, packed)
    row = 0
    for scene in range(5):
        for question in range(int((packed.asks[scene] >= 0).sum())):
            start = int(packed.asks[scene, question])
            length = int((asked.targets[row] != packing.IGNORE).sum())
            ours = together[scene, start : start + length]
            assert torch.allclose(ours, one_by_one[row, :length], rtol=0, atol=1e-4)
            row += 1
    assert row == len(asked)


def test_some_questions_keep_their_pictures(asked: Any) -> None:
    rows = torch.tensor([len(asked) - 1, 2, 7])
    some = asked.some(rows)
    assert torch.equal(some.words, asked.words[rows])
    assert torch.equal(some.images[some.scene], asked.images[asked.scene[rows]])
    scenes = torch.tensor([3, 1])
    part = asked.of_scenes(scenes)
    assert len(part) == int(torch.isin(asked.scene, scenes).sum())
    both = asked.images[scenes]
    assert torch.equal(part.images, both)
    for row in range(len(part)):
        same = (asked.words == part.words[row]).all(1) & (asked.scene == scenes[part.scene[row]])
        assert bool(same.any())


def test_noise_is_bounded_and_seeded(asked: Any) -> None:
    plain = asked.images.float() / 255
    apart = []
    for seed in range(6):
        one, two = (
            questions.noisy(asked.images, 0.05, torch.Generator().manual_seed(seed))
            for _ in range(2)
        )
        assert torch.equal(one, two)
        apart.append(float((one - plain).abs().max()))
    assert 0 < max(apart) <= 0.05 + 1e-6
    assert min(apart) == 0  # half of the batches


SHORT = training.Optimisation(seed=3, steps=3, batch=4, lr=1e-3)
RECIPES: dict[str, tuple[Any, Any, Any]] = {
    "explainability": (
        train_explainability,
        train_explainability.Recipe(
            scenes=3, validation=2, keep=(16,), channels=(2, 4), kernel=3, how=SHORT
        ),
        Explainability,
    ),
    "quecc": (
        train_quecc,
        train_quecc.Recipe(scenes=6, validation=2, strides=(6, 12), chances=(0.5, 0.5), how=SHORT),
        QueCC,
    ),
    "tokenflex": (
        train_tokenflex,
        train_tokenflex.Recipe(
            scenes=6, validation=2, checked=(2,), hidden=16, align=SHORT, how=SHORT
        ),
        TokenFLEX,
    ),
}


def run(name: str, out: Path, recipe: Any = None) -> dict[str, Tensor]:
    module, usual, _ = RECIPES[name]
    more = (out / "labels",) if name == "explainability" else ()
    module.train(recipe or usual, "scenes-a", out, *more)
    return trained.read(name, str(out)).tensors


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_short_run_writes_weights_that_work(name: str, tmp_path: Path, model: Any) -> None:
    run(name, tmp_path)
    recipe = json.loads((tmp_path / training.RECIPE).read_text())
    assert recipe["how"]["seed"] == 3
    lines = (tmp_path / training.LOG).read_text().splitlines()
    assert any("validation" in json.loads(line) for line in lines)
    method = RECIPES[name][2](keep_tokens=4, weights=str(tmp_path))
    ids = torch.tensor([[1, *[4] * 144, 5, 6, 7]])
    pixels = passes.pixels(questions.draw("validation", 0, 1).images)
    with torch.no_grad(), compress(model, method) as session:
        model(input_ids=ids, pixel_values=pixels)
    assert session.trace.tokens[0].tolist() == [4]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_seed_decides_the_result(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    one = run(name, tmp_path / "one")
    torch.manual_seed(2)
    two = run(name, tmp_path / "two")
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    how = replace(SHORT, seed=4)
    other = run(name, tmp_path / "other", replace(RECIPES[name][1], how=how))
    assert any(not torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_no_recipe_looks_at_the_test_split(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, scene = set(), world.scene

    def watched(split: world.Split, index: int) -> world.Scene:
        drawn.add(split)
        return scene(split, index)

    monkeypatch.setattr(world, "scene", watched)
    run(name, tmp_path)
    assert drawn == {"train", "validation"}


def test_labels_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("explainability", tmp_path / "one")
    shelf = tmp_path / "one" / "labels"
    assert sorted(path.name for path in shelf.iterdir()) == [
        "labels_train.safetensors",
        "labels_validation.safetensors",
    ]

    def never(*_: object) -> None:
        raise AssertionError("labelled again")

    monkeypatch.setattr(train_explainability, "label_scenes", never)
    module, recipe, _ = RECIPES["explainability"]
    module.train(recipe, "scenes-a", tmp_path / "two", shelf)
    second = trained.read("explainability", str(tmp_path / "two")).tensors
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_card_says_what_was_measured(tmp_path: Path) -> None:
    run("tokenflex", tmp_path)
    counts = {"exists": [3, 4], "count": [1, 2]}
    result = {
        "checkpoint": "scenes-a",
        "questions": 6,
        "images": 2,
        "split": "test",
        "accuracy": {"full tokens": 0.6667, "16 tokens": 0.5},
        "by_kind": {"full tokens": counts, "16 tokens": {"exists": [2, 4], "count": [1, 2]}},
    }
    (tmp_path / training.EVALUATION).write_text(json.dumps(result))
    text = write_card(tmp_path).read_text()
    assert "| full tokens | **0.667** | 0.750 | 0.500 |" in text
    assert "| 16 tokens | **0.500** | 0.500 | 0.500 |" in text
    assert "6 questions on 2 pictures" in text
    assert "(3)" in text  # the seed


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_shipped_card_is_that_of_the_shipped_weights(name: str, tmp_path: Path) -> None:
    folder = trained.folder_of(name, "scenes-a")
    module = RECIPES[name][0]
    recipe = json.loads((folder / training.RECIPE).read_text())
    assert recipe == json.loads(json.dumps(training.plain(module.Recipe())))
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert write_card(tmp_path).read_text() == (folder / "README.md").read_text()
