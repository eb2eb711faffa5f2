"""Methods inside a CLIP tower once more: one picture, lists of tokens, loops over heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Matrix = list[list[float]]


@dataclass
class Token:
    """A token, the patch it stands for (−1 for CLS), and the patches in it."""

    value: Tensor
    place: int
    members: list[int] = field(default_factory=list)


def embedded(model: Any, pixels: Tensor) -> list[Token]:
    """CLS and patches in front of the first layer."""
    tower = model.model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))[0]
    return [Token(value, n - 1, [n - 1]) for n, value in enumerate(hidden)]


def split(values: Tensor, heads: int) -> Tensor:
    """``[S, N·E]`` as ``[N, S, E]``."""
    return values.view(len(values), heads, -1).transpose(0, 1)


def attend(
    block: Any, tokens: list[Token], bias: Sequence[float], open_: Any = None
) -> tuple[Tensor, Tensor]:
    """Add a layer's attention to the tokens; keys ``[N, S, E]`` and weights ``[N, S, S]``.

    Args:
        block: the layer.
        tokens: changed in place.
        bias: added to the logits of each key.
        open_: which keys each query of a head may attend to; all if None.
    """
    attention, heads = block.self_attn, block.self_attn.num_heads
    normed = block.layer_norm1(torch.stack([token.value for token in tokens]))
    queries, keys, values = (
        split(one(normed), heads) for one in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    weights, mixed = [], []
    for head in range(heads):
        rows = []
        for i in range(len(tokens)):
            logits = torch.stack(
                [
                    queries[head, i] @ keys[head, j] / math.sqrt(keys.shape[2]) + bias[j]
                    for j in range(len(tokens))
                ]
            )
            if open_ is not None:
                logits = torch.where(open_[head][i], logits, -torch.inf)
            rows.append(logits.softmax(0))
        weights.append(torch.stack(rows))
        mixed.append(weights[-1] @ values[head])
    made = attention.out_proj(torch.cat(mixed, 1))
    for token, one in zip(tokens, made, strict=True):
        token.value = token.value + one
    return keys, torch.stack(weights)


def think(block: Any, tokens: list[Token]) -> None:
    """Add a layer's perceptron."""
    for token in tokens:
        token.value = token.value + block.mlp(block.layer_norm2(token.value[None]))[0]


def cosines(vectors: Tensor) -> Matrix:
    return [[float(torch.cosine_similarity(one, two, dim=0)) for two in vectors] for one in vectors]


def merge_step(
    tokens: list[Token], metric: Tensor, merges: int
) -> tuple[list[Token], dict[int, float]]:
    """Bipartite matching: the tokens after it, and 1 − the nearest cosine of each place."""
    cosine = cosines(metric)
    evens, odds = range(0, len(tokens), 2), range(1, len(tokens), 2)
    free = [i for i in range(len(tokens)) if tokens[i].place >= 0]
    far = {}
    for i in free:
        others = [j for j in free if j % 2 != i % 2]
        near = max((cosine[i][j] for j in others), default=1.0)
        far.update(dict.fromkeys(tokens[i].members, 1 - near))
    if merges == 0:
        return tokens, far
    best = {i: max(odds, key=lambda j: (cosine[i][j], -j)) for i in evens if i in free}
    gone = sorted(best, key=lambda i: (-cosine[i][best[i]], i))[:merges]
    new = {j: Token(tokens[j].value * len(tokens[j].members), tokens[j].place, []) for j in odds}
    for j in odds:
        new[j].members = [*tokens[j].members]
    for i in gone:
        new[best[i]].value = new[best[i]].value + tokens[i].value * len(tokens[i].members)
        new[best[i]].members += tokens[i].members
    for one in new.values():
        one.value = one.value / len(one.members)
    return [tokens[i] for i in evens if i not in gone] + [*new.values()], far


def tome(model: Any, pixels: Tensor, left: Sequence[int]) -> tuple[list[Token], list[float]]:
    """Patches behind the last layer, and the score of each place.

    Args:
        model: a tiny LLaVA.
        pixels: ``[1, 3, H, W]``.
        left: patches left after each layer.
    """
    tokens = embedded(model, pixels)
    layers = model.model.vision_tower.encoder.layers
    places, scores = len(tokens) - 1, []
    for block, after in zip(layers, left, strict=True):
        bias = [math.log(len(token.members)) for token in tokens]
        keys, _ = attend(block, tokens, bias)
        tokens, far = merge_step(tokens, keys.mean(0), len(tokens) - 1 - after)
        scores.append(far)
        think(block, tokens)
    mean = [sum(far[place] for far in scores) / len(scores) for place in range(places)]
    return [token for token in tokens if token.place >= 0], mean


def tome_post(features: Tensor, final: int) -> tuple[list[Token], list[float]]:
    """Rounds of merging of the features ``[V, D]`` themselves."""
    tokens = [Token(value, n, [n]) for n, value in enumerate(features)]
    scores = []
    while not scores or len(tokens) > final:
        merges = min(len(tokens) - final, len(tokens) // 2)
        metric = torch.stack([token.value for token in tokens])
        tokens, far = merge_step(tokens, metric, merges)
        scores.append(far)
    mean = [sum(far[place] for far in scores) / len(scores) for place in range(len(features))]
    return tokens, mean


def best(score: Sequence[float], count: int) -> list[int]:
    """The `count` largest, in order of place; of equal ones, the first."""
    return sorted(sorted(range(len(score)), key=lambda n: (-score[n], n))[:count])


def attentive(
    model: Any, pixels: Tensor, count: int, block: int = 1
) -> tuple[list[Token], list[float]]:
    """Two passes; patches behind the last layer of the second, and the score of each place."""
    layers = model.model.vision_tower.encoder.layers
    tokens, found = embedded(model, pixels), []
    for layer in layers:
        _, weights = attend(layer, tokens, [0.0] * len(tokens))
        found += [weights[head, 0, 1:] for head in range(len(weights))]
        think(layer, tokens)
    score = (sum(found[1:], found[0]) / len(found)).tolist()
    side = round(len(score) ** 0.5)
    cells = [(n // side // block, n % side // block) for n in range(len(score))]
    groups = {cell: [n for n, one in enumerate(cells) if one == cell] for cell in cells}
    means = {cell: sum(score[n] for n in group) / len(group) for cell, group in groups.items()}
    names = sorted(groups)
    chosen = [names[i] for i in best([means[name] for name in names], count // block**2)]
    kept = sorted(n for name in chosen for n in groups[name])
    first = embedded(model, pixels)
    tokens = [first[0], *(first[1 + n] for n in kept)]
    for layer in layers:
        attend(layer, tokens, [0.0] * len(tokens))
        think(layer, tokens)
    return tokens[1:], [means[cell] for cell in cells]


def connections(
    state: dict[str, Tensor], layer: int, block: Any, tokens: list[Token], share: float
) -> tuple[Any, list[Tensor]]:
    """Open keys of each head and query, and the approximate attention."""
    heads = block.self_attn.num_heads
    normed = block.layer_norm1(torch.stack([token.value for token in tokens]))
    queries = split(block.self_attn.q_proj(normed), heads)
    keys = split(block.self_attn.k_proj(normed), heads)

    def part(name: str) -> Tensor:
        return state[f"predictors.{layer}.{name}"]

    here = [token.place + 1 for token in tokens]
    open_, guesses = [], []
    for head in range(heads):
        small = []
        for row in part("down"):
            mixed = sum((row[n] * keys[head, i] for i, n in enumerate(here)), keys[head, 0] * 0)
            small.append(part("key.weight") @ mixed + part("key.bias"))
        guess = []
        for query in queries[head]:
            asked = part("query.weight") @ query + part("query.bias")
            logits = torch.stack([asked @ one / math.sqrt(len(query)) for one in small])
            back = part("up")[:, here]
            guess.append(logits.softmax(0) @ torch.where(back.abs() > 1e-4, back, 0))
        wanted = math.ceil(share * len(tokens) - 1e-9)
        rows = []
        for i, row in enumerate(guess):
            chosen = best(row.tolist(), len(tokens) if i == 0 else wanted)
            rows.append(torch.tensor([j in chosen for j in range(len(tokens))]))
        open_.append(rows)
        guesses.append(torch.stack(guess))
    return open_, guesses


def sparsifiner(
    model: Any,
    pixels: Tensor,
    after: dict[int, int],
    share: float = 1.0,
    state: dict[str, Tensor] | None = None,
) -> tuple[list[Token], list[float]]:
    """Patches behind the last layer, and the score of each place.

    Args:
        model: a tiny LLaVA.
        pixels: ``[1, 3, H, W]``.
        after: patches left by each pruning layer.
        share: of keys a query attends to.
        state: of the predictor; None where all attend to all.
    """
    tokens = embedded(model, pixels)
    score = [0.0] * (len(tokens) - 1)
    for number, block in enumerate(model.model.vision_tower.encoder.layers):
        open_ = None if state is None else connections(state, number, block, tokens, share)[0]
        _, weights = attend(block, tokens, [0.0] * len(tokens), open_)
        if number in after:
            paid = weights.mean(0)[0, 1:].tolist()
            for token, one in zip(tokens[1:], paid, strict=True):
                score[token.place] += one / len(after)
            tokens = [tokens[0], *(tokens[1 + n] for n in best(paid, after[number]))]
        think(block, tokens)
    return tokens[1:], score
