"""Bipartite soft matching: which tokens ToMe merges, how many in each layer, and repeating it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from targets.compression.base import Selection
from targets.compression.flow import Step, Tokens
from targets.compression.scoring import precise, ranks
from targets.errors import CompressionError

Schedule = Literal["constant", "decreasing", "increasing"]


def least(patches: int, layers: int) -> int:
    """The fewest tokens that `layers` mergers leave: none more than halves their number."""
    return -(-patches // (1 << layers))


def counts_after(patches: int, final: int, layers: int, schedule: Schedule) -> tuple[int, ...]:
    """Tokens left after each layer.

    Args:
        patches: before the first.
        final: after the last.
        layers: that merge.
        schedule: whether all merge equally many, or the first or the last the most (linearly, to
            none at the other end), as far as halving allows.

    Raises:
        CompressionError: if even halving in every layer leaves more than `final`.
    """
    if final < least(patches, layers):
        raise CompressionError(
            f"tome: {layers} layers of the vision tower, each of which at most halves the tokens, "
            f"leave {least(patches, layers)} of {patches}, not {final}; keep more"
        )
    weights = {
        "constant": [1.0] * layers,
        "decreasing": [float(layers - 1 - layer) for layer in range(layers)],
        "increasing": [float(layer) for layer in range(layers)],
    }[schedule]
    total = sum(weights) or 1.0
    if layers == 1:
        return (final,)
    left, counts = patches, []
    for layer in range(layers):
        done = sum(weights[: layer + 1]) / total
        wanted = patches - int((patches - final) * done + 0.5)
        # At most half of the tokens go, and what is left has to be within reach of the rest.
        reachable = final * 2 ** (layers - 1 - layer)
        left = min(left, max(min(wanted, reachable), left - left // 2))
        counts.append(left)
    return tuple(counts)


def unit(metric: Tensor) -> Tensor:
    """Vectors of length 1, at least float32; zero stays zero."""
    return torch.nn.functional.normalize(precise(metric), dim=-1)


def likeness(metric: Tensor, tokens: Tokens, lead: int) -> Tensor:
    """Cosine of even and odd tokens ``[I, A, B]``; −inf for padding and what is protected.

    Args:
        metric: ``[I, S, E]`` unit vectors.
        tokens: S tokens.
        lead: the first ones, which are protected.
    """
    alive = tokens.alive
    real = alive & (torch.arange(alive.shape[1], device=alive.device) >= lead)
    allowed = real[:, ::2, None] & real[:, None, 1::2]
    cosine = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    return cosine.masked_fill(~allowed, -torch.inf)


def distinctness(metric: Tensor, tokens: Tokens, lead: int) -> Tensor:
    """1 − cosine to the nearest token of the other side, ``[I, S]``, live; 0 without one."""
    cosine = likeness(metric, tokens, lead)
    even, odd = cosine.shape[1:]
    out = precise(metric).new_zeros(metric.shape[:2])
    if odd == 0:
        return out
    nearest = torch.cat([cosine.amax(2), cosine.amax(1)], 1)
    places = torch.cat([torch.arange(even) * 2, torch.arange(odd) * 2 + 1]).to(metric.device)
    far = torch.where(nearest.isfinite(), 1 - nearest, 0)
    return out.scatter(1, places.expand_as(far), far)


@torch.no_grad()
def matched(metric: Tensor, tokens: Tokens, merges: Tensor, lead: int) -> Step | None:
    """Merge the even tokens that are most like an odd one into it.

    Args:
        metric: ``[I, S, E]`` unit vectors.
        tokens: S tokens; the first `lead` are protected.
        merges: long ``[I]`` how many, at most half of those not protected.
        lead: 1 with CLS, else 0.

    Returns:
        What happens: unmerged even tokens come first, then odd ones; None where nothing does.
    """
    if not bool((merges > 0).any()):
        return None
    cosine = likeness(metric, tokens, lead)
    best, near = cosine.amax(2), cosine.argmax(2)
    merging = ranks(best) < merges[:, None]
    number = torch.arange(metric.shape[1], device=metric.device)
    joins = number.expand(metric.shape[:2]).clone()
    joins[:, ::2] = torch.where(merging, 2 * near + 1, joins[:, ::2])
    joins = torch.where((merges > 0)[:, None], joins, number)
    return Step.of(tokens, joins, _odd(joins, (merges > 0)[:, None]))


@torch.no_grad()
def drawn_to(metric: Tensor, tokens: Tokens, kept: Tensor, lead: int) -> Step:
    """Merge every token but those of places ``kept [I, V]`` into the most similar of these."""
    number = torch.arange(metric.shape[1], device=metric.device)
    stays = kept.gather(1, tokens.place.clamp_min(0)) & (tokens.place >= 0)
    cosine = metric @ metric.transpose(1, 2)
    near = cosine.masked_fill(~stays[:, None], -torch.inf).argmax(2)
    joins = torch.where(stays | (number < lead), number, near)
    return Step.of(tokens, joins, _odd(joins, (joins != number) & tokens.alive))


def described(steps: Sequence[tuple[int, Step]], kept: Tensor, stages: int) -> Selection:
    """All mergers as a selection, so that they can be imposed on another picture.

    The targets of each stage stand together and end in a −1; a place whose token is merged into
    that of u in a stage is assigned to u's entry there.
    """
    images, width = kept.shape
    assignment = torch.full((images, width), -1, device=kept.device)
    entries = torch.full((images, stages, width + 1), -1, device=kept.device)
    for stage, step in steps:
        number = torch.arange(step.joins.shape[1], device=kept.device)
        moves = (step.joins != number) & step.before.alive & (step.joins >= 0)
        image, token = moves.nonzero(as_tuple=True)
        places = step.before.place
        into = places[image, step.joins[image, token]]
        entries[image, stage, into] = into
        assignment[image, places[image, token]] = stage * (width + 1) + into
    listed = entries >= 0
    listed[:, :, width] = True
    listed = listed.flatten(1)
    order = (~listed).long().argsort(dim=1, stable=True)[:, : int(listed.sum(1).amax())]
    spot = (listed.long().cumsum(1) - 1).gather(1, assignment.clamp_min(0))
    targets = entries.flatten(1).gather(1, order)
    return Selection(kept, targets, spot.masked_fill(assignment < 0, -1))


def repeated(selection: Selection, stage: int, tokens: Tokens) -> Step | None:
    """The merger of a stage as `described`; None where there is none.

    Raises:
        CompressionError: if it does not fit the tokens there are.
    """
    if selection.assignment is None or selection.targets is None:
        raise CompressionError("tome: the forced selection does not say what is merged into what")
    entry = selection.assignment.gather(1, tokens.place.clamp_min(0))
    joined, entry = (tokens.place >= 0) & (entry >= 0), entry.clamp_min(0)
    stages = (selection.targets < 0).long().cumsum(1)
    here = joined & (stages.gather(1, entry) == stage)
    if not bool(here.any()):
        return None
    target = selection.targets.gather(1, entry).clamp_min(0)
    # The token that stands for the target place.
    spot = tokens.where.gather(1, target)
    if bool((here & (tokens.place.gather(1, spot.clamp_min(0)) != target)).any()):
        raise CompressionError(
            "tome: the forced selection merges a token into one that is gone; take it from an "
            "answer under the same options"
        )
    joins = torch.where(here, spot, torch.arange(spot.shape[1], device=spot.device))
    return Step.of(tokens, joins, _odd(joins, here))


def _odd(joins: Tensor, moves: Tensor) -> Tensor:
    """Odd tokens of images in which any moves, bool ``[I, S]``."""
    odd = torch.arange(joins.shape[1], device=joins.device) % 2 == 1
    return odd & moves.any(1, keepdim=True)


def mean_keys(keys: Tensor) -> Tensor:
    """Unit head-mean keys ``[I, S, E]`` from ``[I, N, S, E]``."""
    return unit(precise(keys).mean(1))
