"""A folder with a scenario on a target that costs nothing, for tests that need hundreds of runs.

The target answers by a hash of the pixels: deterministic, sensitive to noise, and no model at all.
Everything else of a run is real: the command line, the plan, the engine, the store, the reports.
"""

from __future__ import annotations

import json
from pathlib import Path

from workplace import Workplace

SAMPLES = 4
CELLS = 2
SCENARIO = """\
name: stub
seed: 3
targets: [{type: stub}]
dataset: {type: jsonl, path: data.jsonl}
compressions:
  - {type: random, retention: 0.25}
attacks:
  - {type: noise}
epsilons: [32/255, 8/255]
gates: [{metric: csfr, max: 0.5}]
checks: {repeat: 0}
engine: {type: local, batch_size: 2, device: cpu}
"""
PLUGIN = '''
import hashlib
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch

from targets.lvlm import Answered
from targets.preprocessing import Layout


@dataclass(frozen=True, kw_only=True)
class StubTarget:
    """Answers by a hash of the pixels; two questions break it.

    Args:
        delay: seconds that a batch takes.
    """

    name: ClassVar[str] = "stub"
    capabilities: ClassVar[tuple[str, ...]] = ("visual_tokens", "generate")

    delay: float = 0.0

    def load(self, device):
        del device
        return Stub(self.delay)


class Stub:
    def __init__(self, delay):
        self.delay = delay

    device = torch.device("cpu")
    image_size = (8, 8)
    identity = {"weights": "none"}
    family = SimpleNamespace(known_weak={})

    def answer(self, images, questions, *, compressor=None, **options):
        del options
        time.sleep(self.delay)
        if "memory" in questions:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if "raise" in questions:
            raise ZeroDivisionError("this question breaks the model")
        levels = (images * 255).round().to(torch.uint8).numpy()
        salt = b"" if compressor is None else b"compressed"
        found = (hashlib.sha256(one.tobytes() + salt).digest()[0] for one in levels)
        texts = tuple("no" if first < 64 else "yes" for first in found)
        return Answered(texts, None, None, 0.0, generated=(1,) * len(questions))

    def layout(self, size):
        del size
        return Layout.grid((2, 2))

    def view(self, knowledge, compressor=None, **options):
        del compressor, options
        return SimpleNamespace(knowledge=knowledge)
'''


def build(folder: Path) -> Workplace:
    """Scenario, pictures and the plugin in a new folder."""
    import numpy as np

    from redteam.pictures import encode_png

    place = Workplace(folder)
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(5)
    lines = []
    for index in range(SAMPLES):
        pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        (folder / "images" / f"{index}.png").write_bytes(encode_png(pixels))
        line = {"id": f"s{index}", "image": f"images/{index}.png", "question": "?", "answer": "yes"}
        lines.append(json.dumps(line) + "\n")
    (folder / "data.jsonl").write_text("".join(lines))
    place.scenario.write_text(SCENARIO)
    place.plugin("stub_target", PLUGIN, targets="stub = stub_target:StubTarget")
    return place
