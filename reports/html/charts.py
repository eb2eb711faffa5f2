"""Which charts the report shows, and from which numbers; `svg` draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from reports.html import svg
from reports.marks import defense_text
from reports.reading import NORMS, cell_name, minimal_text
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
        title: target and compression, with the part where there are several.
        drawing: the chart.
        legend: classes of each series and its name.
        description: the same numbers in words, for who does not see the chart.
        note: a sentence that stands below it.
    """

    title: str
    drawing: Markup
    legend: tuple[tuple[str, str], ...]
    description: str
    note: str = ""


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


_COLOURS = 5
"""Attacks in one chart; the sixth colour, grey, is for controls."""


@dataclass(frozen=True, slots=True)
class Series:
    """How an attack (with a defence) is drawn everywhere in the report.

    Attributes:
        kind: classes of its lines and dots.
        panel: of the charts that cannot hold all attacks; None for controls, which are in each.
    """

    kind: str
    panel: int | None


def series_of(cells: Sequence[Cell]) -> dict[tuple[str, str], Series]:
    """Colour and panel of each attack and defence, in the order of the cells."""
    found: dict[tuple[str, str], Series] = {}
    controls = attacks = 0
    for cell in cells:
        name = (cell["attack"], cell["defense"])
        if name in found:
            continue
        if cell["knowledge"] == "none":
            found[name] = Series(f"s0 dash{controls % 3}", None)
            controls += 1
        else:
            found[name] = Series(f"s{1 + attacks % _COLOURS}", attacks // _COLOURS)
            attacks += 1
    return found


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


def _gap_row(cell: Cell, scale: svg.Scale, series: Mapping[tuple[str, str], Series]) -> ChartRow:
    csg = cell["metrics"]["csg"]
    words = interval(csg, 2)
    kind = series[cell["attack"], cell["defense"]].kind
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
    """CSFR against the budget for each target, compression and norm with several budgets.

    Where there are more attacks than colours there are several charts, the controls in each.
    """
    series = series_of(cells)
    charts = []
    for title, members in grouped(cells):
        measured = [cell for cell in members if cell["metrics"]["csfr"]["value"] is not None]
        norms = list(dict.fromkeys(cell["norm"] for cell in measured))
        for norm in norms:
            same = [cell for cell in measured if cell["norm"] == norm]
            parts = panels(same, series)
            for index, panel in enumerate(parts, 1):
                part = f" ({index} of {len(parts)})" if len(parts) > 1 else ""
                name = f"{title}, {NORMS.get(norm, plain(norm))}" if len(norms) > 1 else title
                if len({cell["epsilon"] for cell in panel}) > 1:
                    charts.append(_curves(f"{name}{part}", panel, series))
    return charts


def panels(cells: Sequence[Cell], series: Mapping[tuple[str, str], Series]) -> list[list[Cell]]:
    """Cells of each chart, those of controls in all."""
    panel = {name: one.panel for name, one in series.items()}
    numbers = dict.fromkeys(panel[cell["attack"], cell["defense"]] for cell in cells)
    wanted: list[int | None] = [number for number in numbers if number is not None]
    return [
        [cell for cell in cells if panel[cell["attack"], cell["defense"]] in (None, number)]
        for number in wanted or [None]
    ]


def _curves(title: str, cells: Sequence[Cell], series: Mapping[tuple[str, str], Series]) -> Curves:
    budgets = sorted({cell["epsilon"] for cell in cells})
    place = {epsilon: i / (len(budgets) - 1) for i, epsilon in enumerate(budgets)}
    lines: dict[tuple[str, str], list[svg.Point]] = {
        name: [] for name in series if any(name == (c["attack"], c["defense"]) for c in cells)
    }
    said = []
    names = {(cell["attack"], cell["defense"]): against(cell) for cell in cells}
    for cell in sorted(cells, key=lambda one: one["epsilon"]):
        csfr = cell["metrics"]["csfr"]
        point = svg.Point(place[cell["epsilon"]], csfr["value"], csfr["low"], csfr["high"])
        lines[cell["attack"], cell["defense"]].append(point)
        said.append(f"{cell_name(cell)}: {interval(csfr, 2)}")
    ticks = [(place[epsilon], epsilon_text(epsilon)) for epsilon in budgets]
    return Curves(
        title=title,
        drawing=svg.curves([(series[name].kind, line) for name, line in lines.items()], ticks),
        legend=tuple((series[name].kind, names[name]) for name in lines),
        description="; ".join(said),
        note=_alone(cells),
    )


def _alone(cells: Sequence[Cell]) -> str:
    """What compression costs without an attack: it is in none of the failures drawn."""
    drops = {interval(cell["metrics"]["clean_drop"], 2): None for cell in cells}
    return f"Compression alone, without an attack, costs {' or '.join(drops)} of accuracy."


def against(cell: Cell) -> str:
    """An attack, and the defence where there is one."""
    shown = defense_text(cell)
    return plain(cell["attack"]) + (f" against {shown}" if shown else "")


def survival_charts(cells: Sequence[Cell]) -> list[Curves]:
    """Of each search for minimal epsilons, the share of samples that hold against the budget."""
    several = len({cell["target"] for cell in cells}) > 1
    return [
        _survival(cell, f"{plain(cell['target'])} · " if several else "")
        for cell in cells
        if cell.get("minimal_epsilon", {}).get("n")
    ]


def _survival(cell: Cell, target: str) -> Curves:
    found, top = cell["minimal_epsilon"], cell["epsilon"]
    steps = [svg.Point(0, 1, 1, 1)]
    for one in found["curve"]:
        x, share = one["epsilon"] / top, one["holding"]
        before = steps[-1]
        steps.append(svg.Point(x, before.value, before.low, before.high))
        steps.append(svg.Point(x, share["value"], share["low"], share["high"]))
    steps.append(svg.Point(1, steps[-1].value, steps[-1].low, steps[-1].high))
    levels = round(top * 255)
    ticks = [(i / 4, epsilon_text(top * i / 4) if levels % 4 == 0 else f"{i / 4:g} ε")
             for i in (0, 1, 2, 3, 4)]  # fmt: skip
    words = minimal_text(found, top)
    return Curves(
        title=f"{target}{plain(cell['compression'])} · {cell_name(cell)}",
        drawing=svg.curves([("s1", steps)], ticks, knots=False),
        legend=(("s1", words),),
        description=words,
    )
