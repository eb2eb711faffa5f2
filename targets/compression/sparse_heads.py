"""Which columns each head of an attention layer keeps, and its attention over only those.

B rows, N heads, n columns, E head width, S columns of the shortened sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from targets.compression.layout import ImageSlots
from targets.compression.raters import compact
from targets.compression.scoring import precise, top_k_mask

_TINY = 1e-8


@dataclass(frozen=True, slots=True)
class Columns:
    """The part each column of a prompt plays; bool ``[B, n]``.

    Attributes:
        live: may be attended to.
        prompt: live, and no answer; only these are gathered.
        window: the last columns of the prompt, whose queries rate.
        free: columns heads may drop.
        last: column of the last prompt token.
    """

    live: Tensor
    prompt: Tensor
    window: Tensor
    free: Tensor
    last: int

    @staticmethod
    def of(
        slots: ImageSlots, live: Tensor, last: int, window: int, *, images_only: bool
    ) -> Columns:
        """The parts of the columns of a prompt.

        Args:
            slots: where the images are.
            live: bool ``[B, n]``.
            last: column of the last prompt token.
            window: how many columns rate, at most.
            images_only: only visual tokens may be dropped, and only text behind them rates (the
                last column where there is none); else everything in front of the window.
        """
        rows, length = live.shape
        prompt = live & (torch.arange(length, device=live.device) <= last)
        image = slots.spread(slots.alive.long(), length, rows).bool() & prompt
        raters = prompt
        if images_only:
            behind = prompt & (_from_the_end(image) == 0)
            raters = torch.where(behind.any(1, keepdim=True), behind, prompt)
            window_of = torch.where(behind.any(1), window, 1)[:, None]
        else:
            window_of = torch.full((rows, 1), window, device=live.device)
        rating = raters & (_from_the_end(raters) <= window_of)
        may = image if images_only else prompt & image.any(1, keepdim=True)
        return Columns(live, prompt, rating, may & ~rating, last)

    def visible(self, columns: Tensor, allowed: Tensor | None) -> Tensor:
        """What query columns ``[B, R]`` may attend to, bool ``[B, R, n]``."""
        length = self.live.shape[1]
        if allowed is None:
            seen = torch.arange(length, device=columns.device) <= columns[..., None]
        else:
            seen = allowed.gather(1, columns[..., None].expand(*columns.shape, length))
        return seen & self.live[:, None]


def _from_the_end(columns: Tensor) -> Tensor:
    """How many True there are from each column on, ``[B, n]``."""
    return columns.long().flip(1).cumsum(1).flip(1)


def window_mass(
    queries: Tensor,
    keys: Tensor,
    scaling: float,
    columns: Columns,
    allowed: Tensor | None,
    kernel: int,
) -> Tensor:
    """Smoothed attention of the window to each free column, ``[B, N, n]``; 0 elsewhere.

    Mean over the window's queries of the softmax over all they may attend to, then a moving average
    over the columns in front of the window, which counts zeros beyond their ends.

    Args:
        queries: ``[B, N, R, E]`` of the window's columns, in the order of `compact`.
        keys: ``[B, N, n, E]``.
        scaling: factor on query · key.
        columns: what plays which part.
        allowed: bool ``[B, n, n]`` where attention is not causal.
        kernel: odd width of the moving average.
    """
    where, real = compact(columns.window)
    logits = precise(queries @ keys.transpose(2, 3)) * scaling
    visible = columns.visible(where, allowed)[:, None]
    paid = logits.masked_fill(~visible, torch.finfo(logits.dtype).min).softmax(-1)
    count = real.sum(1).clamp_min(1)[:, None, None]
    mass = (paid * real[:, None, :, None]).sum(2) / count
    earlier = columns.prompt & ~columns.window
    mass = mass.masked_fill(~earlier[:, None], 0)
    # One after the other at the right end, so that padding and dropped columns take no part.
    order = earlier.long().argsort(dim=1, stable=True)[:, None].expand_as(mass)
    smooth = torch.nn.functional.avg_pool1d(mass.gather(2, order), kernel, 1, kernel // 2)
    smooth = torch.zeros_like(mass).scatter(2, order, smooth)
    return smooth.masked_fill(~columns.free[:, None], 0)


def shares(mass: Tensor) -> Tensor:
    """The mean over heads of ``[B, N, n]``, as shares of its sum: ``[B, n]``."""
    mean = mass.mean(1)
    return mean / (mean.sum(-1, keepdim=True) + _TINY)


@torch.no_grad()
def covered_number(share: Tensor, free: Tensor, coverage: float) -> Tensor:
    """Columns that may go: the least ones, as many as together stay below `coverage`, and one more.

    Args:
        share: ``[B, n]``.
        free: bool ``[B, n]``.
        coverage: share of the attention that may be lost.

    Returns:
        ``[B]``; 0 where even the least one has that share.
    """
    rising = share.masked_fill(~free, torch.inf).sort(dim=1).values
    number = (rising.cumsum(1) < coverage).sum(1)
    return torch.where(number > 0, number + 1, number)


@torch.no_grad()
def kept_by_heads(mass: Tensor, columns: Columns, number: Tensor) -> Tensor:
    """Prompt columns each head keeps, bool ``[B, N, n]``: all but its own `number` least ones."""
    heads = mass.shape[1]
    free = columns.free[:, None].expand_as(mass)
    left = (columns.free.sum(1) - number).repeat_interleave(heads)
    best = top_k_mask(mass.flatten(0, 1), left, free.flatten(0, 1)).view_as(mass)
    return columns.prompt[:, None] & (~free | best)


def short_attention(
    parts: tuple[Tensor, Tensor, Tensor],
    kept: Tensor,
    columns: Columns,
    allowed: Tensor | None,
    bias: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of each head among the columns it keeps, zero for the others: ``[B, N, n, E]``.

    Answer columns, which decoding would let attend to the whole cache, see everything.

    Args:
        parts: queries, keys and values ``[B, N, n, E]``.
        kept: bool ``[B, N, n]``, equally many in all heads of a row.
        columns: what plays which part.
        allowed: bool ``[B, n, n]`` where attention is not causal.
        bias: ``[B, n]`` added to the logits of each column, or None.
        scaling: factor on query · key.
        dropout: of attention weights.
    """
    count = kept[:, 0].sum(1)
    size = int(count.amax())
    # Kept columns in their order at the right end; shorter rows are filled up in front.
    index = kept.long().argsort(dim=2, stable=True)[:, :, kept.shape[2] - size :]
    real = torch.arange(size, device=index.device) >= size - count[:, None]
    wide = index[..., None].expand(*index.shape, parts[0].shape[-1])
    queries, keys, values = (part.gather(2, wide) for part in parts)
    mask = _short_mask(index, real, allowed, bias, parts[0].dtype)
    attend = torch.nn.functional.scaled_dot_product_attention
    made = attend(queries, keys, values, mask, dropout, mask is None, scale=scaling)
    made = made.masked_fill(~real[:, None, :, None], 0)
    out = torch.zeros_like(parts[0]).scatter(2, wide, made)
    first = columns.last + 1
    if first == kept.shape[2]:
        return out
    after = torch.arange(first, kept.shape[2], device=index.device).expand(len(kept), -1)
    visible = columns.visible(after, allowed) | (after[..., None] == _numbers(kept))
    mask = _floating(visible[:, None], None if bias is None else bias[:, None, None], out.dtype)
    late = parts[0][:, :, first:]
    answers = attend(late, parts[1], parts[2], mask, dropout, scale=scaling)
    return torch.cat([out[:, :, :first], answers], 2)


def _short_mask(
    index: Tensor, real: Tensor, allowed: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """Mask ``[B, N or 1, S, S]``; None where plain causality is enough."""
    rows, heads, size = index.shape
    if allowed is None:
        if bool(real.all()) and bias is None:
            return None
        visible = torch.ones(size, size, dtype=torch.bool, device=index.device).tril()[None, None]
    else:
        row = torch.arange(rows, device=index.device)[:, None, None, None]
        visible = allowed[row, index[..., None], index[:, :, None]]
    # What only fills up looks at itself: a row of nothing has no softmax.
    itself = torch.eye(size, dtype=torch.bool, device=index.device)
    visible = (visible & real[:, None, None]) | itself
    if bias is None:
        return _floating(visible, None, dtype)
    columns = bias[:, None].expand(rows, heads, -1).gather(2, index)
    return _floating(visible, columns[:, :, None], dtype)


def _floating(visible: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    low = torch.finfo(dtype).min
    plain = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    plain = plain if bias is None else plain + bias.to(dtype)
    return plain.masked_fill(~visible, low)


def _numbers(kept: Tensor) -> Tensor:
    return torch.arange(kept.shape[2], device=kept.device)
