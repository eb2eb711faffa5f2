"""The networks of trained compressors once more: loops over places, written from their formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    out = state[f"{name}.weight"] @ x
    return out + state[f"{name}.bias"] if f"{name}.bias" in state else out


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def norm(state: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean()
    scaled = centred / (centred.square().mean() + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def perceptron(state: State, name: str, x: Tensor) -> Tensor:
    """Linear, GELU, Linear, LayerNorm of one vector."""
    inner = gelu(linear(state, f"{name}.0", x))
    return norm(state, f"{name}.3", linear(state, f"{name}.2", inner))


def explainability(
    state: State, attention: Sequence[float], present: Sequence[bool]
) -> list[float]:
    """Distribution over the places of one image; absent ones are zero at every convolution."""
    places = range(len(attention))
    there = [place for place in places if present[place]]
    mean = sum(attention[place] for place in there) / len(there)
    values = {
        p: torch.tensor([math.log(attention[p] / mean + 0.05)], dtype=torch.float64) for p in there
    }
    for block in range(len([name for name in state if name.startswith("across.")]) // 2):
        kernel, bias = state[f"across.{block}.weight"], state[f"across.{block}.bias"]
        reach = kernel.shape[2] // 2
        out = {}
        for place in there:
            total = bias.clone()
            for step in range(-reach, reach + 1):
                if place + step in values:
                    total = total + kernel[:, 0, step + reach] * values[place + step]
            mixed = linear(state, f"point.{block}", total)
            out[place] = gelu(norm(state, f"norm.{block}", mixed) if block else mixed)
        values = out
    weights = {p: math.exp(float(linear(state, "head", values[p]))) for p in there}
    return [weights.get(place, 0.0) / sum(weights.values()) for place in places]


def quecc(
    state: State,
    features: Tensor,
    levels: Tensor,
    question: Tensor,
    side: int,
    stride: int,
    heads: int,
    residual: bool = True,
) -> tuple[Tensor, Tensor]:
    """Tokens ``[S, T]`` and attention ``[V]`` of one image with features ``[V, D]``."""
    asked = norm(state, "question_norm", linear(state, "question", question))
    queries = [perceptron(state, "query", feature + asked) for feature in features]
    tokens, paid = [], torch.zeros(len(features)).double()
    for top in range(0, side, stride):
        for left in range(0, side, stride):
            places = [(top + i) * side + left + j for i in range(stride) for j in range(stride)]
            weight = state[f"shrink.{stride}.weight"][:, 0].flatten(1)
            query = sum(weight[:, n] * queries[p] for n, p in enumerate(places))
            query = linear(state, "attend_query", query)
            read = []
            for head in range(heads):
                width = len(query) // heads
                here = slice(head * width, (head + 1) * width)
                logits, values = [], []
                for place in places:
                    key = perceptron(state, "key", levels[place])
                    value = perceptron(state, "value", levels[place])
                    key = linear(state, "attend_key", key)[here]
                    values.append(linear(state, "attend_value", value)[here])
                    logits.append(float(query[here] @ key) / math.sqrt(width))
                share = torch.tensor(logits, dtype=torch.float64).softmax(0)
                read.append(sum(s * v for s, v in zip(share, values, strict=True)))
                for place, one in zip(places, share, strict=True):
                    paid[place] += one / heads
            out = linear(state, "attend_out", torch.cat(read))
            if residual:
                out = out + sum(features[p] for p in places) / len(places)
            tokens.append(linear(state, "projector.2", gelu(linear(state, "projector.0", out))))
    return torch.stack(tokens), paid


def pooled(values: Tensor, side: int, count: int) -> Tensor:
    """Adaptive average pooling of one image ``[V, D]`` to ``[count², D]``."""
    cells = []
    for row in range(count):
        for column in range(count):
            inside = [
                values[r * side + c]
                for r in range(row * side // count, -(-(row + 1) * side // count))
                for c in range(column * side // count, -(-(column + 1) * side // count))
            ]
            cells.append(sum(inside) / len(inside))
    return torch.stack(cells)


def tokenflex(state: State, features: Tensor, side: int, count: int) -> Tensor:
    """Tokens ``[count², T]`` of one image ``[V, D]``."""
    tokens = []
    for cell in pooled(features, side, count):
        x = norm(state, "norm", cell)
        gate = linear(state, "gate", x)
        inner = gate * torch.sigmoid(gate) * linear(state, "value", x)
        tokens.append(linear(state, "out", inner))
    return torch.stack(tokens)
