"""Cuts at several layers, made by hand from the selections of a trace; one row, lists and loops."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from torch import Tensor

from targets.compression.base import Compressor, Cut, Selection, Stage
from targets.compression.trace import Trace

Token = tuple[int, int, Tensor]
"""Place (−1 for text), position id, hidden state."""


def plan(compressor: Compressor, layers: int) -> list[int]:
    """Visual tokens of an image at each layer."""
    cuts = [cut for cut in compressor.cuts(layers) if cut.drops]
    counts = []
    for layer in range(layers):
        made = [cut for cut in cuts if (cut.layer or 0) <= layer]
        counts.append(compressor.count(made[-1], tiny.TOKENS, layers) if made else tiny.TOKENS)
    return counts


def by_hand(
    model: Any, ids: list[int], pixels: Tensor, one: Compressor, trace: Trace, image: int
) -> Tensor:
    """Logits of a whole sequence of one row, without cache, mask or session."""
    core, first = model.model, ids.index(4)
    tower = core.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][0]
    embeds = model.get_input_embeddings()(torch.tensor(ids))
    tokens: list[Token] = [(-1, at, embeds[at]) for at in range(len(ids))]
    for place, feature in enumerate(core.multi_modal_projector(tower[1:])):
        tokens[first + place] = (place, first + place, feature)
    cuts = [cut for cut in one.cuts(len(core.language_model.layers)) if cut.drops]
    selections = [cut.selection.row(image) for cut in trace.cuts]
    assert len(selections) == len(cuts)
    for number, layer in enumerate(core.language_model.layers):
        for cut, selection in zip(cuts, selections, strict=True):
            if (cut.layer or 0) == number:
                tokens = after(model, tokens, one, cut, selection, tower)
        hidden = torch.stack([token[2] for token in tokens])[None]
        positions = torch.tensor([[token[1] for token in tokens]])
        rope = core.language_model.rotary_emb(hidden, positions)
        length = len(tokens)
        causal = torch.full((1, 1, length, length), torch.finfo(hidden.dtype).min).triu(1)
        hidden = layer(hidden, attention_mask=causal, position_embeddings=rope)
        tokens = [(*token[:2], one) for token, one in zip(tokens, hidden[0], strict=True)]
    out = torch.stack([token[2] for token in tokens])[None]
    return model.lm_head(core.language_model.norm(out))


def after(
    model: Any,
    tokens: list[Token],
    one: Compressor,
    cut: Cut,
    selection: Selection,
    tower: Tensor,
) -> list[Token]:
    """The sequence behind a cut."""
    living = sorted(place for place, _, _ in tokens if place >= 0)
    if selection.kept[0].nonzero().flatten().tolist() == living:
        return tokens
    image = {place: (at, value) for place, at, value in tokens if place >= 0}
    kept = [place for place in living if bool(selection.kept[0, place])]
    if cut.stage is Stage.VISION:
        made = towers(model, image, kept, selection, tower)
    else:
        made = [image[place] for place in kept]
        for target, joined in groups(selection):
            values = [image[place][1] for place in joined]
            made.append((image[target][0], summed_up(one.name, image[target][1], values)))
    if selection.targets is not None:  # new tokens take the first living places
        kept = living[: len(made)]
    start = next(at for at, token in enumerate(tokens) if token[0] >= 0)
    end = max(at for at, token in enumerate(tokens) if token[0] >= 0) + 1
    middle = [(place, *token) for place, token in zip(kept, made, strict=True)]
    found = [*tokens[:start], *middle, *tokens[end:]]
    if one.reindexes:
        found = [(place, at, value) for at, (place, _, value) in enumerate(found)]
    return found


def groups(selection: Selection) -> list[tuple[int, list[int]]]:
    """Each target and the places that joined it."""
    if selection.targets is None or selection.assignment is None:
        return []
    return [
        (target, (selection.assignment[0] == entry).nonzero().flatten().tolist())
        for entry, target in enumerate(selection.targets[0].tolist())
        if target >= 0
    ]


def summed_up(name: str, target: Tensor, joined: list[Tensor]) -> Tensor:
    """A new token in the way of each method."""
    total = sum(joined, torch.zeros_like(target))
    if name == "sparsevlm":
        return (target + total) / (1 + len(joined))
    return target + (total if name == "vasparse" else total / max(1, len(joined)))


def towers(
    model: Any,
    image: dict[int, tuple[int, Tensor]],
    kept: list[int],
    selection: Selection,
    tower: Tensor,
) -> list[tuple[int, Tensor]]:
    """CLS, dominant patches and contextual tokens, projected."""
    features, places = [tower[0], *(tower[1 + place] for place in kept)], [0, *kept]
    for target, joined in groups(selection):
        values = [tower[1 + place] for place in joined]
        features.append(summed_up("visionzip", tower[1 + target], values))
        places.append(target)
    projected = model.model.multi_modal_projector(torch.stack(features))
    return [(image[place][0], value) for place, value in zip(places, projected, strict=True)]
