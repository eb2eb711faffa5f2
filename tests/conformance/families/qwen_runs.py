"""Ways to run a tiny Qwen-VL without a session's help: greedy decoding, and layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from families import qwen
from torch import Tensor
from transformers import DynamicCache

from targets.compression.base import Compressor
from targets.compression.trace import Trace

STEPS = 9
"""Prefill and 8 decode steps."""


def positions_of(model: Any, batch: dict[str, Any]) -> Tensor:
    """``[3, B, L]``, as the model counts them."""
    positions: Tensor = model.model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        image_grid_thw=batch.get("image_grid_thw"),
        attention_mask=batch["attention_mask"],
    )[0]
    return positions


@torch.no_grad()
def decode(model: Any, batch: dict[str, Any], steps: int = STEPS) -> Tensor:
    """Cached greedy decoding by hand, never stopping; logits ``[B, steps, vocabulary]``."""
    cache = DynamicCache(config=model.config)
    positions = positions_of(model, batch)
    out = model(**batch, position_ids=positions, past_key_values=cache, use_cache=True)
    logits, last, mask = [out.logits[:, -1]], positions[..., -1:], batch["attention_mask"]
    for _ in range(steps - 1):
        token = logits[-1].argmax(-1, keepdim=True)
        mask, last = torch.cat([mask, torch.ones_like(token)], 1), last + 1
        out = model(
            input_ids=token,
            attention_mask=mask,
            position_ids=last,
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(out.logits[:, -1])
    model.last_cache = cache
    return torch.stack(logits, 1)


def single(batch: dict[str, Any], row: int) -> dict[str, Any]:
    """One row of a batch without its padding, its pictures with it."""
    live = batch["attention_mask"][row].bool()
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    made = {name: batch[name][row : row + 1, live] for name in names}
    starts = batch["input_ids"] == qwen.TOKEN_IDS["vision_start_token_id"]
    before, own = int(starts[:row].sum()), int(starts[row].sum())
    if own:
        grids = batch["image_grid_thw"]
        sizes = grids.prod(1).tolist()
        made["image_grid_thw"] = grids[before : before + own]
        made["pixel_values"] = torch.cat(batch["pixel_values"].split(sizes)[before : before + own])
    return made


def with_tokens(batch: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """A batch whose rows go on with text ``[B, n]``."""
    zeros = torch.zeros_like(tokens)
    more = {"input_ids": tokens, "attention_mask": zeros + 1, "mm_token_type_ids": zeros}
    return {
        **batch,
        **{name: torch.cat([batch[name], part.to(batch[name])], 1) for name, part in more.items()},
    }


@torch.no_grad()
def by_hand(model: Any, batch: dict[str, Any], one: Compressor, trace: Trace) -> Tensor:
    """Logits of one row, without cache, mask or session, for a compressor that merges nothing.

    The layers are called one after the other. At the cut the columns are picked out and position
    ids written down anew; DeepStack features are added column by column where there are any.
    """
    ids, text = batch["input_ids"], model.model.language_model
    places = batch["mm_token_type_ids"][0].nonzero().flatten()
    kept = torch.cat([row[: int(n)] for row, n in zip(trace.kept, _counts(batch), strict=True)])
    hidden = model.get_input_embeddings()(ids)
    encoded = model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    hidden[0, places] = torch.cat(list(encoded.pooler_output))
    deep = [torch.cat(list(one)) for one in getattr(encoded, "deepstack_features", None) or []]
    positions = positions_of(model, batch)
    token = torch.full((ids.shape[1],), -1)  # number of the visual token in each column
    token[places] = torch.arange(len(places))
    survive = torch.ones_like(token, dtype=torch.bool)
    survive[places] = kept
    for number, layer in enumerate(text.layers):
        if number == (one.prunes_at or 0):
            hidden, positions = hidden[:, survive], positions[..., survive]
            token = token[survive]
            if one.reindexes:
                positions = torch.arange(hidden.shape[1]).expand(3, 1, -1)
        rope = text.rotary_emb(hidden, positions)
        length = hidden.shape[1]
        causal = torch.full((1, 1, length, length), torch.finfo(hidden.dtype).min).triu(1)
        hidden = layer(hidden, attention_mask=causal, position_embeddings=rope)
        if number < len(deep):
            for column, which in enumerate(token.tolist()):
                if which >= 0:
                    hidden[0, column] += deep[number][which]
    return model.lm_head(text.norm(hidden))


def _counts(batch: dict[str, Any]) -> list[int]:
    return (batch["image_grid_thw"].prod(1) // qwen.MERGE**2).tolist()
