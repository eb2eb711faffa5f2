"""A part of a data set that is the same for everybody."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def choose(
    ids: Sequence[str],
    count: int | None,
    seed: int | None,
    kinds: Sequence[str],
    groups: Sequence[str] | None = None,
) -> list[int]:
    """Indices of a subset, ascending: the order of the data set is kept.

    Without a seed it is the first so many. With one it is drawn, stratified: each kind gets its
    share of `count` (largest remainders first, ties in the order of the names), and within a kind
    those with the smallest hash of seed and id are taken. So a sample's luck depends on nothing but
    its id: neither on the order of the file nor on a library's random numbers.

    Args:
        ids: of all samples.
        count: how many, ≥ 1; None or more than there are takes all.
        seed: ≥ 0; None for the first so many.
        kinds: one for each sample.
        groups: samples of one group are taken together or not at all, so that there may be fewer
            than `count`; None for each on its own. The kind of a group is that of its first.
    """
    members: dict[str, list[int]] = {}
    for index, name in enumerate(ids if groups is None else groups):
        members.setdefault(name, []).append(index)
    if count is None or count >= len(ids):
        return list(range(len(ids)))
    if seed is None:
        names = list(members)
    else:
        names = _drawn({name: kinds[mine[0]] for name, mine in members.items()}, count, seed, ids)
    found: list[int] = []
    for name in names:
        if len(found) + len(members[name]) <= count:
            found += members[name]
    return sorted(found)


def _drawn(kinds: dict[str, str], count: int, seed: int, ids: Sequence[str]) -> list[str]:
    """Names in the order in which they are taken: first the fair share of each kind."""
    strata: dict[str, list[str]] = {}
    for name in sorted(kinds, key=lambda name: _luck(seed, name)):
        strata.setdefault(kinds[name], []).append(name)
    units = count * len(kinds) // len(ids)
    quota = {kind: units * len(mine) / len(kinds) for kind, mine in strata.items()}
    taken = {kind: int(share) for kind, share in quota.items()}
    rest = sorted(quota, key=lambda kind: (taken[kind] - quota[kind], kind))
    for kind in rest[: units - sum(taken.values())]:
        taken[kind] += 1
    first = [name for kind, mine in strata.items() for name in mine[: taken[kind]]]
    chosen = set(first)
    others = sorted(kinds.keys() - chosen, key=lambda name: _luck(seed, name))
    return first + others


def _luck(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
