"""Running the tiny Gemma models: which there are, batches, and decoding by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import tiny
import torch
from torch import Tensor
from transformers import DynamicCache

from families import gemma, gemma3, paligemma
from targets.caches import cache_name
from targets.compression.base import Compressor

STEPS = 6  # prefill and 5 decode steps
CLOSE = {"rtol": 0, "atol": 5e-5}
WINDOW = 24
"""Shorter than any prompt with a picture."""


@dataclass(frozen=True)
class Kind:
    """A model to test.

    Attributes:
        module: its fixtures.
        build: makes it.
        first: position id of the first token.
        window: of its sliding layers; None where all look back to the start.
    """

    module: ModuleType
    build: Callable[[], Any]
    first: int = 0
    window: int | None = None


KINDS = {
    "paligemma sdpa": Kind(paligemma, lambda: paligemma.build_model("sdpa"), 1),
    "paligemma eager": Kind(paligemma, lambda: paligemma.build_model("eager"), 1),
    "paligemma 2": Kind(paligemma, paligemma.build_second, 1),
    "paligemma 2 past its window": Kind(
        paligemma, lambda: paligemma.build_second(WINDOW), 1, WINDOW
    ),
    "gemma3 sdpa": Kind(gemma3, lambda: gemma3.build_model("sdpa")),
    "gemma3 eager": Kind(gemma3, lambda: gemma3.build_model("eager")),
    "gemma3 past its window": Kind(gemma3, lambda: gemma3.build_model("sdpa", WINDOW), 0, WINDOW),
    "gemma3 past its window, eager": Kind(
        gemma3, lambda: gemma3.build_model("eager", WINDOW), 0, WINDOW
    ),
}
PICKED = {
    name: tiny.COMPRESSORS[name]
    for name in (
        "divprune kept",
        "fastv",
        "fastv reindexed",
        "random at the first layer",
        "visionzip",
        "visionzip kept",
    )
}
"""Every stage and position mode, with and without merging."""


@functools.cache
def model_of(name: str) -> Any:
    """The model of one of `KINDS`, made once."""
    return KINDS[name].build()


@functools.cache
def _processor(module: ModuleType) -> Any:
    return module.build_processor()


def batch(kind: Kind, rows: Any) -> dict[str, Tensor]:
    """What the processor makes of rows of a question and its pictures."""
    made: dict[str, Tensor] = kind.module.inputs(_processor(kind.module), rows)
    return made


def positions(kind: Kind, mask: Tensor) -> Tensor:
    """Position ids of left-padded prompts."""
    return (mask.cumsum(1) - 1).clamp_min(0) + kind.first


@torch.no_grad()
def greedy(model: Any, kind: Kind, inputs: dict[str, Tensor], steps: int = STEPS) -> Tensor:
    """Cached decoding by hand: logits ``[B, steps, vocabulary]``; the cache is left behind."""
    mask = inputs["attention_mask"]
    cache = DynamicCache(config=model.config)
    where = positions(kind, mask)
    out = model(**inputs, position_ids=where, **{cache_name(): cache}, use_cache=True)
    logits = [out.logits[:, -1]]
    where = where[:, -1:]
    for _ in range(steps - 1):
        token = logits[-1].argmax(-1, keepdim=True)
        mask, where = torch.cat([mask, torch.ones_like(token)], 1), where + 1
        out = model(
            input_ids=token,
            attention_mask=mask,
            position_ids=where,
            **{cache_name(): cache},
            use_cache=True,
        )
        logits.append(out.logits[:, -1])
    model.last_cache = cache
    return torch.stack(logits, 1)


def blocks(kind: Kind, ids: list[int], prompt: int) -> list[int]:
    """Number of the block a column sees in both directions; -1 for none."""
    if kind.module is paligemma:
        return [0 if column < prompt else -1 for column in range(len(ids))]
    found, block = [], -1
    for column, token in enumerate(ids):
        block += token == gemma.IMAGE and ids[column - 1] != gemma.IMAGE
        found.append(block if token == gemma.IMAGE else -1)
    return found


def may_see(kind: Kind, block: list[int], slides: bool, i: int, j: int) -> bool:
    """Whether column i of the uncompressed sequence may attend to column j."""
    same = block[i] >= 0 and block[i] == block[j]
    inside = kind.window is None or not slides or j > i - kind.window
    if kind.module is paligemma:
        return (j <= i and inside) or same
    return (j <= i or same) and inside


@torch.no_grad()
def by_hand(
    model: Any,
    kind: Kind,
    inputs: dict[str, Tensor],
    answer: list[int],
    one: Compressor,
    kept: Tensor,
) -> Tensor:
    """Logits of a whole sequence of one row, without cache, hooks or transformers' masks."""
    prompt: list[int] = inputs["input_ids"][0].tolist()
    ids, text = prompt + answer, model.model.language_model
    hidden = model.get_input_embeddings()(torch.tensor([ids]))
    image = [column for column, token in enumerate(ids) if token == gemma.IMAGE]
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    hidden[0, image] = features.flatten(0, 1)
    block = blocks(kind, ids, len(prompt))
    pairs = zip(image, kept.flatten().tolist(), strict=True)
    dropped = {column for column, keep in pairs if not keep}
    columns = list(range(len(ids)))
    where = [column + kind.first for column in columns]
    masks: dict[tuple[bool, int], Tensor] = {}
    types = getattr(text.config, "layer_types", None) or ["full_attention"] * len(text.layers)
    for number, layer in enumerate(text.layers):
        if number == (one.prunes_at or 0):
            live = [place for place, column in enumerate(columns) if column not in dropped]
            hidden, columns = hidden[:, live], [columns[place] for place in live]
            where = [where[place] for place in live]
            if one.reindexes:
                where = [place + kind.first for place in range(len(live))]
        slides = types[number] == "sliding_attention"
        if (slides, len(columns)) not in masks:
            rows = [[may_see(kind, block, slides, i, j) for j in columns] for i in columns]
            masks[slides, len(columns)] = torch.tensor(rows)
        mask = masks[slides, len(columns)]
        lows = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        own = (types[number],) if kind.module is gemma3 else ()
        rope = text.rotary_emb(hidden, torch.tensor([where]), *own)
        hidden = layer(hidden, attention_mask=lows[None, None], position_embeddings=rope)
    logits = model.lm_head(text.norm(hidden))
    cap = 3.0 if text.config.model_type == "gemma2" else None
    return logits if cap is None else cap * torch.tanh(logits / cap)
