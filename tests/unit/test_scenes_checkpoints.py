"""The shipped checkpoints: real LLaVA folders that survive compression and can be broken."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from attacks.caa import CAA
from attacks.noise import Noise
from targets.base import Batch
from targets.compression.base import Compressor
from targets.compression.fastv import FastV
from targets.compression.random import Random
from targets.compression.visionzip import VisionZip
from targets.errors import TargetError
from targets.lvlm import LVLM
from targets.scenes import WEIGHTS, checkpoints, evaluate, load_scenes, packing, passes, world


@pytest.fixture(scope="module")
def scenes_a() -> LVLM:
    return load_scenes("scenes-a")


def _batch(split: world.Split, count: int, start: int = 0) -> Batch:
    samples = world.samples(split, count, start=start)
    images = torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2) / 255
    return Batch(
        tuple(s.id for s in samples),
        images,
        tuple(s.question for s in samples),
        tuple(s.answer for s in samples),
    )


def test_all_checkpoints_are_shipped_and_small() -> None:
    assert checkpoints() == ("scenes-a", "scenes-b", "scenes-c")
    for name in checkpoints():
        assert (WEIGHTS / name / "model.safetensors").stat().st_size < 8_000_000
        card = (WEIGHTS / name / "README.md").read_text()
        assert "What was done to make attention informative" in card


def test_they_differ_in_shape_and_seed() -> None:
    recipes = [json.loads((WEIGHTS / n / "recipe.json").read_text()) for n in checkpoints()]
    for key in ("width", "heads", "vision_layers", "text_layers", "mlp"):
        assert len({recipe["shape"][key] for recipe in recipes}) == len(recipes), key
    assert len({recipe["seed"] for recipe in recipes}) == len(recipes)


def test_an_unknown_checkpoint_names_those_there_are() -> None:
    with pytest.raises(TargetError, match="scenes-a, scenes-b, scenes-c"):
        load_scenes("scenes-z")


def test_a_stage_that_was_stopped_is_told() -> None:
    for name in checkpoints():
        recipe = json.loads((WEIGHTS / name / "recipe.json").read_text())
        log = (WEIGHTS / name / "training_log.jsonl").read_text().splitlines()
        steps = [one["step"] for one in map(json.loads, log) if one["stage"] == "joint"]
        assert max(steps) == recipe["joint_steps"]
        card = (WEIGHTS / name / "README.md").read_text()
        assert ("were planned" in card) == ("joint_planned" in recipe)


@pytest.mark.parametrize("name", ["scenes-a", "scenes-b", "scenes-c"])
def test_the_card_reports_what_the_evaluation_measured(name: str) -> None:
    result = json.loads((WEIGHTS / name / "evaluation.json").read_text())
    card = (WEIGHTS / name / "README.md").read_text()
    assert result["questions"] >= 1000
    assert result["split"] == "test"
    for setting, accuracy in result["accuracy"].items():
        assert f"| {setting} | **{accuracy:.3f}** |" in card
    for row in result["acceptance"]:
        assert row["what"] in card


@pytest.mark.parametrize("name", ["scenes-a", "scenes-b", "scenes-c"])
def test_a_checkpoint_answers_and_survives_compression(name: str) -> None:
    target = load_scenes(name)
    samples = world.samples("validation", 100, start=500)

    def accuracy(compressor: Compressor | None) -> float:
        return evaluate.measure(target, samples, compressor).accuracy

    assert accuracy(None) >= 0.9
    assert accuracy(FastV(layer=2, retention=0.25)) >= 0.85
    assert accuracy(VisionZip(retention=0.25)) >= 0.85
    assert accuracy(Random(retention=0.25)) <= 0.8


def test_the_training_pass_with_merged_tokens_is_visionzip(scenes_a: LVLM) -> None:
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(
        WEIGHTS / "scenes-a", dtype=torch.float32
    ).eval()
    packed = packing.pack("validation", 3, 1)
    one = world.scene("validation", 3)
    with torch.no_grad():
        seen = passes.see(model, packed.images)
        options = passes.Options(36, "merged")
        reading = passes.read(model, seen, packed, options, 2, torch.Generator())
    view = scenes_a.view("white_box", VisionZip(keep_tokens=36))  # type: ignore[arg-type]
    for i, question in enumerate(one.questions):
        logprobs, real = view.answer_logprobs(  # type: ignore[attr-defined]
            packed.images / 255, (question.text,), (question.answer,), path="compressed"
        )
        inside = (packed.block[0] == i) & (packed.targets[0] != packing.IGNORE)
        expected = reading.logits[0, inside].log_softmax(-1)
        torch.testing.assert_close(logprobs[0][real[0]], expected, atol=1e-3, rtol=1e-3)


def test_caa_breaks_only_the_compressed_path_and_noise_does_not(scenes_a: LVLM) -> None:
    batch = _batch("validation", 16, start=900)
    compressor = VisionZip(retention=0.25)
    seeds = list(range(16))

    def right(images: torch.Tensor, through: Compressor | None) -> torch.Tensor:
        answered = scenes_a.answer(images, batch.questions, compressor=through)
        return torch.tensor([a == b for a, b in zip(answered.texts, batch.answers, strict=True)])

    eligible = right(batch.images, None) & right(batch.images, compressor)
    attack = CAA(
        preset="strict_preserve",
        ranking="score_gap",
        intra="none",
        erase_weight=0,
        query_weight=0,
        steps=20,
    )
    attacked = attack(scenes_a.view(attack.needs, compressor), batch, 8 / 255, seeds).images
    noisy = Noise()(scenes_a.view(Noise().needs), batch, 8 / 255, seeds).images

    def failures(images: torch.Tensor) -> int:
        return int((eligible & right(images, None) & ~right(images, compressor)).sum())

    assert int(eligible.sum()) >= 14
    assert failures(attacked) >= 4
    assert failures(noisy) <= 1
