"""Accuracy against retention: what compression costs by itself, and what an attack takes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from reports.html import svg
from reports.html.charts import Curves, Series, against, panels, series_of
from reports.reading import NORMS, cell_name
from reports.records import Manifest
from reports.text import epsilon_text, interval, number, plain

Cell = Mapping[str, Any]
LARGE: Final = 64 / 255
"""Budgets from here on are sanity checks of an attack, not a threat: not shown where others are."""
CLEAN: Final = "clean dash1"
"""Classes of the curve without an attack."""
_BUDGET: Final = ("retention", "keep_tokens")
_TICKS: Final = tuple((i / 4, f"{25 * i} %") for i in range(5))


def retention_charts(manifest: Manifest, cells: Sequence[Cell]) -> list[Curves]:
    """A chart for each target, method of compression and norm, with a curve for each attack."""
    series = series_of(cells)
    methods = {cell.id: _method(cell.spec.get("compression")) for cell in manifest.cells}
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        if cell["n"] and cell.get("retention") is not None:
            key = str(cell["target"]), methods[cell["id"]], str(cell["norm"])
            groups.setdefault(key, []).append(cell)
    several = len({target for target, _, _ in groups}) > 1
    return [
        _chart(members, panel, series, several)
        for members in groups.values()
        for panel in panels(_headline(members), series)
    ]


def _method(spec: object) -> str:
    """A compression without its budget: settings of one method make a curve."""
    if isinstance(spec, Mapping):
        spec = {key: value for key, value in spec.items() if key not in _BUDGET}
    return json.dumps(spec, sort_keys=True, default=str)


def _headline(cells: Sequence[Cell]) -> list[Cell]:
    """Of each attack the cells of its largest budget that is still a threat."""
    least = min(cell["epsilon"] for cell in cells)
    small = [cell for cell in cells if cell["epsilon"] < max(LARGE, least + 1e-9)]
    top: dict[tuple[str, str], float] = {}
    for cell in small:
        name = cell["attack"], cell["defense"]
        top[name] = max(top.get(name, 0.0), cell["epsilon"])
    return [cell for cell in small if cell["epsilon"] == top[cell["attack"], cell["defense"]]]


def _chart(
    every: Sequence[Cell],
    shown: Sequence[Cell],
    series: Mapping[tuple[str, str], Series],
    several: bool,
) -> Curves:
    first = every[0]
    label = re.sub(r" \d[\d.]*( ?%)?$", "", plain(first["compression"]))
    title = f"{plain(first['target'])} · {label}" if several else label
    if first["norm"] != "linf":
        title += f", {NORMS.get(first['norm'], plain(first['norm']))}"
    clean = _line(every, "clean")
    lines, legend = [(CLEAN, clean)], [(CLEAN, "clean: compression alone")]
    said = [f"clean {_said(clean)}"]
    for name in dict.fromkeys((cell["attack"], cell["defense"]) for cell in shown):
        mine = [cell for cell in shown if (cell["attack"], cell["defense"]) == name]
        line = _line(mine, "attacked")
        lines.append((series[name].kind, line))
        legend.append(
            (series[name].kind, f"{against(mine[0])}, {epsilon_text(mine[0]['epsilon'])}")
        )
        said.append(f"{cell_name(mine[0])} {_said(line)}")
    drop = max(every, key=lambda cell: cell["metrics"]["clean_drop"]["value"] or 0.0)
    return Curves(
        title=title,
        drawing=svg.curves(lines, _TICKS),
        legend=tuple(legend),
        description="; ".join(said),
        note=f"Compression alone costs {interval(drop['metrics']['clean_drop'], 2)} "
        f"at {number(100 * drop['retention'], 0)} %.",
    )


def _line(cells: Sequence[Cell], image: str) -> list[svg.Point]:
    """Left to right: the compressed accuracy at each retention, then that with all tokens."""
    by_retention = {cell["retention"]: cell for cell in cells}
    points = [
        _point(share, by_retention[share]["metrics"][f"acc_compressed_{image}"])
        for share in sorted(by_retention)
        if share < 1
    ]
    most = by_retention[max(by_retention)]
    return [*points, _point(1.0, most["metrics"][f"acc_full_{image}"])]


def _point(x: float, estimate: Mapping[str, Any]) -> svg.Point:
    return svg.Point(x, estimate["value"], estimate["low"], estimate["high"])


def _said(points: Sequence[svg.Point]) -> str:
    return ", ".join(
        f"{number(one.value, 2)} [{number(one.low, 2)}, {number(one.high, 2)}] "
        f"at {number(100 * one.x, 0)} %"
        for one in points
    )
