"""The card of a trained compressor, written from its recipe, log and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from targets.scenes import world
from targets.scenes.compressors.training import EVALUATION, LOG, RECIPE

_TITLES: Final = {
    "explainability": "Generic compression by explainability",
    "quecc": "QueCC",
    "tokenflex": "TokenFLEX",
    "sparsifiner": "Sparsifiner",
}
_WHAT: Final = {
    "explainability": """\
Five depthwise-separable 1-D convolutions ({network[channels]}, kernel {network[kernel]}) that turn
the layer-0 attention of the question into the relevance each visual token will have for the answer.
Labels: R <- R + E_h[(A * dA)^+] R over all layers of the language model, row of the token that is
generated, mean over the answer (end mark left out), lower half set to zero; of {scenes:,} training
scenes, questions answered rightly only. Loss: KL divergence. The log's clock leaves out making the
labels, which took about as long again.""",
    "quecc": """\
Question-conditioned attention within windows and a projector of its own. One network for windows of
{network[strides]} patches: of 144 tokens 36, 16, 9, 4 or 1 are left. Keys and values from
{network[levels]} tower layers, {network[heads]} heads, the window's mean feature added to what is
read (so that training starts at average pooling). Trained on the answers to questions about
{scenes:,} training scenes, one window size a step.""",
    "tokenflex": """\
Adaptive average pooling to n x n, LayerNorm and a SwiGLU perceptron of width {network[hidden]} in
place of the projector. First taught to give what the model's own projector gives, pooled, then the
answers to questions about {scenes:,} training scenes with n drawn from {sides} (probabilities
{chances}) for each step.""",
    "sparsifiner": """\
Predictors of the attention of each of the {network[layers]} tower layers, of low rank in the
{network[tokens]} tokens (1/{network[shrink]}): each query attends to the keys they name. Taught the
dense attention of the frozen tower on {scenes:,} training scenes: squared error over the mean
square of the attention. The table's first settings leave all tokens and mask attention; the others
drop patches by the attention of CLS at three layers, which needs no weights.""",
}
_LIMITS: Final = {
    "explainability": """\
- The untrained twin is the paper's network at its starting values (seed 0).
- Half the paper's channels; kernel, norms, activation and head are reconstructions.""",
    "quecc": """\
- The untrained twin is average pooling of the tower's features through the model's projector.
- Vision tower and language model were frozen; the paper trains the language model with the module.
- What a frozen language model gets out of few new tokens is least where the answer needs the whole
  picture (counting) or two neighbouring patches in their order (reading).""",
    "sparsifiner": """\
- The untrained twin is the predictor at its starting values (seed 0).
- The tower was not fine-tuned under its masks, as the paper's is; attention that is cut costs
  accuracy the paper's models get back.
- With 10 % of connections the trained predictor answers fewer questions rightly than its untrained
  twin, though it catches over three times as much attention (log): counting and reading are lost,
  the other kinds are not. Why is not known.
- Masks save no time here: attention is computed densely and hidden.""",
    "tokenflex": """\
- The untrained twin is average pooling of the projected tokens (the baseline `pool`).
- Vision tower and language model were frozen; the paper trains both in its later stages.
- Pooling mixes the two characters of a sign, which are one patch each: reading suffers first.
  Numbers of tokens that were not drawn in training cost accuracy, counting above all.""",
}
_PAGE: Final = """---
license: apache-2.0
---

# {title}, trained on {checkpoint}

{what}

Neither vision tower nor language model was changed. Written by this repository
(`python -m targets.scenes.compressors.train_{name} --out DIR`): {steps:,} steps, {minutes:.0f}
minutes of one thread of a busy two-core machine; {parameters:,} parameters, float16. Recipe:
`recipe.json`; log, with accuracy on the validation split: `training_log.jsonl`. Nothing was chosen
by the test split.

It is part of a **test object**: the model it belongs to knows drawn scenes only, and no figure here
says how the method does on a large model.

## Accuracy

{questions} questions on {images} pictures of the `{split}` split, greedy decoding, exact match,
through `LVLM.answer` in float32
(`python -m targets.scenes.compressors.evaluate {name} DIR --write`). One training run, one seed
({seed}).

{table}

## Limits

{limits}
"""


def write_card(folder: Path) -> Path:
    """Write ``README.md`` into a folder of weights and return its path.

    Raises:
        FileNotFoundError: if config.json, recipe.json, evaluation.json or the log lacks.
    """
    config, recipe, result = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("config.json", RECIPE, EVALUATION)
    )
    name, log = config["compressor"], (folder / LOG).read_text(encoding="utf-8").splitlines()
    facts = {"network": config["network"], **recipe}
    text = _PAGE.format(
        title=_TITLES[name],
        name=name,
        what=_WHAT[name].format(**facts),
        limits=_LIMITS[name],
        minutes=json.loads(log[-1])["seconds"] / 60,
        steps=recipe["how"]["steps"],
        seed=recipe["how"]["seed"],
        parameters=_parameters(folder),
        table=_table(result),
        **{key: result[key] for key in ("checkpoint", "questions", "images", "split")},
    )
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def _parameters(folder: Path) -> int:
    from safetensors.torch import load_file

    return sum(value.numel() for value in load_file(folder / "model.safetensors").values())


def _table(result: dict[str, Any]) -> str:
    kinds = [kind for kind in world.KINDS if kind in result["by_kind"]["full tokens"]]
    asked = {kind: result["by_kind"]["full tokens"][kind][1] for kind in kinds}
    lines = [
        "| setting | all | " + " | ".join(f"{kind} (n = {asked[kind]})" for kind in kinds) + " |",
        "|---|---|" + "---|" * len(kinds),
    ]
    for label, by_kind in result["by_kind"].items():
        cells = " | ".join(f"{by_kind[kind][0] / by_kind[kind][1]:.3f}" for kind in kinds)
        lines.append(f"| {label} | **{result['accuracy'][label]:.3f}** | {cells} |")
    return "\n".join(lines)
