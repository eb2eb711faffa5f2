"""A tiny random LVLM on disk, and data it answers right.

The model is random, but its pictures are answered "right" by construction (the truth is what it
says), so compression and attacks have something to break; one-word answers keep it fast.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from workplace import SAMPLES, Workplace

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved checkpoint; every word ends an answer, so answers have one word."""
    from tests.conformance import tiny

    folder = tmp_path_factory.mktemp("model")
    model = tiny.build_model()
    model.generation_config.eos_token_id = list(range(2, len(tiny.WORDS)))
    model.save_pretrained(folder)
    tiny.build_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and questions whose truth is what the model says."""
    from redteam.pictures import encode_png, to_pixels
    from targets.lvlm import LVLM
    from tests.conformance import tiny

    folder = tmp_path_factory.mktemp("data")
    model = LVLM.load(model_folder)
    images = tiny.pictures(SAMPLES, seed=3)
    questions = [tiny.QUESTIONS[index % 3] for index in range(SAMPLES)]
    answers = model.answer(images, questions).texts
    (folder / "images").mkdir()
    lines = []
    for index, pixels in enumerate(to_pixels(images)):
        (folder / "images" / f"{index}.png").write_bytes(encode_png(pixels))
        lines.append(
            {
                "id": f"s{index}",
                "image": f"images/{index}.png",
                "question": questions[index],
                "answer": answers[index],
                "kind": f"kind {index % 2}",
                "evidence": [[0, 0, 16, 16]],
            }
        )
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def workplace(model_folder: Path, data_folder: Path, tmp_path: Path) -> Workplace:
    return Workplace.build(tmp_path, model_folder, data_folder)
