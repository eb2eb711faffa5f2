"""Training passes agree with the library's own model, and a short training run learns and saves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from targets.scenes import build, packing, passes, train, world

SMALL = build.Shape(width=32, mlp=48, heads=4, vision_layers=2, text_layers=3)


@pytest.fixture(scope="module")
def model() -> object:
    return build.build_model(SMALL, seed=3).eval()


@torch.no_grad()
def test_a_packed_pass_equals_the_library_asked_one_by_one(model) -> None:  # noqa: ANN001
    batch = packing.pack("validation", 0, 3)
    seen = passes.see(model, batch.images)
    reading = passes.read(model, seen, batch, passes.Options(), SMALL.late, torch.Generator())
    image_id = build.vocabulary().index("<image>")
    for row in range(3):
        for question in range(int((batch.asks[row] >= 0).sum())):
            inside = batch.block[row] == question
            ids = torch.cat(
                [torch.tensor([1]), torch.full((144,), image_id), batch.tokens[row, inside]]
            )
            logits = model(
                input_ids=ids[None],
                attention_mask=torch.ones_like(ids[None]),
                pixel_values=passes.pixels(batch.images[row : row + 1]),
            ).logits[0, 145:]
            torch.testing.assert_close(reading.logits[row, inside], logits, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_the_ranking_is_the_attention_of_the_layer_before_the_cut(model) -> None:  # noqa: ANN001
    batch = packing.pack("validation", 5, 1)
    seen = passes.see(model, batch.images)
    reading = passes.read(model, seen, batch, passes.Options(), SMALL.late, torch.Generator())
    prompt = batch.tokens[0, : int(batch.asks[0, 0]) + 1]
    image_id = build.vocabulary().index("<image>")
    ids = torch.cat([torch.tensor([1]), torch.full((144,), image_id), prompt])[None]
    eager = build.build_model(SMALL, seed=3).eval()
    eager.set_attn_implementation("eager")
    out = eager(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=passes.pixels(batch.images),
        output_attentions=True,
    )
    row = out.attentions[SMALL.late - 1][0, :, -1, 1:145].mean(0)
    torch.testing.assert_close(reading.ranking[0, 0], row, atol=1e-5, rtol=1e-4)
    tower = eager.model.vision_tower(passes.pixels(batch.images), output_attentions=True)
    row = tower.attentions[-1][0, :, 0, 1:].mean(0)
    torch.testing.assert_close(seen.cls[0], row, atol=1e-6, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("drop", ["evidence", "cls", "random", "merged", "ranked", "random_late"])
def test_dropping_keeps_what_it_says(model, drop: passes.Drop) -> None:  # noqa: ANN001
    batch = packing.pack("validation", 0, 2)
    seen = passes.see(model, batch.images)
    options = passes.Options(40, drop)
    generator = torch.Generator().manual_seed(0)
    reading = passes.read(model, seen, batch, options, SMALL.late, generator)
    assert reading.kept.shape[1] == (144 if drop in ("ranked", "random_late") else 40)
    if drop != "merged":
        assert (reading.kept[:, 1:] > reading.kept[:, :-1]).all()
    if drop == "evidence":
        objects = (batch.patches > 0).any(-1)
        kept = torch.zeros_like(objects).scatter(1, reading.kept, True)
        assert (kept | ~objects).all()
    assert reading.logits.isfinite().all()


@torch.no_grad()
def test_blocked_reading_keeps_text_from_the_image_in_early_layers(model) -> None:  # noqa: ANN001
    batch = packing.pack("validation", 0, 1)
    visible = passes._visible(batch.block, 144)
    blocked = passes._block_reading(visible, 144)
    assert visible[0, 145, 1:145].all()
    assert not blocked[0, 145:, 1:145].any()
    assert torch.equal(visible[0, :145, :145], blocked[0, :145, :145])


def test_everything_that_starts_at_random_follows_the_seed(tmp_path: Path) -> None:
    recipe = dataclasses.replace(train.Recipe(), shape=SMALL)
    data = packing.pack("train", 0, 2)
    one, two = (train.Trainer(recipe, data, tmp_path, "cpu") for _ in range(2))
    for name in ("model", "heads"):
        first, second = getattr(one, name).state_dict(), getattr(two, name).state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first), name


def test_a_short_run_learns_logs_and_saves_a_plain_checkpoint(tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        train.Recipe(), shape=SMALL, vision_steps=200, joint_steps=20, adapt_steps=10, warm_up=0.5
    )
    trainer = train.Trainer(recipe, packing.pack("train", 0, 64), tmp_path, "cpu")
    trainer.validation = trainer.validation.take(torch.arange(16))
    trainer.vision()
    trainer.joint()
    trainer.adapt()
    lines = [json.loads(x) for x in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    vision = [x["loss"] for x in lines if x["stage"] == "vision"]
    assert vision[-1] < vision[0]
    accuracy = [x["validation"] for x in lines if "validation" in x][-1]
    assert set(accuracy) == set(train.EVALUATIONS)
    assert set(accuracy["full"]) == {*world.KINDS, "all"}

    from transformers import AutoModelForImageTextToText, AutoProcessor

    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.tokenizer.padding_side == "left"
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(
            loaded.state_dict()[name], weight.to(torch.bfloat16).float(), msg=name
        )
