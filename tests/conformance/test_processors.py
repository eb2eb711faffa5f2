"""Checkpoints of every family load and answer without torchvision, from a folder and by a run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, build
from PIL import Image

from redteam.scenario import load_scenario
from targets.compression import FastV
from targets.errors import TargetError
from targets.lvlm import LVLM
from targets.processors import stills_only

SETTINGS = ("image_seq_len", "image_seq_length", "num_image_tokens", "patch_size")
QUESTIONS = ("is there a red circle ?", "how many ?")


def saved(family: str, folder: Path) -> tuple[Any, Any]:
    """A checkpoint as hubs hold it: weights, tokenizer, image processor, template, settings."""
    model, processor = build(family)
    model.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    if getattr(processor, "chat_template", None):
        (folder / "chat_template.jinja").write_text(processor.chat_template)
    settings = {name: getattr(processor, name) for name in SETTINGS if hasattr(processor, name)}
    for name in ("vision_aspect_ratio", "vision_feature_select_strategy"):
        if hasattr(processor, name):
            settings[name] = getattr(processor, name)
    if hasattr(processor, "num_additional_image_tokens"):
        settings["num_additional_image_tokens"] = processor.num_additional_image_tokens
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return model, processor


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_checkpoint_answers_as_the_model_in_memory(family: str, tmp_path: Path) -> None:
    model, processor = saved(family, tmp_path)
    images = torch.rand(2, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    loaded = LVLM.load(tmp_path)
    assert loaded.identity["model_type"] == family
    one = FastV(retention=0.5)
    ours = loaded.answer(images, QUESTIONS, compressor=one, max_new_tokens=4)
    truth = LVLM(model, processor).answer(images, QUESTIONS, compressor=one, max_new_tokens=4)
    assert ours.texts == truth.texts
    assert ours.kept is not None
    assert torch.equal(ours.kept, truth.kept)


def test_auto_is_what_the_family_needs(tmp_path: Path) -> None:
    """Gemma 2 caps its attention logits, which only eager attention does."""
    from families import paligemma

    paligemma.build_second().save_pretrained(tmp_path)
    processor = paligemma.build_processor()
    processor.save_pretrained(tmp_path)
    loaded = LVLM.load(tmp_path)
    assert loaded.identity["attention"] == "eager"
    images = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    lines = ["is there a red circle ?\nyes or no ?"]
    assert loaded.option_scores(images, lines, ("yes", "no")).shape == (1, 2)
    assert len(loaded.answer(images, lines, max_new_tokens=2).texts) == 1


def test_video_parts_are_left_out_only_where_they_cannot_be_had(tmp_path: Path) -> None:
    assert importlib.util.find_spec("torchvision") is None
    saved("qwen2_vl", tmp_path)
    found = stills_only(str(tmp_path))
    assert type(found).__mro__[1].__name__ == "Qwen2VLProcessor"
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(TargetError, match="no image processor"):
        stills_only(str(tmp_path))


def test_a_run_on_another_family(tmp_path: Path) -> None:
    """Pictures of several sizes, from a scenario to the report, on a model with tiles."""
    from typer.testing import CliRunner

    from redteam.cli import app

    (tmp_path / "model").mkdir()
    saved("llava_next", tmp_path / "model")
    rng = np.random.default_rng(0)
    lines = []
    for number, size in enumerate(((40, 60), (61, 30), (40, 60))):
        levels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(levels).save(tmp_path / f"{number}.png")
        line = {"image": f"{number}.png", "question": QUESTIONS[number % 2], "answer": "yes"}
        lines.append(json.dumps(line))
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "tiles.yaml").write_text(
        "name: tiles\n"
        "targets: [{type: lvlm, model: ./model}]\n"
        "dataset: {type: jsonl, path: data.jsonl}\n"
        "compressions:\n"
        "  - {type: fastv, retention: 0.5}\n"
        "  - {type: visionzip, keep_tokens: 20}\n"
        "attacks: [{type: noise}, {type: caa, steps: 2}]\n"
        "epsilons: [8/255]\n"
    )
    assert load_scenario(tmp_path / "tiles.yaml").compressions
    done = CliRunner().invoke(
        app, ["run", str(tmp_path / "tiles.yaml"), "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    trials = [
        json.loads(line)["trial"] if "trial" in line else json.loads(line)
        for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()
    ]
    assert len(trials) >= 12
    assert not any(trial.get("error") for trial in trials)
    boxes = [trial["tokens"]["boxes"] for trial in trials if trial.get("tokens")]
    assert boxes
    assert all(box is not None for box in boxes)
    assert (tmp_path / "out" / "report.html").is_file()
