"""Which cells of two runs are of one attack in one place, and whether the data agree."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports.records import Cell, Manifest
from reports.text import count, plain

_PLACES = ("target", "compression", "defense")


@dataclass(frozen=True, slots=True)
class Matching:
    """How the cells of two runs belong together.

    Attributes:
        pairs: cells of the baseline and of the run, in the run's order.
        only_before: cells of the baseline without a partner.
        only_now: cells of the run without one, each with the reason.
        compared: what differs between the runs by intent: ``compression: fastv 25% → visionzip``.
    """

    pairs: tuple[tuple[Cell, Cell], ...]
    only_before: tuple[Cell, ...]
    only_now: tuple[tuple[Cell, str], ...]
    compared: tuple[str, ...]

    def before(self, cell: Cell) -> Cell | None:
        """The partner of a cell of the run."""
        return next((before for before, now in self.pairs if now.id == cell.id), None)

    def reason(self, cell: Cell) -> str:
        """Why a cell of the run has none."""
        return next((why for one, why in self.only_now if one.id == cell.id), "")


def match(before: Sequence[Cell], now: Sequence[Cell]) -> Matching:
    """Match cells of a baseline and of a run.

    Attack, epsilon and norm have to be equal, options included: an attack that is weaker than it
    was would look like progress. Target, compression and defence match by their labels; where each
    run has exactly one of a kind the two match whatever they are called, since that is then what is
    compared.

    Args:
        before: cells of the baseline.
        now: cells of the run.
    """
    free = {
        kind
        for kind in _PLACES
        if len({getattr(cell, kind) for cell in before}) == 1
        and len({getattr(cell, kind) for cell in now}) == 1
    }
    known = {_key(cell, free): cell for cell in before}
    pairs, alone, used = [], [], set()
    for cell in now:
        partner = known.get(_key(cell, free))
        if partner is None:
            alone.append((cell, _why(cell, before, free)))
        else:
            pairs.append((partner, cell))
            used.add(partner.id)
    return Matching(
        tuple(pairs),
        tuple(cell for cell in before if cell.id not in used),
        tuple(alone),
        tuple(dict.fromkeys(line for pair in pairs for line in _intended(*pair))),
    )


def _key(cell: Cell, free: set[str]) -> tuple[object, ...]:
    places = tuple(None if kind in free else getattr(cell, kind) for kind in _PLACES)
    return (*places, _attack(cell), round(cell.epsilon, 9), cell.norm)


def _attack(cell: Cell) -> str:
    """The attack with its options, by its label where they were not recorded."""
    spec = {key: cell.spec[key] for key in ("attack", "surrogates") if key in cell.spec}
    return json.dumps(spec, sort_keys=True) if spec else cell.attack


def _why(cell: Cell, before: Sequence[Cell], free: set[str]) -> str:
    """Why no cell of the baseline is like this one."""
    for kind in (*(one for one in _PLACES if one not in free), "attack"):
        if getattr(cell, kind) not in {getattr(one, kind) for one in before}:
            return f"the baseline has no {kind} {plain(getattr(cell, kind))!r}"
    same = [one for one in before if one.attack == cell.attack]
    if _attack(cell) not in {_attack(one) for one in same}:
        lines = _changed(same[0].spec.get("attack", {}), cell.spec.get("attack", {}))
        return (
            f"the attack {plain(cell.attack)!r} of the baseline has other options "
            f"({'; '.join(lines) or 'other surrogates'})"
        )
    return "the baseline has no such cell at this epsilon and norm"


def _intended(before: Cell, now: Cell) -> Iterator[str]:
    for kind in _PLACES:
        old, new = getattr(before, kind), getattr(now, kind)
        if old != new:
            yield f"{kind}: {plain(old)} → {plain(new)}"
            continue
        lines = _changed(before.spec.get(kind, {}), now.spec.get(kind, {}))
        if lines:
            yield f"{kind} {plain(old)}: {'; '.join(lines)}"


def _changed(before: object, now: object) -> list[str]:
    """Options that differ, ``steps 20 → 30``."""
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return []
    return [
        f"{plain(str(key))} {plain(str(before.get(key, '(absent)')))} → "
        f"{plain(str(now.get(key, '(absent)')))}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]


def unlike(before: Manifest, now: Manifest) -> list[str]:
    """Why two runs are not on the same data, one sentence each; empty if they are.

    The hash of the data decides where both recorded one, else the data set's options.
    """
    found: list[str] = []
    hashes = [_data(one) for one in (before, now)]
    if None not in hashes:
        if hashes[0] != hashes[1]:
            found.append(
                f"the data differ: hash {hashes[0]} in the baseline, {hashes[1]} in the run"
            )
    else:
        lines = _changed(before.scenario.get("dataset", {}), now.scenario.get("dataset", {}))
        if lines:
            found.append(f"the data set differs: {'; '.join(lines)}")
    old, new = set(before.samples), set(now.samples)
    if old != new:
        found.append(
            f"the samples differ: {count(len(old), 'sample')} in the baseline, {len(new):,} in the "
            f"run, {len(old & new):,} in both"
        )
    return found


def _data(manifest: Manifest) -> Any:  # noqa: ANN401 - JSON, compared and shown
    identity = manifest.provenance.get("identity")
    return identity.get("data") if isinstance(identity, Mapping) else None
