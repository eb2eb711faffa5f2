"""Attack × compressor: the failures that only compression brings, one table for each budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports.html.charts import against
from reports.reading import NORMS
from reports.text import epsilon_text, plain

Cell = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class HeatMap:
    """A table of estimates.

    Attributes:
        title: target, where there are several, and budget.
        columns: compressions.
        alone: accuracy that each compression costs by itself, without an attack.
        rows: an attack, with its defence, and its CSFR under each compression; None if not run.
    """

    title: str
    columns: tuple[str, ...]
    alone: tuple[Mapping[str, Any] | None, ...]
    rows: tuple[tuple[str, tuple[Mapping[str, Any] | None, ...]], ...]


def heat_maps(cells: Sequence[Cell]) -> list[HeatMap]:
    """A table for each target, norm and budget, the largest budget first."""
    groups: dict[tuple[str, str, float], list[Cell]] = {}
    for cell in cells:
        key = cell["target"], cell["norm"], cell["epsilon"]
        groups.setdefault(key, []).append(cell)
    targets = list(dict.fromkeys(target for target, _, _ in groups))
    ordered = sorted(groups, key=lambda key: (targets.index(key[0]), key[1], -key[2]))
    return [_map(key, groups[key], len(targets) > 1) for key in ordered]


def _map(key: tuple[str, str, float], cells: Sequence[Cell], several: bool) -> HeatMap:
    target, norm, epsilon = key
    columns = tuple(dict.fromkeys(cell["compression"] for cell in cells))
    attacks = dict.fromkeys((cell["attack"], cell["defense"]) for cell in cells)
    found = {(c["attack"], c["defense"], c["compression"]): c for c in cells}
    names = {(cell["attack"], cell["defense"]): against(cell) for cell in cells}
    budget = f"ε {epsilon_text(epsilon)}, {NORMS.get(norm, plain(norm))}"
    return HeatMap(
        title=f"{plain(target)}, {budget}" if several else budget,
        columns=columns,
        alone=tuple(_alone(cells, column) for column in columns),
        rows=tuple(
            (names[name], tuple(_csfr(found.get((*name, column))) for column in columns))
            for name in attacks
        ),
    )


def _csfr(cell: Cell | None) -> Mapping[str, Any] | None:
    estimate: Mapping[str, Any] | None = None if cell is None else cell["metrics"]["csfr"]
    return estimate


def _alone(cells: Sequence[Cell], compression: str) -> Mapping[str, Any] | None:
    """Of the undefended cells, where there are any: a defence may change it."""
    mine = [cell for cell in cells if cell["compression"] == compression]
    plainly = [cell for cell in mine if cell["defense"] in ("", "none")] or mine
    found: Mapping[str, Any] | None = plainly[0]["metrics"]["clean_drop"] if plainly else None
    return found
