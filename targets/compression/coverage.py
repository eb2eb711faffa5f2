"""Greedy choice of tokens that cover all others: facility location and a term of each token's own.

Both functions take the similarity ``alike [I, V, V]``, ≥ 0 and symmetric, and what a token is
worth by itself, ``extra [I, V]``; entries of places that are not valid are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from targets.compression.divprune import places_of
from targets.compression.scoring import gather_rows


@torch.no_grad()
def chosen_greedily(alike: Tensor, extra: Tensor, counts: Tensor, valid: Tensor) -> Tensor:
    """Order in which tokens are chosen, ``[I, K]``: each time the one that adds most.

    Args:
        alike: similarity.
        extra: worth of each token.
        counts: long ``[I]``; K is the largest. Only the first `counts` of a row mean anything.
        valid: bool ``[I, V]``, places that may be chosen; of equal ones the first.
    """
    covered, free, order = torch.zeros_like(extra), valid.clone(), []
    for _ in range(int(counts.amax())):
        gain = (alike - covered[:, :, None]).relu().sum(1) + extra
        chosen = gain.masked_fill(~free, -torch.inf).argmax(1, keepdim=True)
        order.append(chosen)
        free = free.scatter(1, chosen, False)
        covered = torch.maximum(covered, gather_rows(alike, chosen).squeeze(1))
    return torch.cat(order, 1)


def gain_when_chosen(
    alike: Tensor, extra: Tensor, order: Tensor, counts: Tensor, valid: Tensor
) -> Tensor:
    """What each token added when it was chosen, or would add next: ``[I, V]``, live; 0 if invalid.

    Args:
        alike: similarity.
        extra: worth of each token.
        order: from `chosen_greedily`.
        counts: long ``[I]``, how many of `order` count.
        valid: bool ``[I, V]``.
    """
    reached = gather_rows(alike, order).transpose(1, 2)
    # covered[:, x, p]: how well x is covered by the first p chosen ones.
    covered = torch.nn.functional.pad(reached.cummax(2).values, (1, 0))
    place = places_of(order, counts, alike.shape[1])
    before = covered.gather(2, place[:, None].expand_as(alike))
    gain = (alike - before).relu().sum(1) + extra
    return gain.masked_fill(~valid, 0)
