"""Visual tokens of methods that make new ones, by hand for one row: tokens and their places."""

from __future__ import annotations

from typing import Any

import slow_tower
import slow_trained as slow
import torch
from torch import Tensor

from targets.compression import Pool, PruMerge, QueCC, TokenFLEX, ToMe
from targets.compression.base import Compressor

TOWER = ("tome", "attentive_removal", "sparsifiner")
METHODS = ("quecc", "tokenflex", "pool", "prumerge", *TOWER)
LEVELS = (1, 2)
"""Layers of QueCC's keys and values in a tower of three layers: 12, 16, 22 and 23 of 23."""


def made_by_hand(
    model: Any, ids: list[int], pixels: Tensor, one: Compressor, side: int, prompt: int
) -> tuple[Tensor, list[int]]:
    """Projected tokens ``[S, D]`` and the place of each in its picture.

    Args:
        model: a tiny LLaVA.
        ids: of the prompt and what follows it.
        pixels: ``[1, 3, H, W]``.
        one: the compressor.
        side: of the grid.
        prompt: length of the prompt.
    """
    if one.name in TOWER:
        return inside_by_hand(model, pixels, one)
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    features = hidden[-1][0, 1:]
    if isinstance(one, PruMerge):
        tokens, sources = _prumerge(model, hidden[-2], features, one)
        return model.model.multi_modal_projector(tokens), sources
    count = int(one.budget(side * side) ** 0.5)
    middle = [((2 * cell + 1) * side) // (2 * count) for cell in range(count)]
    sources = [row * side + column for row in middle for column in middle]
    if isinstance(one, Pool):
        projected = model.model.multi_modal_projector(features).view(side, side, -1)
        step = side // count
        cells = [
            projected[r : r + step, c : c + step].flatten(0, 1)
            for r in range(0, side, step)
            for c in range(0, side, step)
        ]
        pooled = [cell.mean(0) if one.kind == "average" else cell.amax(0) for cell in cells]
        return torch.stack(pooled), sources
    if isinstance(one, TokenFLEX):
        projected = model.model.multi_modal_projector(features)
        if one.weights == "none":
            return slow.pooled(projected, side, count), sources
        return slow.tokenflex(one._network.state_dict(), features, side, count), sources
    assert isinstance(one, QueCC)
    if one.weights == "none":
        return model.model.multi_modal_projector(slow.pooled(features, side, count)), sources
    words = ids[max(i for i, token in enumerate(ids) if token == 4) + 1 : prompt]
    text = model.model.language_model
    question = text(input_ids=torch.tensor([words]), use_cache=False).last_hidden_state[0, -1]
    # The tower's last hidden state is its third layer's output; hidden_states begin with the input.
    levels = torch.cat([hidden[layer + 1][0, 1:] for layer in LEVELS], -1)
    state = one._network.state_dict()
    return slow.quecc(state, features, levels, question, side, side // count, 4)[0], sources


def _prumerge(
    model: Any, before: Tensor, features: Tensor, one: PruMerge
) -> tuple[Tensor, list[int]]:
    """Kept tokens with their likes, and the rest, token by token."""
    layer = model.model.vision_tower.encoder.layers[-1]
    normed = layer.layer_norm1(before)[0]
    queries, keys = layer.self_attn.q_proj(normed), layer.self_attn.k_proj(normed)
    paid = (queries[0] @ keys.T / keys.shape[1] ** 0.5).softmax(0)[1:]
    keys, number = keys[1:], len(features)
    left = one.budget(number) - 1
    spread = left // 2 if one.plus else 0
    order = sorted(range(number), key=lambda i: -float(paid[i]))
    best = order[: left - spread]
    others = [i for i in range(number) if i not in best]
    even = [others[(2 * i + 1) * len(others) // (2 * spread)] for i in range(spread)]
    kept = [i for i in order if i in {*best, *even}]
    made = []
    for i in kept:
        rest = [j for j in range(number) if j != i]
        rest.sort(key=lambda j: -float(torch.cosine_similarity(keys[i], keys[j], dim=0)))
        made.append(features[i] + sum(paid[j] * features[j] for j in rest[: one.neighbours]))
    gone = [j for j in order if j not in kept]
    made.append(sum(paid[j] * features[j] for j in gone))
    return torch.stack(made), [*kept, gone[0]]


def inside_by_hand(model: Any, pixels: Tensor, one: Compressor) -> tuple[Tensor, list[int]]:
    """Of methods that shorten the tower from inside: 36 patches, 9 left, three layers."""
    projector = model.model.multi_modal_projector
    if isinstance(one, ToMe) and one.variant == "post":
        patches = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        tokens, _ = slow_tower.tome_post(projector(patches[0, 1:]), 9)
        return torch.stack([token.value for token in tokens]), [token.place for token in tokens]
    if isinstance(one, ToMe):
        left = {"constant": (27, 18, 9), "decreasing": (18, 9, 9)}[one.schedule]
        tokens, _ = slow_tower.tome(model, pixels, left)
        if one.order == "spatial":
            tokens = sorted(tokens, key=lambda token: token.place)
    elif one.name == "attentive_removal":
        tokens, _ = slow_tower.attentive(model, pixels, 9)
    else:
        tokens, _ = slow_tower.sparsifiner(model, pixels, {1: 18, 2: 9})
    features = torch.stack([token.value for token in tokens])
    return projector(features), [token.place for token in tokens]
