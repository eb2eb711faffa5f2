"""Which charts the report shows, and from which numbers; `svg` draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from reports.html import svg
from reports.reading import cell_name
from reports.text import epsilon_text, interval, plain

Cell = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ChartRow:
    """One line of a chart: a name, a drawing (or several), and the numbers in words."""

    name: str
    drawings: tuple[Markup, ...]
    value: str


@dataclass(frozen=True, slots=True)
class ChartGroup:
    """Lines that belong together."""

    title: str
    rows: tuple[ChartRow, ...]


@dataclass(frozen=True, slots=True)
class Curves:
    """A chart against the budget.

    Attributes:
        title: target and compression.
        drawing: the chart.
        legend: class of each series and its name.
        description: the same numbers in words, for who does not see the chart.
    """

    title: str
    drawing: Markup
    legend: tuple[tuple[str, str], ...]
    description: str


def grouped(cells: Sequence[Cell]) -> list[tuple[str, list[Cell]]]:
    """Cells by target and compression, in order; the target is named if there are several."""
    several = len({cell["target"] for cell in cells}) > 1
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        title = plain(cell["compression"])
        groups.setdefault(f"{plain(cell['target'])} · {title}" if several else title, []).append(
            cell
        )
    return list(groups.items())


def series_of(cells: Sequence[Cell]) -> dict[tuple[str, str], int]:
    """A number for each attack and defence, which decides colour everywhere in the report."""
    names = dict.fromkeys((cell["attack"], cell["defense"]) for cell in cells)
    return {name: index for index, name in enumerate(names)}


def gap_chart(cells: Sequence[Cell]) -> tuple[list[ChartGroup], Markup]:
    """CSG of every cell as a dot with its interval; groups and their common axis."""
    shown = [cell for cell in cells if cell["metrics"]["csg"]["value"] is not None]
    series = series_of(cells)
    scale = svg.scale_for(
        value
        for cell in shown
        for value in (cell["metrics"]["csg"]["low"], cell["metrics"]["csg"]["high"])
    )
    groups = [
        ChartGroup(title, tuple(_gap_row(cell, scale, series) for cell in members))
        for title, members in grouped(shown)
    ]
    return groups, svg.axis(scale)


def _gap_row(cell: Cell, scale: svg.Scale, series: Mapping[tuple[str, str], int]) -> ChartRow:
    csg = cell["metrics"]["csg"]
    words = interval(csg, 2)
    kind = f"s{series[cell['attack'], cell['defense']] % 6}"
    drawing = svg.interval_row(
        scale,
        csg["value"],
        csg["low"],
        csg["high"],
        kind,
        f"CSG {words}",
        hollow=cell["knowledge"] == "none",
    )
    return ChartRow(cell_name(cell), (drawing,), words)


def accuracy_chart(cells: Sequence[Cell]) -> tuple[list[ChartGroup], Markup]:
    """The four accuracies of every cell as two bars, with all tokens and compressed."""
    shown = [cell for cell in cells if cell["n"]]
    groups = [
        ChartGroup(title, tuple(_accuracy_row(cell) for cell in members))
        for title, members in grouped(shown)
    ]
    return groups, svg.axis(svg.UNIT)


def _accuracy_row(cell: Cell) -> ChartRow:
    drawings, words = [], []
    for path in ("full", "compressed"):
        clean, attacked = (cell["metrics"][f"acc_{path}_{x}"] for x in ("clean", "attacked"))
        said = f"{clean['value']:.2f} → {attacked['value']:.2f}"
        drawings.append(
            svg.bar_row(
                clean["value"],
                attacked["value"],
                attacked["low"],
                attacked["high"],
                path,
                f"accuracy {path}, clean to attacked: {said}",
            )
        )
        words.append(said)
    return ChartRow(cell_name(cell), tuple(drawings), "\n".join(words))


def budget_charts(cells: Sequence[Cell]) -> list[Curves]:
    """CSFR against the budget, one chart per compression, where there are several budgets."""
    series = series_of(cells)
    charts = []
    for title, members in grouped(cells):
        measured = [cell for cell in members if cell["metrics"]["csfr"]["value"] is not None]
        budgets = sorted({cell["epsilon"] for cell in measured})
        if len(budgets) > 1:
            charts.append(_curves(title, measured, budgets, series))
    return charts


def _curves(
    title: str,
    cells: Sequence[Cell],
    budgets: Sequence[float],
    series: Mapping[tuple[str, str], int],
) -> Curves:
    place = {epsilon: i / (len(budgets) - 1) for i, epsilon in enumerate(budgets)}
    lines: dict[int, list[svg.Point]] = {}
    legend: dict[str, str] = {}
    said = []
    for cell in sorted(cells, key=lambda one: one["epsilon"]):
        csfr, name = cell["metrics"]["csfr"], (cell["attack"], cell["defense"])
        point = svg.Point(place[cell["epsilon"]], csfr["value"], csfr["low"], csfr["high"])
        lines.setdefault(series[name], []).append(point)
        defense = "" if name[1] in ("", "none") else f" against {plain(name[1])}"
        legend[f"s{series[name] % 6}"] = f"{plain(name[0])}{defense}"
        said.append(f"{cell_name(cell)}: {interval(csfr, 2)}")
    ticks = [(place[epsilon], epsilon_text(epsilon)) for epsilon in budgets]
    return Curves(
        title=title,
        drawing=svg.curves(dict(sorted(lines.items())), ticks),
        legend=tuple(sorted(legend.items())),
        description="; ".join(said),
    )
