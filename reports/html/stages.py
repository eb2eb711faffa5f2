"""Where each sample of a cell ended: held, lost to compression alone, or broken, and on what path.

The stages are exclusive and together are all measured samples, so a bar of them has one length in
every cell, and what compression loses without an attack stands beside what the attack breaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from reports.html import svg
from reports.html.charts import ChartGroup, ChartRow, grouped
from reports.reading import cell_name

Cell = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Stage:
    """One end a sample may come to.

    Attributes:
        name: of its class in the style sheet.
        title: in words.
        outcomes: right (1) or wrong (0) for c, c_K, c', c'_K; what begins so belongs to it.
    """

    name: str
    title: str
    outcomes: tuple[str, ...]


STAGES: Final = (
    Stage("held", "right in all four states", ("1111",)),
    Stage("csf", "broken only when compressed", ("1110",)),
    Stage("both", "broken by the attack on both paths", ("1100",)),
    Stage("full-only", "broken only with all tokens", ("1101",)),
    Stage("alone", "lost to compression alone, no attack", ("10",)),
    Stage("wrong", "wrong before any of it", ("0",)),
)
"""In the order of the bars."""


def counts(outcomes: Mapping[str, int]) -> dict[str, int]:
    """Samples of each stage, from the ``outcomes`` of a cell."""
    return {
        stage.name: sum(n for outcome, n in outcomes.items() if outcome.startswith(stage.outcomes))
        for stage in STAGES
    }


def chart(cells: Sequence[Cell]) -> list[ChartGroup]:
    """A bar of stages for every measured cell."""
    shown = [cell for cell in cells if cell["n"]]
    return [
        ChartGroup(title, tuple(_row(cell) for cell in members))
        for title, members in grouped(shown)
    ]


def _row(cell: Cell) -> ChartRow:
    found = counts(cell["outcomes"])
    said = "; ".join(f"{stage.title}: {found[stage.name]:,}" for stage in STAGES)
    drawing = svg.stacked_row(
        [(stage.name, found[stage.name]) for stage in STAGES], f"of {cell['n']:,} samples, {said}"
    )
    return ChartRow(cell_name(cell), (drawing,), f"{found['csf']:,} of {cell['n']:,}")
