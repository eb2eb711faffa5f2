"""Tokens on their way through something that merges or removes them: which patch is where."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from targets.compression.scoring import gather_rows, precise


@dataclass(frozen=True, slots=True)
class Tokens:
    """S tokens of I images; those of an image with fewer end in padding.

    Attributes:
        place: long ``[I, S]`` place each stands for (its own, of those merged into it); −1 for CLS
            and padding.
        size: ``[I, S]`` how many patches are in it; 0 for padding.
        count: long ``[I]``, tokens without padding.
        where: long ``[I, V]``, token each place has gone into; −1 where it is gone.
    """

    place: Tensor
    size: Tensor
    count: Tensor
    where: Tensor

    @property
    def alive(self) -> Tensor:
        """Those that are no padding, bool ``[I, S]``."""
        return torch.arange(self.place.shape[1], device=self.count.device) < self.count[:, None]

    @staticmethod
    def whole(images: int, patches: int, lead: int, device: torch.device) -> Tokens:
        """All patches of each picture, behind `lead` tokens that are none."""
        place = torch.arange(-lead, patches, device=device).clamp_min(-1).expand(images, -1)
        size = torch.ones(place.shape, device=device)
        count = torch.full((images,), patches + lead, device=device)
        return Tokens(place, size, count, place[:, lead:] + lead)

    @staticmethod
    def living(valid: Tensor) -> tuple[Tokens, Tensor]:
        """The valid places ``[I, V]`` without gaps, and the place of each token, ``[I, S]``."""
        count = valid.sum(1)
        order = (~valid).long().argsort(dim=1, stable=True)[:, : int(count.amax())]
        alive = torch.arange(order.shape[1], device=valid.device) < count[:, None]
        where = (valid.long().cumsum(1) - 1).masked_fill(~valid, -1)
        return Tokens(order.masked_fill(~alive, -1), alive.float(), count, where), order

    def survivors(self) -> Tensor:
        """Places that stand for themselves, bool ``[I, V]``."""
        found = torch.zeros_like(self.where)
        return found.scatter_add(1, self.place.clamp_min(0), (self.place >= 0).long()) > 0

    def at_places(self, values: Tensor) -> Tensor:
        """Values ``[I, S]`` of the tokens, for each place in them ``[I, V]``; 0 where gone."""
        return values.gather(1, self.where.clamp_min(0)) * (self.where >= 0)


@dataclass(frozen=True, slots=True)
class Step:
    """Tokens merged into others, or removed.

    Attributes:
        before: the tokens.
        joins: long ``[I, S]`` token each one goes into; itself if it stays, −1 if it is removed.
        goes: long ``[I, S]`` new number of that token; −1 where there is none.
        order: long ``[I, n]`` old number of each new token.
        after: the new tokens.
    """

    before: Tokens
    joins: Tensor
    goes: Tensor
    order: Tensor
    after: Tokens

    @staticmethod
    def of(before: Tokens, joins: Tensor, later: Tensor | None = None) -> Step:
        """Those that stay keep their order, but those marked `later` come behind the others.

        Args:
            before: the tokens.
            joins: as above; entries of padding count for nothing.
            later: bool ``[I, S]``; None for none.
        """
        alive = before.alive
        itself = torch.arange(joins.shape[1], device=joins.device)
        stays = (joins == itself) & alive
        rank = torch.zeros_like(joins) if later is None else later.long()
        rank = torch.where(stays, rank, 2)
        order = rank.argsort(dim=1, stable=True)
        spot = torch.empty_like(order).scatter(1, order, itself.expand_as(order))
        reaches = alive & (joins >= 0)
        goes = spot.gather(1, joins.clamp_min(0)).masked_fill(~reaches, -1)
        count = stays.sum(1)
        order = order[:, : int(count.amax())]
        real = itself[: order.shape[1]] < count[:, None]
        place = before.place.gather(1, order).masked_fill(~real, -1)
        size = torch.zeros_like(before.size).scatter_add(
            1, goes.clamp_min(0), before.size * reaches
        )
        where = goes.gather(1, before.where.clamp_min(0))
        where = where.masked_fill(before.where < 0, -1)
        after = Tokens(place, size[:, : order.shape[1]], count, where)
        return Step(before, joins, goes, order, after)

    def averaged(self, hidden: Tensor) -> Tensor:
        """New tokens ``[I, n, D]``: means of old ones ``[I, S, D]``, weighted by size."""
        weight = (self.before.size * (self.goes >= 0))[..., None].to(precise(hidden).dtype)
        index = self.goes.clamp_min(0)[..., None].expand(hidden.shape)
        total = torch.zeros_like(precise(hidden)).scatter_add(1, index, precise(hidden) * weight)
        size = self.after.size[..., None].clamp_min(1)
        return (total[:, : size.shape[1]] / size).to(hidden.dtype)

    def picked(self, hidden: Tensor) -> Tensor:
        """Old tokens ``[I, S, D]`` that stay, ``[I, n, D]``; anything in padding."""
        return gather_rows(hidden, self.order)


def removal(tokens: Tokens, kept: Tensor, lead: int) -> Step:
    """Remove the tokens of all places but ``kept [I, V]``; the first `lead` stay."""
    itself = torch.arange(tokens.place.shape[1], device=kept.device).expand_as(tokens.place)
    stays = kept.gather(1, tokens.place.clamp_min(0)) & (tokens.place >= 0)
    stays = stays | (itself < lead)
    return Step.of(tokens, torch.where(stays, itself, -1))
