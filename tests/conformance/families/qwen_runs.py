"""Ways to run a tiny Qwen-VL without a session's help: greedy decoding, and layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from families import qwen
from targets.caches import cache_name
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
    out = model(**batch, position_ids=positions, **{cache_name(): cache}, use_cache=True)
    logits, last, mask = [out.logits[:, -1]], positions[..., -1:], batch["attention_mask"]
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


@torch.no_grad()
def merged_by_hand(model: Any, batch: dict[str, Any], one: Compressor, trace: Trace) -> Tensor:
    """The same for VisionZip and one picture: which tokens join is taken over, nothing else.

    Merged tokens stand behind one another where the picture began; each has the position and the
    DeepStack features of the token it was made around.
    """
    ids, core, selection = batch["input_ids"], model.model, trace.selection
    places = batch["mm_token_type_ids"][0].nonzero().flatten()
    encoded = core.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    order = tower_order(core, batch["image_grid_thw"])
    tokens = encoded.last_hidden_state.view(len(places), -1)[order]
    made = [tokens[token] for token in selection.kept[0].nonzero().flatten().tolist()]
    sources = selection.kept[0].nonzero().flatten().tolist()
    for number, target in enumerate(selection.targets[0].tolist()):
        joined = tokens[selection.assignment[0] == number]
        made.append(tokens[target] + (joined.mean(0) if len(joined) else 0))
        sources.append(target)
    wide = core.visual.merger(torch.cat(made).view(len(made) * qwen.MERGE**2, -1))
    first, behind = int(places[0]), int(places[-1]) + 1
    words = model.get_input_embeddings()(ids)
    hidden = torch.cat([words[:, :first], wide[None], words[:, behind:]], 1)
    positions = positions_of(model, batch)
    index = [*range(first), *(first + source for source in sources), *range(behind, ids.shape[1])]
    positions = positions[..., index]
    if one.reindexes:
        positions = torch.arange(len(index)).expand(3, 1, -1)
    deep = [torch.cat(list(one)) for one in getattr(encoded, "deepstack_features", None) or []]
    rope = core.language_model.rotary_emb(hidden, positions)
    causal = torch.full((1, 1, len(index), len(index)), torch.finfo(hidden.dtype).min).triu(1)
    for number, layer in enumerate(core.language_model.layers):
        hidden = layer(hidden, attention_mask=causal, position_embeddings=rope)
        if number < len(deep):
            hidden[0, first : first + len(sources)] += deep[number][sources]
    return model.lm_head(core.language_model.norm(hidden))


def tower_order(core: Any, grids: Tensor) -> Tensor:
    """For each token of one picture, row by row, its place inside the tower."""
    tower = core.visual
    if not hasattr(tower, "window_size"):
        return torch.arange(int(grids.prod()) // qwen.MERGE**2)
    from transformers.vision_utils import get_vision_window_index

    index, _ = get_vision_window_index(grids, qwen.MERGE, tower.window_size, tower.patch_size)
    return index.argsort()


def _counts(batch: dict[str, Any]) -> list[int]:
    return (batch["image_grid_thw"].prod(1) // qwen.MERGE**2).tolist()
