"""Sum up dropped visual tokens in a few new ones that follow the kept ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from targets.compression.base import Merged
from targets.compression.scoring import gather_rows, order_of


@dataclass(frozen=True, slots=True)
class Groups:
    """Dropped tokens in groups, each around a target.

    Attributes:
        targets: long ``[I, C]`` places, −1 for none.
        assignment: long ``[I, V]`` entry of `targets` a place joins, −1 for none; targets have −1.
    """

    targets: Tensor
    assignment: Tensor


@torch.no_grad()
def density_peaks(features: Tensor, members: Tensor, number: Tensor, score: Tensor) -> Groups:
    """Cluster tokens around density peaks.

    Du et al. (density peaks over k nearest neighbours, DPC-KNN; Rodriguez and Laio, 2014): with d
    the Euclidean distance divided by √D, a token's density is ``exp(−mean d²)`` over its k nearest
    tokens, itself among them, where k is the number of clusters; the centres are the tokens with
    the largest ``density · distance to the nearest denser token`` (for the densest: the largest
    distance there is); others join the nearest centre.

    Args:
        features: ``[I, V, D]``.
        members: bool ``[I, V]``, tokens to cluster.
        number: long ``[I]`` clusters, at most as many as members.
        score: ``[I, V]``; of equally dense tokens the one with the larger score counts as denser.

    Returns:
        Targets in the order of their peaks.
    """
    size = members.sum(1)
    width, most = int(size.amax()), int(number.amax())
    places = order_of(score, members)[:, :width]
    real = torch.arange(width, device=members.device) < size[:, None]
    tokens = gather_rows(features, places).float().masked_fill(~real[..., None], 0)
    pairs = real[:, :, None] & real[:, None]
    distance = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist")
    distance = (distance / features.shape[-1] ** 0.5).masked_fill(~pairs, torch.inf)
    density = _density(distance, number)
    order = torch.arange(width, device=members.device)
    equal = density[:, None] == density[:, :, None]
    denser = (density[:, None] > density[:, :, None]) | (equal & (order < order[:, None]))
    gap = distance.masked_fill(~(denser & pairs), torch.inf).amin(2)
    largest = distance.masked_fill(~pairs, 0).flatten(1).amax(1, keepdim=True)
    peak = torch.where(gap.isinf(), largest, gap) * density
    centres = order_of(peak, real)[:, :most]
    used = torch.arange(centres.shape[1], device=members.device) < number[:, None]
    to_centre = distance.gather(2, centres[:, None].expand(-1, width, -1))
    to_centre = to_centre.masked_fill(~used[:, None], torch.inf)
    joins = to_centre.argmin(2) if centres.shape[1] else torch.full_like(places, -1)
    is_centre = torch.zeros_like(real).scatter(1, centres, used)
    joins = joins.masked_fill(~real | is_centre | ~used.any(1, keepdim=True), -1)
    targets = places.gather(1, centres).masked_fill(~used, -1)
    assignment = torch.full(members.shape, -1, device=members.device)
    return Groups(targets, assignment.scatter(1, places, joins))


def _density(distance: Tensor, neighbours: Tensor) -> Tensor:
    """``exp(−mean d²)`` over the nearest, of each token: ``[I, n, n]`` → ``[I, n]``."""
    near = distance.sort(2).values.square()
    rank = torch.arange(near.shape[2], device=near.device)
    inside = rank < neighbours[:, None, None]
    return (-near.masked_fill(~inside, 0).sum(2) / neighbours.clamp_min(1)[:, None]).exp()


@torch.no_grad()
def evenly(keys: Tensor, rest: Tensor, number: Tensor) -> Groups:
    """Group tokens around evenly spaced ones by the cosine of their keys.

    Every step-th of the `rest` is a target (step = rest // number, the first `number`); each other
    one joins the target whose key has the largest cosine with its own.

    Args:
        keys: ``[I, V, E]``.
        rest: bool ``[I, V]``, tokens to group.
        number: long ``[I]`` targets, at most as many as the rest.
    """
    order = (~rest).long().argsort(dim=1, stable=True)
    step = rest.sum(1) // number.clamp_min(1)
    entry = torch.arange(int(number.amax()), device=rest.device)
    used = entry < number[:, None]
    targets = order.gather(1, (entry * step[:, None]).clamp_max(rest.shape[1] - 1))
    if targets.shape[1] == 0:
        return Groups(targets, torch.full(rest.shape, -1, device=rest.device))
    unit = keys.float().masked_fill(~rest[..., None], 0)
    unit = torch.nn.functional.normalize(unit, dim=-1)
    similarity = unit @ gather_rows(unit, targets).transpose(1, 2)
    joins = similarity.masked_fill(~used[:, None], -torch.inf).argmax(-1)
    is_target = torch.zeros_like(rest, dtype=torch.long).scatter_add(1, targets, used.long()) > 0
    joins = joins.masked_fill(~rest | is_target | ~used.any(1, keepdim=True), -1)
    return Groups(targets.masked_fill(~used, -1), joins)


def members_of(features: Tensor, groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
    """What a group is made of.

    Args:
        features: ``[I, V, D]``; may hold anything at places of no group.
        groups: which token goes where.

    Returns:
        Its target ``[I, C, D]``, the sum of those that joined ``[I, C, D]``, and how many did
        ``[I, C, 1]``; at least float32.
    """
    wide = torch.promote_types(features.dtype, torch.float32)
    used = groups.targets >= 0
    own = gather_rows(features, groups.targets.clamp_min(0)).to(wide)
    own = own.masked_fill(~used[..., None], 0)
    entry = torch.arange(groups.targets.shape[1], device=features.device)
    joins = (groups.assignment[:, None] == entry[:, None]).to(wide)  # [I, C, V]
    inside = features.to(wide).masked_fill((groups.assignment < 0)[..., None], 0)
    return own, joins @ inside, joins.sum(-1, keepdim=True)


def appended(features: Tensor, kept: Tensor, targets: Tensor, extra: Tensor) -> Merged:
    """The kept tokens in order, then the extra ones, without gaps.

    Args:
        features: ``[I, V, D]``.
        kept: bool ``[I, V]``.
        targets: long ``[I, C]``, places the extra tokens stand for, −1 for none.
        extra: ``[I, C, D]``.
    """
    first = (~kept).long().argsort(dim=1, stable=True)[:, : int(kept.sum(1).amax())]
    is_kept, is_extra = kept.gather(1, first), targets >= 0
    tokens = torch.cat([gather_rows(features, first), extra.to(features.dtype)], 1)
    source = torch.cat([first, targets.clamp_min(0)], 1)
    valid = torch.cat([is_kept, is_extra], 1)
    dominant = torch.cat([is_kept, torch.zeros_like(is_extra)], 1)
    place = (~valid).long().argsort(dim=1, stable=True)[:, : int(valid.sum(1).amax())]
    return Merged(
        gather_rows(tokens, place),
        valid.gather(1, place),
        source.gather(1, place),
        dominant.gather(1, place),
    )
