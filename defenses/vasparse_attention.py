"""What VASparse does inside attention: whom the present token attends to, and how much to sinks.

Pure functions on the attention of answer positions, and the rule that applies them. Shapes: B rows,
N heads, R answer positions, n key columns, E width of a head, C clusters.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from targets.compression.aggregation import density_peaks, members_of
from targets.compression.scoring import TINY
from targets.decoding import AttentionCall, AttentionRule
from targets.decoding.attention import softmax

Merge = Literal["none", "mean", "dpcknn_sum"]
_CHUNK = 128
_HALF = torch.finfo(torch.float32).min / 2


@dataclass(frozen=True, slots=True)
class SparseOptions:
    """Options of `SparseAttention`; see `defenses.vasparse.VASparse`."""

    keep: float
    saliency: float
    beta: float
    score_space: Literal["prob", "logit"]
    apply_on: Literal["logit", "prob"]
    merge: Merge


def selected(delta: Tensor, visible: Tensor | None, keep: float) -> Tensor:
    """The S largest δ of each head and position; of equal ones the first.

    Arg max of ``Σ M_i δ_i`` over M with ``Σ M_i = S``, which is Theorem 1's minimiser of Eq. 3.

    Args:
        delta: ``[B, N, R, n]``.
        visible: bool ``[B, N or 1, R, n]``, columns there are; None is all.
        keep: S as a share of them, rounded; at least one.

    Returns:
        bool, with exactly S True a position.
    """
    order, length = delta.detach(), delta.shape[-1]
    # Only what is dropped has to be put in order, which is little of it.
    if visible is None:
        number = _count(length, keep)
        if number == length:
            return torch.ones_like(order, dtype=torch.bool)
        count: int | Tensor = number
        lowest = _lowest(order, length - number + 1)
        last, bar = lowest[..., -1:], lowest[..., -2:-1]
        # Where asking costs nothing, ties are looked into only if one decides.
        if order.device.type == "cpu" and bool((last > bar).all()):
            return order >= last
        above = order > bar
    else:
        there = visible.sum(-1, keepdim=True)
        count = (there * keep).round().clamp_min(1)
        order = order.masked_fill(~visible, torch.inf)
        # A bound for what is dropped that need not be fetched from a device.
        lowest = _lowest(order, min(length, int(length * (1 - keep)) + 2))
        dropped = (there - count).long().expand(*order.shape[:-1], 1)
        bar = lowest.gather(-1, (dropped - 1).clamp_min(0))
        bar = bar.masked_fill(dropped <= 0, -torch.inf)
        above = (order > bar) & visible
    level = order == bar
    missing = count - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1) <= missing))


def _lowest(values: Tensor, number: int) -> Tensor:
    """The smallest of the last dimension, in order."""
    if values.device.type == "cpu" and values.dtype == torch.float32:
        # NumPy sorts all of them in half the time that torch takes for a tenth.
        return torch.from_numpy(np.sort(values.numpy(), axis=-1)[..., :number])
    return values.topk(number, largest=False).values


@functools.lru_cache(maxsize=256)
def _count(length: int, keep: float) -> int:
    """S, in the arithmetic of tensors."""
    return int((torch.tensor(length) * keep).round().clamp_min(1))


def straight_through(delta: Tensor, kept: Tensor, visible: Tensor) -> Tensor:
    """Zero forward; backward, the gradient of a sigmoid relaxation of the top-S.

    A kept column gets ``log sigmoid(log δ − θ)`` less its own value, θ midway between the last kept
    and the first dropped log δ of its position.
    """
    score = (delta + TINY).log()
    dropped = visible & ~kept
    worst = score.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
    best = score.masked_fill(~dropped, -torch.inf).amax(-1, keepdim=True)
    bar = torch.where(dropped.any(-1, keepdim=True), (worst + best.clamp_min(-1e4)) / 2, worst)
    gate = torch.nn.functional.logsigmoid(score - bar)
    return (gate - gate.detach()).masked_fill(~kept, 0)


def penalised(logits: Tensor, sinks: Tensor, beta: float, on: Literal["logit", "prob"]) -> Tensor:
    """Attention logits with sinks attended less: ``(1 + β) A − β W ∘ A`` (text below Eq. 7).

    Args:
        logits: A ``[B, N, R, n]``.
        sinks: W ``[B, R, n]``, which sums to 1.
        beta: β ≥ 0.
        on: ``prob`` multiplies the attention itself by ``1 + β − β W`` instead; the softmax that
            follows renormalises it.
    """
    factor = 1 + beta - beta * sinks[:, None]
    return logits * factor if on == "logit" else logits + factor.log()


def sums_to_one(values: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax ``[B, R, n]`` over the columns there are: W of Eq. 7 and P of Eq. 5."""
    if visible is None:
        return values.softmax(-1)
    return values.masked_fill(~visible, torch.finfo(values.dtype).min).softmax(-1)


@dataclass(frozen=True, slots=True)
class Extra:
    """Tokens that stand for several columns: keys, values ``[B, N, R, C, E]``, bool ``[…, C]``."""

    keys: Tensor
    values: Tensor
    real: Tensor


def merged(call: AttentionCall, dropped: Tensor, delta: Tensor, how: Merge) -> Extra | None:
    """Clusters of the dropped columns of each head and position; None where there are none.

    Args:
        call: whose keys and values are merged.
        dropped: bool ``[B, N, R, n]``.
        delta: ``[B, N, R, n]``; of equally dense columns the one with the larger counts as denser.
        how: ``mean`` makes one token, the mean; ``dpcknn_sum`` the sum of each cluster.
    """
    if how == "none" or not bool(dropped.any()):
        return None
    keys, values = (_by_heads(part, dropped) for part in (call.key, call.value))
    if how == "mean":
        return mean_of(keys, values, dropped)
    shape = dropped.shape
    flat, number = dropped.flatten(0, 2), dropped.sum(-1).flatten()
    flat_keys = keys[:, :, None].expand(*shape, -1).flatten(0, 2)
    flat_values = values[:, :, None].expand(*shape, -1).flatten(0, 2)
    count = torch.where(number > 0, ((number * 3) // 10 + 1) // 10 + 1, 0)
    groups = density_peaks(flat_keys, flat, count, delta.detach().flatten(0, 2))
    own_keys, more_keys, _ = members_of(flat_keys, groups)
    own_values, more_values, _ = members_of(flat_values, groups)
    split = shape[:3]
    return Extra(
        (own_keys + more_keys).view(*split, *own_keys.shape[1:]),
        (own_values + more_values).view(*split, *own_values.shape[1:]),
        (groups.targets >= 0).view(*split, -1),
    )


def mean_of(keys: Tensor, values: Tensor, members: Tensor) -> Extra:
    """One token for each head and position: the mean of its members.

    Args:
        keys: ``[B, N, n, E]``.
        values: ``[B, N, n, E]``.
        members: bool ``[B, N, R, n]``.
    """
    number = members.sum(-1, keepdim=True)
    weights = members / number.clamp_min(1)
    made = [(weights.to(part.dtype) @ part)[..., None, :] for part in (keys, values)]
    return Extra(made[0], made[1], number > 0)


def _by_heads(values: Tensor, like: Tensor) -> Tensor:
    """Grouped keys or values ``[B, M, n, E]``, one for each head ``[B, N, n, E]``."""
    return values.repeat_interleave(like.shape[1] // values.shape[1], dim=1)


def attended(call: AttentionCall, logits: Tensor, extra: Extra | None, factor: float) -> Tensor:
    """Output ``[B, R, N, E]`` of masked logits ``[B, N, R, n]``, with merged tokens beside.

    Args:
        call: whose values are summed up.
        logits: of the columns.
        extra: further tokens, or None.
        factor: on the attention logits of these.
    """
    if extra is None:
        return call.attend(logits.softmax(-1))
    dots = (call.answers()[..., None, :] * extra.keys).sum(-1).to(logits.dtype)
    beside = call.scaled(dots) * factor
    beside = beside.masked_fill(~extra.real, torch.finfo(logits.dtype).min)
    weights = torch.cat([logits, beside], -1).softmax(-1)
    width = logits.shape[-1]
    out = call.attend(weights[..., :width])
    more = (weights[..., width:, None] * extra.values).sum(-2)
    return out + more.transpose(1, 2).to(out.dtype)


@dataclass(slots=True)
class _Past:
    """Of a layer, over all columns so far: received attention and attention to the image."""

    sums: Tensor  # [B, n]
    mass: Tensor  # [B, n]


class SparseAttention(AttentionRule):
    """Selection, merging and the sink penalty at answer positions, in every layer.

    W and P come from plain attention, remembered layer by layer: W from what each column received
    so far, head mean; P from what each token paid to visual tokens, in the last head.

    Args:
        options: of the method.
    """

    def __init__(self, options: SparseOptions) -> None:
        self._options = options
        self._past: dict[int, _Past] = {}

    def layers(self, depth: int) -> Iterable[int]:
        """All."""
        return range(depth)

    def select(self, rows: Tensor) -> None:
        """Follow the cache."""
        self._past = {
            layer: _Past(one.sums[rows], one.mass[rows]) for layer, one in self._past.items()
        }

    def __call__(self, call: AttentionCall) -> Tensor:
        """Attention of the answer positions, changed."""
        options = self._options
        dots = call.dots(call.answers())
        logits, added = call.scaled(dots), call.answers_added()
        plain = softmax(logits, added)
        visible = None if added is None else (added > _HALF)
        sums, mass = self._advance(call, plain)
        there = None if visible is None else visible[:, 0]
        changed = logits
        if options.beta:
            sinks = sums_to_one(sums, there)
            changed = penalised(logits, sinks, options.beta, options.apply_on)
        if added is not None:
            changed = changed + added
        extra = None
        if options.keep < 1:
            paid = mass[:, None] if there is None else mass[:, None].expand_as(sums)
            salient = sums_to_one(paid, there)
            recall = plain if options.score_space == "prob" else dots
            delta = torch.addcmul(options.saliency * salient[:, None], recall, recall)
            kept = selected(delta, visible, options.keep)
            if delta.requires_grad:
                changed = changed + straight_through(delta, kept, _all(visible, kept))
            changed = torch.where(kept, changed, torch.finfo(changed.dtype).min)
            if options.merge != "none":
                extra = merged(call, _all(visible, kept) & ~kept, delta, options.merge)
        factor = 1 + options.beta if options.apply_on == "logit" else 1.0
        return call.put(attended(call, changed, extra, factor))

    def _advance(self, call: AttentionCall, plain: Tensor) -> tuple[Tensor, Tensor]:
        """Received attention at each position ``[B, R, n]``, attention to the image ``[B, n]``."""
        length, rows = call.key.shape[2], call.rows
        first = call.layer not in self._past or call.query.shape[2] > 1
        past = _of_prompt(call) if first else self._past[call.layer]
        before, received = past.sums, plain.mean(1)
        if before.shape[1] != length:  # of a cache that forgets, the last
            before = torch.nn.functional.pad(before, (0, 1))[:, -length:]
        sums = before[:, None] + (received if rows == 1 else received.cumsum(1))
        paid = (plain[:, -1] * call.columns.visual[:, None]).sum(-1)  # [B, R]
        mass = torch.cat([past.mass, paid], 1)[:, -length:]
        self._past[call.layer] = _Past(sums[:, -1], mass)
        return sums, mass


def _all(visible: Tensor | None, like: Tensor) -> Tensor:
    """Columns there are, bool ``[B, N, R, n]``."""
    return torch.ones_like(like) if visible is None else visible.expand_as(like)


def _of_prompt(call: AttentionCall) -> _Past:
    """Over the prompt in front of the first answer position: ``[B, n]`` and ``[B, n − R]``."""
    count, length = call.query.shape[2] - call.rows, call.key.shape[2]
    heads = call.query.shape[1]
    # Without a mask of the model's own nothing behind a query is seen, and need not be worked out.
    ordered = call.causal and call.mask is None and call.query.shape[2] == length
    sums = torch.zeros(len(call.query), length, device=call.query.device)
    paid = []
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        seen = stop if ordered else length
        logits = call.scaled(call.dots(call.query[:, :, start:stop], call.key[:, :, :seen]))
        added = call.added(start, stop)
        weights = softmax(logits, None if added is None else added[..., :seen])
        live = call.columns.live[:, start:stop].to(weights.dtype) / heads
        each = live[:, None].expand(-1, heads, -1).flatten(1)[:, None]  # [B, 1, N · r]
        received = (each @ weights.flatten(1, 2))[:, 0]
        sums = sums + torch.nn.functional.pad(received, (0, length - seen))
        paid.append((weights[:, -1] * call.columns.visual[:, None, :seen]).sum(-1))
    return _Past(sums, torch.cat(paid, 1) if paid else sums[:, :0])


class OldestMean(AttentionRule):
    """Generated tokens merge from the oldest on, in the first layer: what the released code does.

    Of every `interval` generated tokens the oldest tenth of all is one mean token.

    Args:
        interval: generated tokens between two merges, ≥ 1.
    """

    def __init__(self, interval: int) -> None:
        self._interval = interval

    def layers(self, depth: int) -> Iterable[int]:
        """The first: the code's counter is advanced by whichever layer comes first."""
        del depth
        return (0,)

    def __call__(self, call: AttentionCall) -> Tensor:
        """Attention with the oldest generated tokens as one."""
        length, rows = call.key.shape[2], call.rows
        device = call.key.device
        said = call.generated - rows + 1 + torch.arange(rows, device=device)
        old = (said.clamp_min(0) // self._interval * self._interval) // 10
        if not bool((old > 0).any()):
            return call.kernel(call.mask)
        place = torch.arange(length, device=device) - (length - call.generated)
        members = (place >= 0) & (place < old[:, None])  # [R, n]
        wide = members.expand(*call.query.shape[:2], rows, length)
        logits, added = call.scaled(call.dots(call.answers())), call.answers_added()
        logits = logits if added is None else logits + added
        logits = logits.masked_fill(wide, torch.finfo(logits.dtype).min)
        extra = mean_of(_by_heads(call.key, wide), _by_heads(call.value, wide), wide)
        return call.put(attended(call, logits, extra, 1.0))
