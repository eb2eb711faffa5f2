"""The language model of a tiny LLaVA by hand, one query after the other, no cache, one row.

What a decoding method does to attention is written into `change`; everything else is Llama.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Change = Callable[[int, int, Tensor, Tensor, Tensor, Tensor], Tensor]
"""layer, query, logits ``[N, i]``, query ``[N, E]``, keys, values ``[N, i, E]`` → ``[N, E]``."""


def entered(model: Any, ids: Tensor, pixels: Tensor | None) -> Tensor:
    """What enters the language model, ``[L, D]``."""
    embeds = model.get_input_embeddings()(ids)
    if pixels is not None:
        features = model.model.get_image_features(pixels[None]).pooler_output
        embeds[ids == model.config.image_token_id] = torch.cat(list(features)).view(
            -1, embeds.shape[1]
        )
    return embeds


def run(model: Any, embeds: Tensor, change: Change) -> tuple[Tensor, list[Tensor]]:
    """Logits ``[L, vocabulary]`` and the hidden states of each depth."""
    text = model.model.language_model
    cosine, sine = text.rotary_emb(embeds[None], torch.arange(len(embeds))[None])
    hidden, depths = embeds, [embeds]
    for layer, block in enumerate(text.layers):
        hidden = hidden + _attention(block, layer, hidden, cosine[0], sine[0], change)
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        depths.append(hidden)
    return model.lm_head(text.norm(hidden)), depths


def _attention(
    block: Any, layer: int, hidden: Tensor, cosine: Tensor, sine: Tensor, change: Change
) -> Tensor:
    attention = block.self_attn
    normed = block.input_layernorm(hidden)

    def heads(project: Any, turn: bool) -> Tensor:
        parts = project(normed).view(len(hidden), -1, attention.head_dim).transpose(0, 1)
        if not turn:
            return parts
        first, second = parts.chunk(2, -1)
        return parts * cosine + torch.cat([-second, first], -1) * sine

    query, key = heads(attention.q_proj, True), heads(attention.k_proj, True)
    value = heads(attention.v_proj, False)
    groups = len(query) // len(key)
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    out = []
    for i in range(len(hidden)):
        q, k, v = query[:, i], key[:, : i + 1], value[:, : i + 1]
        logits = (k @ q[:, :, None])[:, :, 0] * attention.scaling
        out.append(change(layer, i, logits, q, k, v).flatten())
    return attention.o_proj(torch.stack(out))


def plain(
    layer: int, i: int, logits: Tensor, query: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """The model's own."""
    del layer, i, query, keys
    return (logits.softmax(-1)[:, None] @ values)[:, 0]
