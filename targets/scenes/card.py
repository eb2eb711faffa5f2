"""The model card of a scenes checkpoint, written from its recipe, log and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from targets.scenes import world

_HEAD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# {name}

A LLaVA of {parameters:.2f} million parameters that answers five kinds of question about small drawn
pictures. It is the embedded target of redteam: trained from nothing by this repository
(`python -m targets.scenes.train --preset {name} --out DIR`), so that attacks on visual-token
compression can be shown, tested and debugged offline on a laptop. **It is a test object**: it knows
nothing but these drawings, and no figure on it says how a large model behaves.

## Architecture

`LlavaForConditionalGeneration`: CLIP-style vision tower ({vision_layers} layers, width {width}, {heads}
heads, {size} × {size} pixels in {patch} × {patch} patches: {tokens} visual tokens and CLS,
`vision_feature_layer=-1`), two-layer projector, Llama language model ({text_layers} layers, width
{width}), {vocabulary} words. bfloat16 safetensors; `AutoProcessor`, `generate` and
`from_pretrained` work as for any LLaVA. Run it in float32.

## Training

Procedurally drawn scenes (`targets.scenes.world`, split `train`), {scenes:,} of them, AdamW, batch
{batch}. Vision stage {vision_steps:,} steps (dense patch labels and a CLS multi-label task: the stand-in
for CLIP pre-training), joint stage {joint_steps:,} steps{stopped}, last stage {adapt_steps:,} steps. {minutes:.0f} minutes of one thread
on a two-core machine that had other work to do. Recipe: `recipe.json`; log: `training_log.jsonl`.

### What was done to make attention informative

These are design choices of ours, **not** emergent properties; read every result with them in mind.

- *Attention supervision*: the attention that FastV ranks by (last prompt token, language-model layer
  {before_late}) is pulled towards the patches that answer the question, weight {ranking}. Shallow
  attention of large LVLMs is informative enough for FastV by itself; a tiny model must be taught.
- *Late reading*: with probability {blocked} per batch, text may not attend to the image in the first
  {late} language-model layers, so that what FastV drops at K = {late} was not read before the cut. The
  test is that dropping at random at K = {late} costs about as much as dropping at random before the LLM.
- *Token drop*: batches with fewer visual tokens, chosen around the objects, by CLS rank, or by the
  ranking attention at layer {late}. It makes clean accuracy survive compression, and it also makes the
  model harder to attack.
- *Last stage*: {merged_percent:.0f} % of its batches have the tokens VisionZip makes (CLS, dominant, merged,
  at contiguous positions), and the supervised attention is relaxed to a band of {low}–{high} of its mass on
  the evidence. Its length was chosen on the validation split: without it VisionZip at 25 % kept .93 of
  the accuracy of `scenes-a` (n = 250); after 1,500 steps counting under FastV had fallen to .78 and CAA at 16/255
  found fewer failures; {adapt_steps} steps keep every kind right.
- Uniform pixel noise of up to {noise:.0f}/255 on half of the batches.

## Accuracy

{questions} questions on {images} pictures of the `{split}` split, greedy decoding, exact match,
through `LVLM.answer` in float32 (`python -m targets.scenes.evaluate DIR --write`).
"""

_TAIL = """
## Limits

- The world is drawn: six shapes, six colours, ten characters, objects on grid corners. Nothing
  transfers to photographs.
- One training run, one seed; no claim about the variance between runs.
{again}
- The test questions come from the same drawing program as the training scenes, other seeds; an accuracy
  of 1.000 means that this world is easy for it, nothing more.
- It answers by exact words; anything outside the vocabulary is `<unk>`.
- Not adversarially trained. Under unrestricted attacks the full path fails too; the reports always
  show both paths.
"""

_EARLY = ("scenes-a", "scenes-b")
_UNSEEDED = """- The label heads of this checkpoint's training started from unseeded values (mended since), so that
  training it again gives an equivalent model, not the same bytes."""
_SEEDED = """- Training it again gives an equivalent model; on another machine or another torch not the same bytes."""


def write_card(folder: Path) -> Path:
    """Write ``README.md`` into a checkpoint folder and return its path.

    Raises:
        FileNotFoundError: if recipe.json, config.json, training_log.jsonl or evaluation.json lacks.
    """
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    log = (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    shape = recipe["shape"]
    head = _HEAD.format(
        name=folder.name,
        parameters=_parameters(folder) / 1e6,
        size=world.SIZE,
        patch=world.PATCH,
        tokens=world.GRID**2,
        vocabulary=json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"][
            "vocab_size"
        ],
        minutes=sum(_stage_ends(log)) / 60,
        before_late=shape["late"] - 1,
        stopped=_stopped(recipe),
        **{k: shape[k] for k in ("vision_layers", "text_layers", "width", "heads", "late")},
        **{k: recipe[k] for k in ("scenes", "batch", "vision_steps", "joint_steps", "adapt_steps")},
        merged_percent=100 * recipe["merged"],
        low=recipe["band"][0],
        high=recipe["band"][1],
        ranking=recipe["ranking"],
        blocked=recipe["blocked"],
        noise=recipe["noise"] * 255,
        **{k: result[k] for k in ("questions", "images", "split")},
    )
    tail = _TAIL.replace("{again}", _UNSEEDED if folder.name in _EARLY else _SEEDED)
    text = head + _accuracy_table(result) + _acceptance_table(result) + tail
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def _stopped(recipe: dict[str, Any]) -> str:
    """Where the joint stage ended before its time, what that means."""
    planned = recipe.get("joint_planned")
    if planned is None:
        return ""
    return (
        f" (stopped there, {planned:,} were planned, so its learning rate had not come down; what it "
        "had learnt by then was enough for the limits below)"
    )


def _parameters(folder: Path) -> int:
    """Count parameters from the header of the safetensors file."""
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            size = 1
            for n in entry["shape"]:
                size *= n
            total += size
    return total


def _stage_ends(log: list[str]) -> list[float]:
    """Seconds of each training session in a log; a session starts where the clock falls back."""
    ends: list[float] = []
    last = 0.0
    for line in log:
        now = float(json.loads(line)["seconds"])
        if now < last:
            ends.append(last)
        last = now
    return [*ends, last]


def _accuracy_table(result: dict[str, Any]) -> str:
    kinds = list(result["by_kind"]["full tokens"])
    asked = {k: result["by_kind"]["full tokens"][k][1] for k in kinds}
    lines = [
        "",
        "| setting | all | " + " | ".join(f"{k} (n = {asked[k]})" for k in kinds) + " |",
        "|---|---|" + "---|" * len(kinds),
    ]
    for name, by_kind in result["by_kind"].items():
        cells = " | ".join(f"{by_kind[k][0] / by_kind[k][1]:.3f}" for k in kinds)
        lines.append(f"| {name} | **{result['accuracy'][name]:.3f}** | {cells} |")
    return "\n".join(lines) + "\n"


def _acceptance_table(result: dict[str, Any]) -> str:
    lines = ["", "## What it had to reach", "", "| | measured | limit | |", "|---|---|---|---|"]
    for row in result["acceptance"]:
        mark = "reached" if row["reached"] else "**missed**"
        lines.append(f"| {row['what']} | {row['value']:.3f} | {row['limit']} | {mark} |")
    return "\n".join(lines) + "\n"
