"""Prompts at the input of a language-model layer, built by hand, and their attention in loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from seen import grid, seen
from torch import Tensor

from targets.compression.base import Cut, Seen, Stage
from targets.compression.layout import find_slots
from targets.compression.sight import TextSight
from targets.families.base import rotate

HEADS, WIDTH, DIM = 4, 6, 10


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Attention:
    """What a score asks of a model's adapter: one layer with random projections."""

    def __init__(self, seed: int, heads: int) -> None:
        self.query = normal(heads, DIM, WIDTH, seed=seed + 1) * DIM**-0.5
        self.key = normal(heads, DIM, WIDTH, seed=seed + 2) * DIM**-0.5
        self.layers = [SimpleNamespace(self_attn=SimpleNamespace(head_dim=WIDTH))] * 99

    def text_keys(self, layer: int, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        del layer
        keys = torch.einsum("bnd,hde->bhne", hidden, self.key.to(hidden.dtype))
        return rotate(keys, rope[0][:, None], rope[1][:, None])

    def text_queries(
        self, layer: int, hidden: Tensor, rope: tuple[Tensor, Tensor], columns: Tensor
    ) -> Tensor:
        del layer
        queries = torch.einsum("bnd,hde->bhne", hidden, self.query.to(hidden.dtype))
        queries = rotate(queries, rope[0][:, None], rope[1][:, None])
        return queries.gather(2, columns[:, None, :, None].expand(-1, queries.shape[1], -1, WIDTH))

    def text_scaling(self, layer: int) -> float:
        del layer
        return 1.5

    def text_softcap(self, layer: int) -> float | None:
        del layer
        return None


@dataclass(frozen=True)
class Prompt:
    """A batch at a layer: what a compressor sees, and what loops need to see the same.

    Attributes:
        seen: as the session would make it.
        columns: of each image, the columns of its living tokens.
    """

    seen: Seen
    columns: list[list[int]]

    @property
    def text(self) -> TextSight:
        assert self.seen.text is not None
        return self.seen.text

    def words(self, row: int) -> list[int]:
        """Columns of the text behind the last image of a row."""
        last = max(c for i, cs in enumerate(self.columns) if self.seen.rows[i] == row for c in cs)
        return [c for c in self.text.words[row].nonzero().flatten().tolist() if c > last]

    def attention(self, row: int, head: int, column: int) -> dict[int, float]:
        """What a column pays to each that it may attend to, in plain numbers."""
        text = self.text
        where = torch.tensor([[column]] * len(text.hidden))
        query = text.family.text_queries(0, text.hidden, text.rope, where)[row, head, 0]
        keys = text.family.text_keys(0, text.hidden, text.rope)[row, head]
        may = [j for j in range(column + 1) if bool(text.live[row, j])]
        weights = [math.exp(1.5 * float(query @ keys[j])) for j in may]
        return {j: w / sum(weights) for j, w in zip(may, weights, strict=True)}

    def mean_paid(self, image: int, rows: Sequence[int]) -> list[float]:
        """Attention each living token of an image gets: mean over heads and query columns."""
        row, heads = int(self.seen.rows[image]), self.text.family.query.shape[0]  # type: ignore[attr-defined]
        total = [0.0] * len(self.columns[image])
        for head in range(heads):
            for column in rows:
                paid = self.attention(row, head, column)
                for place, at in enumerate(self.columns[image]):
                    total[place] += paid.get(at, 0.0) / heads / len(rows)
        return total


def prompt(
    rows: Sequence[Sequence[int]],
    counts: int | Sequence[int],
    *,
    seed: int = 0,
    dead: Sequence[tuple[int, int]] = (),
    answers: int = 0,
    heads: int = HEADS,
    cut: Cut | None = None,
    deepest: int = 32,
    attends: bool = False,
    **more: Any,
) -> Prompt:
    """A left-padded batch.

    Args:
        rows: for each row lengths of text, image, text, image, …
        counts: tokens to keep of each image.
        seed: of hidden states and weights.
        dead: places (image, place) that were dropped before; they hold nonsense.
        answers: further columns behind the prompt.
        heads: of the layer.
        cut: where this is.
        deepest: layers of the language model.
        attends: give attention, query and keys of the last prompt token.
        more: other fields of `Seen`.
    """
    lengths = [sum(row) for row in rows]
    width = max(lengths) + answers
    images, layouts = torch.zeros(len(rows), width, dtype=torch.bool), []
    live = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        start = width - answers - sum(row)
        live[number, start:] = True
        for place, length in enumerate(row):
            if place % 2:
                images[number, start : start + length] = True
                layouts.append(grid(length))
            start += length
    slots = find_slots(images, layouts)
    assert slots is not None
    kept = torch.ones_like(slots.alive)
    for image, place in dead:
        live[slots.rows[image], slots.columns[image, place]] = False
        kept[image, place] = False
    slots = slots.after(kept, None)
    own = [normal(length, DIM, seed=seed + 10 * n) for n, length in enumerate(lengths)]
    tail = [normal(answers, DIM, seed=seed + 10 * n + 5) for n in range(len(rows))]
    pad = [torch.full((width - answers - n, DIM), torch.nan, dtype=torch.float64) for n in lengths]
    hidden = torch.stack([torch.cat(one) for one in zip(pad, own, tail, strict=True)])
    hidden = hidden.masked_fill(~live[..., None], 1e3)  # a dead column holds anything
    embeds = torch.stack([one.roll(1, -1) for one in hidden])
    family: Any = Attention(seed, heads)
    rates = torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64)
    turns = (live.long().cumsum(1) - 1).clamp_min(0)[..., None] * rates
    turns = torch.cat([turns, turns], -1)
    rope, last = (turns.cos(), turns.sin()), width - 1 - answers
    before = torch.arange(width) <= last
    words = live & ~images & before
    text = TextSight(family, 0, hidden, embeds, rope, live, words, slots, last)
    fields: dict[str, Any] = {"text": text, "rows": slots.rows, "deepest": deepest}
    if attends:
        fields |= last_row(text)
    fields["cut"] = cut or Cut(Stage.LAYER, 8)
    found = seen(
        slots.gather(hidden), counts, valid=slots.alive, layouts=layouts, **{**fields, **more}
    )
    columns = [
        slots.columns[image][slots.alive[image]].tolist() for image in range(len(slots.rows))
    ]
    return Prompt(found, columns)


def last_row(text: TextSight) -> dict[str, Tensor]:
    """Attention, query and keys as the session gives them to a cut that `attends`."""
    rows = torch.zeros_like(text.live)
    rows[:, text.last] = True
    column = torch.full((len(rows), 1), text.last)
    assert text.rope is not None
    query = text.family.text_queries(0, text.hidden, text.rope, column)[:, :, 0]
    return {
        "attention": text.attention(rows),
        "query": query[text.slots.rows],
        "keys": text.keys(),
    }


ROWS = ((2, 9, 4), (1, 5, 2, 7, 3), (3, 12, 1))
"""One image, two images, one image and a single word."""
