"""Which unit a worker gets next: neighbours, because they share clean answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from redteam.cost import unit_cost
from redteam.plan import WorkUnit

_Block = tuple[str, int]
"""Target and number of the block of samples."""


class Dispatch:
    """Hands out units.

    A worker stays with its block of samples while that has units, then takes a block nobody works
    on, then helps where most is left: so a slow worker holds up one unit at most.

    Args:
        units: all that is to be done.
    """

    def __init__(self, units: Sequence[WorkUnit]) -> None:
        self._left: dict[_Block, deque[WorkUnit]] = {}
        for unit in units:
            self._left.setdefault(_block(unit), deque()).append(unit)
        self._at: dict[int, _Block] = {}

    def next(self, worker: int) -> WorkUnit | None:
        """The next unit of a worker; None if nothing is left."""
        block = self._block_of(worker)
        if block is None:
            self._at.pop(worker, None)
            return None
        self._at[worker] = block
        unit = self._left[block].popleft()
        if not self._left[block]:
            del self._left[block]
        return unit

    def give_back(self, unit: WorkUnit) -> None:
        """A unit that was begun and not finished."""
        self._left.setdefault(_block(unit), deque()).appendleft(unit)

    def __len__(self) -> int:
        return sum(map(len, self._left.values()))

    def _block_of(self, worker: int) -> _Block | None:
        mine = self._at.get(worker)
        if mine in self._left:
            return mine
        taken = {block for other, block in self._at.items() if other != worker}
        free = [block for block in self._left if block not in taken]
        if free:
            return free[0]
        return max(self._left, key=self._cost, default=None)

    def _cost(self, block: _Block) -> float:
        return sum(map(unit_cost, self._left[block]))


def _block(unit: WorkUnit) -> _Block:
    return unit.group.target.label, unit.block
