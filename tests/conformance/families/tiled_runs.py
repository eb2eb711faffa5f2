"""Ways to run a tiny tiled model without a session's help: greedy decoding, and layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from targets.caches import cache_name
from targets.compression.base import Compressor
from targets.compression.trace import Trace

STEPS = 9
"""Prefill and 8 decode steps."""


def text_of(model: Any) -> Any:
    """The language model without its head."""
    return getattr(model.model, "language_model", None) or model.model.text_model


@torch.no_grad()
def decode(model: Any, batch: dict[str, Any], steps: int = STEPS) -> Tensor:
    """Cached greedy decoding by hand, never stopping; logits ``[B, steps, vocabulary]``."""
    cache, mask = DynamicCache(config=model.config), batch["attention_mask"]
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


@torch.no_grad()
def by_hand(
    model: Any, image: int, batch: dict[str, Any], more: Tensor, one: Compressor, trace: Trace
) -> Tensor:
    """Logits of one row that goes on with ``more [1, n]``, without cache, mask or session.

    For a compressor that merges nothing: the layers are called one after the other, and at the cut
    the columns are picked out and position ids written down anew.

    Args:
        model: any of the tiled ones.
        image: the placeholder.
        batch: inputs of one row.
        more: token ids behind it.
        one: the compressor.
        trace: of a session with it.
    """
    ids, text = torch.cat([batch["input_ids"], more], 1), text_of(model)
    pixels = {name: value for name, value in batch.items() if name.startswith("pixel")}
    features = model.get_image_features(**pixels).pooler_output
    features = torch.cat([part.flatten(0, -2) for part in features])
    # The model may well have said the placeholder itself; that is no picture.
    places = (batch["input_ids"][0] == image).nonzero().flatten()
    lengths = [lay.tokens for lay in trace.cuts[0].seen.lattice.layouts]
    kept = torch.cat([row[:length] for row, length in zip(trace.kept, lengths, strict=True)])
    hidden = model.get_input_embeddings()(ids)
    hidden[0, places] = features
    positions = torch.arange(ids.shape[1])
    survive = torch.ones_like(positions, dtype=torch.bool)
    survive[places] = kept
    for number, layer in enumerate(text.layers):
        if number == (one.prunes_at or 0):
            hidden, positions = hidden[:, survive], positions[survive]
            if one.reindexes:
                positions = torch.arange(hidden.shape[1])
        rope = text.rotary_emb(hidden, positions[None])
        length = hidden.shape[1]
        causal = torch.full((1, 1, length, length), torch.finfo(hidden.dtype).min).triu(1)
        hidden = layer(hidden, attention_mask=causal, position_embeddings=rope)
    logits: Tensor = model.lm_head(text.norm(hidden))
    return logits
