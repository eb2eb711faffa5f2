"""One run in several parts: for the jobs of a CI matrix, or machines that share nothing.

Each part is an ordinary run folder of the same run that holds some of its units; `reports.merge`
puts them together. Which units a part has depends on the plan alone, so no part needs to know of
another, and no unit is left out or done twice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from redteam.cost import unit_cost
from redteam.errors import UsageError
from redteam.plan import WorkUnit

_FORM: Final = re.compile(r"([0-9]{1,6})/([0-9]{1,6})")


@dataclass(frozen=True, slots=True)
class Shard:
    """One part of a run.

    Attributes:
        index: which, from 1.
        of: how many there are.
    """

    index: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``2/8``.

        Raises:
            UsageError: if it is not that, or there is no such part.
        """
        found = _FORM.fullmatch(text.strip())
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UsageError(
                f"--shard: {text!r} is not allowed; give I/N with 1 ≤ I ≤ N, e.g. 1/4 … 4/4"
            )
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"

    def part(self, units: Sequence[WorkUnit]) -> list[WorkUnit]:
        """Its units, in order: neighbours, because they share clean answers, of about equal cost.

        Args:
            units: all of the run.
        """
        costs = [unit_cost(unit) for unit in units]
        total = sum(costs) or 1.0
        middles = [end - cost / 2 for end, cost in zip(accumulate(costs), costs, strict=True)]
        return [
            unit
            for unit, middle in zip(units, middles, strict=True)
            if min(int(self.of * middle / total), self.of - 1) == self.index - 1
        ]
