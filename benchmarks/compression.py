"""What compressing costs and saves: scoring and selecting, and prefill time against the MACs.

``python benchmarks/compression.py --shape scenes`` takes the trained scenes LVLM; ``--shape wide``
a LLaVA of random weights that is wide enough for arithmetic to outweigh Python on a CPU; ``--shape
7b`` one of LLaVA-1.5-7B's shape in bfloat16, for a GPU. All settings of a run are timed in turn,
round after round, so that a machine that slows down slows all of them.

The prediction of a prefill is its multiply-accumulates over those with all tokens: the language
model's by `targets.costs`, the vision tower's and projector's by the same formula (ungated, without
grouped keys). It leaves out everything that is no matrix product, and the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from redteam.catalog import BUILTIN, entries, load
from targets.compression import compress
from targets.compression.base import Compressor, Stage
from targets.costs import Dimensions, layer_macs, prefill_macs
from targets.errors import CompressionError

SHAPES: dict[str, dict[str, int]] = {
    "wide": {
        "width": 1024, "inner": 2752, "layers": 12, "heads": 16, "side": 336,
        "tower_width": 512, "tower_layers": 8, "tower_heads": 8,
    },
    "7b": {
        "width": 4096, "inner": 11008, "layers": 32, "heads": 32, "side": 336,
        "tower_width": 1024, "tower_layers": 24, "tower_heads": 16,
    },
}  # fmt: skip
WORDS = 64
"""Text tokens of a prompt."""


@dataclass
class Case:
    """A model and one batch of inputs."""

    model: Any
    inputs: dict[str, Any]
    tokens: int


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=["scenes", *SHAPES], default="scenes")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--keep", default="", help="counts; default: 1/2, 1/4, 1/9 of all tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="compressors; default: all")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [n for n in arguments.only.split(",") if n] or list(BUILTIN["compressors"])
    found = []
    for batch in (int(n) for n in arguments.batches.split(",")):
        case = built(arguments.shape, batch, device)
        counts = [int(n) for n in arguments.keep.split(",") if n]
        counts = counts or [round(case.tokens / n) for n in (2, 4, 9)]
        found += measured(case, batch, settings(names, counts), arguments.rounds, device)
    result = {
        "command": f"python benchmarks/compression.py --shape {arguments.shape}",
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "rows": found,
    }
    out = arguments.out or Path(f"benchmarks/results/compression_{arguments.shape}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(found)


def settings(names: list[str], counts: list[int]) -> list[tuple[str, Compressor]]:
    """Each compressor at each count; those that cannot be had that way are left out, and said."""
    made = []
    for name in names:
        if name in ("pipeline", "drop_all", "downsample"):
            continue
        for count in counts:
            try:
                one = load(entries("compressors")[name])(keep_tokens=count)
            except (TypeError, CompressionError) as error:
                print(f"left out: {name} {count}: {str(error)[:120]}")
                continue
            if one.stage is not Stage.ATTENTION:
                made.append((f"{name} {count}", one))
    return made


def measured(
    case: Case,
    batch: int,
    compressors: list[tuple[str, Compressor]],
    rounds: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Times of all settings, interleaved."""
    seconds: dict[str, list[float]] = {}
    ranking: dict[str, list[float]] = {}
    lengths: dict[str, tuple[int, ...]] = {}
    left_out: set[str] = set()
    layers = len(case.model.model.language_model.layers)
    full = (case.inputs["input_ids"].shape[1],) * layers
    for turn in range(rounds + 1):
        for label, one in [("all tokens", None), *compressors]:
            if label in left_out:
                continue
            try:
                wall, rank, columns = prefill(case, one, device)
            except CompressionError as error:
                left_out.add(label)
                print(f"left out: {label}: {str(error)[:120]}")
                continue
            lengths[label] = columns or full
            if turn:  # the first round allocates
                seconds.setdefault(label, []).append(wall)
                ranking.setdefault(label, []).append(rank)
    base = statistics.median(seconds["all tokens"])
    fixed = tower_macs(case.model.config) if hasattr(case.model.config, "vision_config") else 0
    size = Dimensions.of(case.model.config.text_config)
    whole = fixed + prefill_macs(full, size)
    rows = []
    for label, walls in seconds.items():
        wall = statistics.median(walls)
        predicted = (fixed + prefill_macs(lengths[label], size)) / whole
        rows.append(
            {
                "batch": batch,
                "setting": label,
                "prefill_ms": round(1000 * wall, 3),
                "measured": round(wall / base, 4),
                "predicted": round(predicted, 4),
                "ranking_share": round(statistics.median(ranking[label]) / wall, 4),
            }
        )
    return rows


def prefill(
    case: Case, one: Compressor | None, device: torch.device
) -> tuple[float, float, tuple[int, ...]]:
    """Seconds of a prefill with cache, of that ranking, and columns of each layer."""
    arguments = {**case.inputs, "use_cache": True, "logits_to_keep": 1}
    with torch.inference_mode():
        if one is None:
            started = now(device)
            case.model(**arguments)
            return now(device) - started, 0.0, ()
        with compress(case.model, one) as session:
            started = now(device)
            case.model(**arguments)
            wall = now(device) - started
    trace = session.trace
    return wall, trace.seconds, tuple(trace.lengths[i] for i in sorted(trace.lengths))


def now(device: torch.device) -> float:
    """The clock, once the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def tower_macs(config: Any) -> int:
    """Multiply-accumulates of the vision tower and projector for one picture."""
    vision, text = config.vision_config, config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    width = int(vision.hidden_size)
    one = Dimensions(width, width, width, int(vision.intermediate_size), gated=False, layers=0)
    tower = int(vision.num_hidden_layers) * layer_macs(patches + 1, one)
    projector = patches * int(text.hidden_size) * (width + int(text.hidden_size))
    return tower + projector


def built(shape: str, batch: int, device: torch.device) -> Case:
    """The model and a batch of noise pictures with the same prompt."""
    model = trained() if shape == "scenes" else random_llava(SHAPES[shape])
    model = model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.eval().requires_grad_(False)
    vision = model.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2
    generator = torch.Generator().manual_seed(0)
    side = vision.image_size
    pixels = torch.randn(batch, 3, side, side, generator=generator)
    special = int(model.config.image_token_id)
    words = min(60, int(model.config.text_config.vocab_size))
    text = torch.randint(5, words, (1, WORDS), generator=generator).expand(batch, -1)
    text = torch.where(text == special, 5 + int(special == 5), text)
    image = torch.full((batch, tokens), special)
    inputs = {
        "input_ids": torch.cat([text[:, :8], image, text[:, 8:]], 1).to(device),
        "pixel_values": pixels.to(device, model.dtype),
    }
    return Case(model, inputs, tokens)


def trained() -> Any:
    """The scenes LVLM."""
    from targets.scenes import load_scenes

    return load_scenes("scenes-a").family.model


def random_llava(shape: dict[str, int]) -> Any:
    """A LLaVA of a shape with random weights."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=shape["tower_width"],
        intermediate_size=4 * shape["tower_width"],
        num_hidden_layers=shape["tower_layers"],
        num_attention_heads=shape["tower_heads"],
        image_size=shape["side"],
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=shape.get("vocabulary", 32064),
        hidden_size=shape["width"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=shape.get("vocabulary", 32064) - 64,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    print(f"{'batch':>5}  {'setting':28} {'ms':>9} {'measured':>9} {'predicted':>9} {'ranking':>8}")
    for row in rows:
        print(
            f"{row['batch']:5d}  {row['setting']:28} {row['prefill_ms']:9.2f} "
            f"{row['measured']:9.3f} {row['predicted']:9.3f} {100 * row['ranking_share']:7.2f}%"
        )


if __name__ == "__main__":
    main()
