"""Ways to run a tiny LLaVA-NeXT or OneVision without a session's help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from families import llava_next, llava_onevision
from targets.caches import cache_name
from targets.compression import DivPrune, FastV, Random, Uniform, VisionZip
from targets.compression.base import Compressor

STEPS = 9
"""Prefill and 8 decode steps."""
IMAGE = llava_next.WORDS.index("<image>")
CLOSE = {"rtol": 0, "atol": 4e-5}
BUILT = {"llava_next": llava_next, "llava_onevision": llava_onevision}
COMPRESSORS: dict[str, Compressor] = {
    "random at the first layer": Random(layer=0, retention=0.3, positions="reindex"),
    "fastv": FastV(layer=2, retention=0.3),
    "fastv reindexed": FastV(layer=1, retention=0.3, positions="reindex"),
    "visionzip": VisionZip(retention=0.5),
    "visionzip kept": VisionZip(retention=0.5, positions="keep"),
    "divprune": DivPrune(retention=0.3),
    "divprune kept": DivPrune(keep_tokens=5, positions="keep"),
    "random inside": Random(layer=3, retention=0.3),
    "uniform": Uniform(retention=0.3),
}
PLAIN = sorted(name for name, one in COMPRESSORS.items() if not one.merges)
BATCHES: dict[tuple[str, str], dict[str, Any]] = {
    (name, case): module.inputs(module.build_processor(), rows)
    for name, module in BUILT.items()
    for case, rows in llava_next.CASES.items()
}
SMALL = ((llava_next.QUESTIONS[0], (0,)), (llava_next.QUESTIONS[2], (3,)))
"""Pictures below OneVision's limit, which merging methods take."""
for _name, _module in BUILT.items():
    BATCHES[_name, "small"] = _module.inputs(_module.build_processor(), SMALL)
ROWS = {**llava_next.CASES, "small": SMALL}


@torch.no_grad()
def decode(model: Any, batch: dict[str, Any], steps: int = STEPS) -> Tensor:
    """Cached greedy decoding by hand, never stopping; logits ``[B, steps, vocabulary]``."""
    cache = DynamicCache(config=model.config)
    mask = batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out = model(**batch, position_ids=positions, **{cache_name(): cache}, use_cache=True)
    logits, last = [out.logits[:, -1]], positions[:, -1:]
    for _ in range(steps - 1):
        token = logits[-1].argmax(-1, keepdim=True)
        mask, last = torch.cat([mask, torch.ones_like(token)], 1), last + 1
        out = model(
            input_ids=token,
            attention_mask=mask,
            position_ids=last,
            **{cache_name(): cache},
            use_cache=True,
        )
        logits.append(out.logits[:, -1])
    model.last_cache = cache
    return torch.stack(logits, 1)


def single(batch: dict[str, Any], rows: Sequence[Any], row: int) -> dict[str, Any]:
    """One row of a batch without its padding, its pictures with it.

    Args:
        batch: what the processor made.
        rows: the case it was made from.
        row: which.
    """
    live = batch["attention_mask"][row].bool()
    made = {name: batch[name][row : row + 1, live] for name in ("input_ids", "attention_mask")}
    counts = [len(numbers) for _, numbers in rows]
    before, own = sum(counts[:row]), counts[row]
    if own:
        for name in ("pixel_values", "image_sizes"):
            made[name] = batch[name][before : before + own]
        if "batch_num_images" in batch:
            made["batch_num_images"] = torch.tensor([own])
    return made


@torch.no_grad()
def by_hand(
    model: Any, batch: dict[str, Any], ids: Tensor, one: Compressor, dropped: Sequence[int]
) -> Tensor:
    """Logits of one row, without cache, mask or session, for a compressor that merges nothing.

    The layers are called one after the other; at the cut columns are picked out, and position ids
    written down anew.

    Args:
        model: the model.
        batch: image arguments.
        ids: ``[1, n]`` prompt and answer.
        one: where it cuts, and what becomes of position ids.
        dropped: columns that go.
    """
    text, hidden = model.model.language_model, model.get_input_embeddings()(ids)
    images = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
    features = torch.cat(list(model.model.get_image_features(**images).pooler_output))
    first = batch["input_ids"].shape[1]
    hidden[0, :first][ids[0, :first] == IMAGE] = features
    positions = list(range(ids.shape[1]))
    survive = [column for column in positions if column not in set(dropped)]
    for number, layer in enumerate(text.layers):
        if number == (one.prunes_at or 0):
            hidden, positions = hidden[:, survive], [positions[i] for i in survive]
            if one.reindexes:
                positions = list(range(len(survive)))
        rope = text.rotary_emb(hidden, torch.tensor([positions]))
        length = hidden.shape[1]
        causal = torch.full((1, 1, length, length), torch.finfo(hidden.dtype).min).triu(1)
        hidden = layer(hidden, attention_mask=causal, position_embeddings=rope)
    logits: Tensor = model.lm_head(text.norm(hidden))
    return logits


def batch_of(model: Any, case: str) -> dict[str, Any]:
    """A batch as the processor of the model's family makes it."""
    return BATCHES[model.config.model_type, case]


def suited(model: Any, compressor: Compressor, cases: tuple[str, ...]) -> tuple[str, ...]:
    """The cases, without pictures over the limit where tokens are merged."""
    if compressor.merges and model.config.model_type == "llava_onevision":
        return tuple("small" if case == "padded" else case for case in cases)
    return cases
