"""Why a gate is inconclusive, in one word, for formats that tell "too few samples" apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from reports.gate import Cause
from reports.verdict import Verdict

_GRAVEST: Final[tuple[Cause, ...]] = (
    "unmeasured",
    "incomplete",
    "baseline",
    "doubt",
    "multiplicity",
    "samples",
)


def cause_of(gate: Mapping[str, Any]) -> Cause:
    """The gravest cause among a gate's undecided cells; "unmeasured" if it covers none.

    Args:
        gate: of summary.json, its verdict inconclusive.
    """
    causes = {one["cause"] for one in gate["cells"] if one["verdict"] == Verdict.INCONCLUSIVE}
    return next((cause for cause in _GRAVEST if cause in causes), "unmeasured")
