"""Why a gate is inconclusive, for formats that tell "too few samples" from "not measured"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from reports.gate import Progress
from reports.verdict import Verdict


class Undecided(StrEnum):
    """What kept a gate from being decided."""

    INTERVAL = "interval"
    """Everything was measured and the limit lies inside the interval: more samples decide."""
    UNMEASURED = "unmeasured"
    """Trials are missing or errors, or the metric has no value: no number of samples decides."""
    DOUBT = "doubt"
    """It would pass, but a self-check or an unverified defence took the pass away."""


def undecided(gate: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> Undecided:
    """Why an inconclusive gate is inconclusive; of several reasons the gravest.

    Args:
        gate: of summary.json, its verdict inconclusive.
        cells: of summary.json.
    """
    measured = {cell["id"]: cell for cell in cells}
    open_cells = [one for one in gate["cells"] if one["verdict"] == Verdict.INCONCLUSIVE]
    reasons = {_of_cell(one, measured[one["cell"]]) for one in open_cells}
    for reason in (Undecided.UNMEASURED, Undecided.DOUBT, Undecided.INTERVAL):
        if reason in reasons:
            return reason
    return Undecided.UNMEASURED  # the gate covers no cell


def _of_cell(decision: Mapping[str, Any], cell: Mapping[str, Any]) -> Undecided:
    if decision["doubt"]:
        return Undecided.DOUBT
    if decision["value"] is None or (decision["low"] is None and decision["high"] is None):
        return Undecided.UNMEASURED
    done = Progress(
        expected=cell["n"] + cell["errors"] + cell["missing"],
        measured=cell["n"],
        errors=cell["errors"],
    )
    return Undecided.UNMEASURED if done.objection() else Undecided.INTERVAL
