"""The clean-ranking oracle: how much any defence of the selection could help at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from defenses.base import AdaptiveRoute
from defenses.selection import SelectionDefense


@dataclass(frozen=True, kw_only=True)
class Oracle(SelectionDefense):
    """Impose the clean picture's own selection on the attacked one; evaluation only.

    Ranking from the clean picture, features from the attacked one: the *upper bound* of what a
    selection-side defence can reach. It needs the clean picture, so it cannot be deployed, and no
    attack goes through it. Of merging compressors the assignment is imposed too.

    *Differs from the paper in …*: it is a diagnosis (the oracle of CAA, arXiv 2601.12042, Fig. 4),
    not a defence.
    """

    name: ClassVar[str] = "oracle"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.NONE
    clean_ranking: ClassVar[bool] = True
