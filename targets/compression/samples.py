"""Samples of an in-context prompt: each image with the text behind it, the last one the query."""

from __future__ import annotations

import torch
from torch import Tensor

from targets.compression.base import Seen
from targets.compression.raters import precise
from targets.compression.scoring import top_k_mask
from targets.compression.sight import TextSight


def is_query(rows: Tensor) -> Tensor:
    """Whether an image is the last one of its row, bool ``[I]``, from the row of each image."""
    following = torch.nn.functional.pad(rows[1:], (0, 1), value=-1)
    return rows != following


def spans(text: TextSight) -> tuple[Tensor, Tensor, Tensor]:
    """First and last column of each image, and where the next one of its row begins, ``[I]``."""
    slots, length = text.slots, text.live.shape[1]
    first = slots.columns.masked_fill(~slots.alive, length).amin(1)
    last = slots.columns.masked_fill(~slots.alive, -1).amax(1)
    following = torch.nn.functional.pad(first[1:], (0, 1), value=length)
    return first, last, following.masked_fill(is_query(slots.rows), length)


def words_of(text: TextSight) -> Tensor:
    """Text between each image and the next, bool ``[I, n]``; all of the row where none is."""
    _, last, following = spans(text)
    column = torch.arange(text.live.shape[1], device=last.device)
    every = text.words[text.slots.rows]
    found = every & (column > last[:, None]) & (column < following[:, None])
    return torch.where(found.any(1, keepdim=True), found, every)


def text_means(text: TextSight) -> Tensor:
    """Mean input of the text of each image, ``[I, D]``."""
    return _means(text, words_of(text))


def query_mean(text: TextSight) -> Tensor:
    """For each image the mean input of its row's query sample, image and text, ``[I, D]``."""
    rows, query = text.slots.rows, is_query(text.slots.rows)
    images = text.slots.spread(
        (text.slots.alive & query[:, None]).long(), text.live.shape[1], len(text.live)
    )
    found = torch.zeros_like(text.live)
    found[rows[query]] = words_of(text)[query]
    return _means(text, (found | images.bool())[rows])


def context_mean(text: TextSight) -> Tensor:
    """For each image the mean input of its row's context, ``[I, D]``.

    That is what is left from the first image of the row to the query image; for a row with one
    image, its text.
    """
    rows, length = text.slots.rows, text.live.shape[1]
    query, (first, _, _) = is_query(rows), spans(text)
    begin = torch.full((len(text.live),), length, device=rows.device)
    begin = begin.scatter_reduce(0, rows, first, "amin")[:, None]
    end = torch.zeros_like(begin[:, 0])
    end[rows[query]] = first[query]
    column = torch.arange(length, device=rows.device)
    shown = text.words | text.slots.image_columns(length, len(text.live))
    found = shown & text.live & (column >= begin) & (column < end[:, None])
    alone = torch.zeros_like(found)
    alone[rows[query]] = words_of(text)[query]
    return _means(text, torch.where(found.any(1, keepdim=True), found, alone)[rows])


def cosine(seen: Seen, directions: Tensor) -> Tensor:
    """Cosine of the tokens of each image with one direction ``[I, D]``: ``[I, V]``, 0 if invalid.

    At least float32.
    """
    tokens = precise(seen.features).masked_fill(~seen.valid[..., None], 0)
    tokens = torch.nn.functional.normalize(tokens, dim=-1)
    directions = torch.nn.functional.normalize(directions, dim=-1)
    return (tokens @ directions[..., None]).squeeze(-1)


@torch.no_grad()
def shared(score: Tensor, quota: Tensor, seen: Seen) -> Tensor:
    """The best tokens of all context images of a row together, bool ``[I, V]``.

    Each of these images keeps its best token; query images keep all they have.

    Args:
        score: ``[I, V]``.
        quota: long ``[I]``; a row keeps the sum over its context images.
        seen: valid places and rows.
    """
    query, batch = is_query(seen.rows)[:, None], int(seen.rows.amax()) + 1
    open_ = seen.valid & ~query
    row = seen.rows[:, None].expand_as(open_).masked_fill(~open_, batch).flatten()
    best = top_k_mask(score, 1, seen.valid).flatten()
    # By row, of these the best of an image first, then by score; equal ones keep their order.
    order = score.flatten().argsort(descending=True, stable=True)
    order = order[(~best[order]).long().argsort(stable=True)]
    order = order[row[order].argsort(stable=True)]
    size = torch.bincount(row, minlength=batch + 1)
    place = torch.arange(len(order), device=order.device) - (size.cumsum(0) - size)[row[order]]
    wanted = torch.zeros_like(size).index_add(0, seen.rows, quota.masked_fill(query[:, 0], 0))
    taken = torch.zeros_like(best)
    taken[order] = place < wanted[row[order]]
    return torch.where(query, seen.valid, taken.view_as(open_) & open_)


def _means(text: TextSight, columns: Tensor) -> Tensor:
    """Mean input over columns ``[I, n]`` of each image's row: ``[I, D]``, at least float32."""
    hidden = precise(text.hidden).masked_fill(~text.live[..., None], 0)[text.slots.rows]
    weight = columns.to(hidden.dtype) / columns.sum(1, keepdim=True).clamp_min(1)
    return (weight[:, None] @ hidden).squeeze(1)
