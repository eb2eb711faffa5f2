"""Prompt columns whose attention rates visual tokens, and that attention row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from targets.compression.base import Seen
from targets.compression.scoring import gather_rows
from targets.compression.sight import TextSight
from targets.errors import CompressionError

_REMEMBERED = "raters"


def sight_of(seen: Seen) -> TextSight:
    """The prompt around the images.

    Raises:
        CompressionError: where there is none to see.
    """
    if seen.text is None:
        raise CompressionError(
            f"this score needs the prompt at a language-model layer; at {seen.cut.stage} there is "
            "none"
        )
    return seen.text


def text_rows(text: TextSight) -> Tensor:
    """Text behind the last image of each row, bool ``[B, n]``; the last column where none is."""
    behind = text.words_after()
    last = torch.zeros_like(behind)
    last[:, text.last] = True
    return torch.where(behind.any(1, keepdim=True), behind, last)


def compact(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of ``rows [B, n]`` one after the other: indices ``[B, R]`` and which are real."""
    count = rows.sum(1)
    width = max(1, int(count.amax()))
    columns = (~rows).long().argsort(dim=1, stable=True)[:, :width]
    return columns, torch.arange(width, device=rows.device) < count[:, None]


def raters(seen: Seen) -> Tensor:
    """Text columns that say most about the image, bool ``[B, n]``; chosen once per prompt.

    For each visual token a softmax over the text behind the image of ``v · t``, both as they enter
    the language model; raters are the text tokens above the mean of its average over the image.
    Where all are equal, all of them rate; where no text follows the image, the last column does.
    """
    text = sight_of(seen)
    rows = text_rows(text)
    place = (text.words.long().cumsum(1) - 1).clamp_min(0)
    if _REMEMBERED not in seen.memory:
        found = _above_mean(seen, text, rows)
        # Columns move when tokens go, the order of the words does not.
        width = int(place.amax()) + 1
        packed = torch.zeros(len(rows), width, dtype=torch.long, device=rows.device)
        packed.scatter_add_(1, place, (found & text.words).long())
        seen.memory[_REMEMBERED] = packed > 0
    found = seen.memory[_REMEMBERED].gather(1, place) & text.words
    return torch.where(found.any(1, keepdim=True), found, rows)


def rates(seen: Seen) -> tuple[Tensor, Tensor]:
    """How much each text token rates by, ``[B, R]``, live, in the order of `compact`; sums to 1.

    Also which are real, bool ``[B, R]``. Raters are the tokens above the mean of their row.
    """
    text = sight_of(seen)
    return _rates(seen, text, text_rows(text))


def _rates(seen: Seen, text: TextSight, rows: Tensor) -> tuple[Tensor, Tensor]:
    columns, real = compact(rows)
    words = precise(gather_rows(text.embeds, columns))[seen.rows]  # [I, R, D]
    tokens = precise(text.gather(text.embeds)).masked_fill(~seen.valid[..., None], 0)
    logits = tokens @ words.transpose(1, 2)
    logits = logits.masked_fill(~real[seen.rows][:, None], torch.finfo(logits.dtype).min)
    share = (logits.softmax(-1) * seen.valid[..., None]).sum(1)  # [I, R]
    batch = len(rows)
    total = share.new_zeros(batch, share.shape[1]).index_add(0, seen.rows, share)
    number = share.new_zeros(batch).index_add(0, seen.rows, seen.valid.sum(1).to(share.dtype))
    return (total / number.clamp_min(1)[:, None]).masked_fill(~real, 0), real


@torch.no_grad()
def _above_mean(seen: Seen, text: TextSight, rows: Tensor) -> Tensor:
    columns, _ = compact(rows)
    mean, real = _rates(seen, text, rows)
    above = real & (mean > mean.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1))
    above = torch.where(above.any(1, keepdim=True), above, real)
    return torch.zeros_like(rows).scatter(1, columns, above)


def all_keys(text: TextSight) -> Tensor:
    """Keys of all columns at this layer, ``[B, N, n, E]``, after rotary embedding."""
    if text.rope is None:
        raise CompressionError("attention of the language model exists at its layers only")
    return text.family.text_keys(text.layer, text.hidden, text.rope)


def attention_rows(
    text: TextSight, columns: Tensor, keys: Tensor, heads: slice = slice(None)
) -> Tensor:
    """Attention that query columns ``[B, R]`` pay, softmax over all they may attend to.

    Args:
        text: the prompt at a layer.
        columns: ``[B, R]``.
        keys: from `all_keys`.
        heads: those asked for.

    Returns:
        ``[B, N, R, n]``, at least float32.
    """
    if text.rope is None:
        raise CompressionError("attention of the language model exists at its layers only")
    family, layer, keys = text.family, text.layer, keys[:, heads]
    query = family.text_queries(layer, text.hidden, text.rope, columns)[:, heads]
    logits = query @ keys.transpose(2, 3)
    logits = precise(logits) * family.text_scaling(layer)
    cap = family.text_softcap(layer)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    visible = text.visible(columns)[:, None]
    return logits.masked_fill(~visible, torch.finfo(logits.dtype).min).softmax(-1)


def precise(values: Tensor) -> Tensor:
    """Half precision becomes float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def at_images(text: TextSight, values: Tensor) -> Tensor:
    """Values ``[B, …, n]`` of the columns at the visual tokens: ``[I, …, V]``."""
    return text.gather(values.movedim(-1, 1)).movedim(1, -1)
