"""What attacked images cost whoever answers them: visual tokens, length of answers, seconds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, Final

import numpy as np

from reports.records import Demands, Manifest
from reports.terminal import Column, Table, as_table, of_cells
from reports.text import interval, number

TYPES: Final = frozenset({"verbose", "token_count", "force_fallback"})
"""Attacks on availability; with one of them in a run, the table is shown."""
CAPTION: Final = (
    "Clean → attacked, means over samples: visual tokens that compression leaves, tokens of the "
    "answer (end token included), share of samples for which a defence fell back to more tokens, "
    "seconds of an answer and their 95th percentile. In brackets the factor; for tokens the mean "
    "over samples with its 95 % interval. Seconds are those of this machine, a batch's time shared "
    "out equally."
)
_ANSWERS: Final = ("clean_full", "clean_compressed", "attacked_full", "attacked_compressed")
_seconds = attrgetter(*(f"{name}.seconds" for name in _ANSWERS))


class Latency:
    """Seconds of answers by cell; of several trials of a sample the last counts."""

    def __init__(self) -> None:
        self._seconds: dict[str, dict[str, tuple[float, ...]]] = defaultdict(dict)

    def add(self, cell: str, sample: str, demands: Demands) -> None:
        """Note what the four answers of a sample took."""
        self._seconds[cell][sample] = _seconds(demands)

    def summary(self) -> dict[str, Any]:
        """Mean and 95th percentile of the seconds of each of the four answers, by cell."""
        means: dict[str, dict[str, float]] = {}
        high: dict[str, dict[str, float]] = {}
        for cell, samples in self._seconds.items():
            columns = np.array(list(samples.values()))
            tops = np.percentile(columns, 95, axis=0)
            pairs = zip(_ANSWERS, columns.mean(0), strict=True)
            means[cell] = {name: round(float(one), 6) for name, one in pairs}
            high[cell] = {
                name: round(float(one), 6) for name, one in zip(_ANSWERS, tops, strict=True)
            }
        return {"unit": "seconds of one answer, mean over samples", "cells": means, "p95": high}


def table(manifest: Manifest, summary: Mapping[str, Any]) -> Table | None:
    """Clean → attacked, one row per cell; None where nothing attacks availability.

    It is shown if the run holds such an attack, if any attack changed how many tokens are kept, or
    if a defence fell back.
    """
    attacking = {
        cell.id for cell in manifest.cells if cell.spec.get("attack", {}).get("type") in TYPES
    }
    cells = [cell for cell in summary["cells"] if _known(cell)]
    fell = any(map(_fell, cells))
    if not cells or not (attacking or fell or any(map(_moved, cells))):
        return None
    answers = summary["timings"].get("answers", {})
    seconds, high = answers.get("cells", {}), answers.get("p95", {})
    columns: list[Column] = [
        *of_cells(cells),
        ("visual tokens", True, [_change(cell, "tokens") for cell in cells]),
        ("answer, full", True, [_change(cell, "length_full") for cell in cells]),
        ("answer, compressed", True, [_change(cell, "length_compressed") for cell in cells]),
        *([("fall-back", True, [_rates(cell) for cell in cells])] if fell else []),
        *(
            (f"{what}, {path}", True, [_took(of.get(cell["id"]), path) for cell in cells])
            for path in ("full", "compressed")
            for what, of in (("seconds", seconds), ("p95", high))
        ),
    ]
    return as_table(
        column
        for column in columns
        if column[0] not in ("target", "defense") or len(set(column[2])) > 1
    )


def _known(cell: Mapping[str, Any]) -> bool:
    return cell["metrics"].get("tokens_clean", {}).get("value") is not None


def _moved(cell: Mapping[str, Any]) -> bool:
    clean, attacked = (cell["metrics"][f"tokens_{image}"] for image in ("clean", "attacked"))
    return bool(clean["value"] != attacked["value"])


def _change(cell: Mapping[str, Any], name: str) -> str:
    """``36.0 → 54.2 (×1.51 [1.40, 1.62])``; the factor is the mean over samples."""
    clean, attacked, grown = (
        cell["metrics"][f"{name}_{part}"] for part in ("clean", "attacked", "growth")
    )
    text = f"{number(clean['value'], 1)} → {number(attacked['value'], 1)}"
    return text if grown["value"] is None else f"{text} (×{interval(grown, 2)})"


def _fell(cell: Mapping[str, Any]) -> bool:
    """A defence fell back; summaries of earlier versions do not say."""
    rates = (cell["metrics"].get(f"fallback_{image}", {}) for image in ("clean", "attacked"))
    return any(rate.get("value") for rate in rates)


def _rates(cell: Mapping[str, Any]) -> str:
    """``0.05 → 0.61 [0.49, 0.73]``; the interval is that of the attacked share."""
    clean, attacked = (cell["metrics"][f"fallback_{image}"] for image in ("clean", "attacked"))
    return f"{number(clean['value'], 2)} → {interval(attacked, 2)}"


def _took(seconds: Mapping[str, float] | None, path: str) -> str:
    """``0.017 → 0.041 (×2.41)``."""
    if seconds is None:
        return "n/a"
    clean, attacked = seconds[f"clean_{path}"], seconds[f"attacked_{path}"]
    grown = f" (×{number(attacked / clean, 2)})" if clean else ""
    return f"{number(clean, 3)} → {number(attacked, 3)}{grown}"
