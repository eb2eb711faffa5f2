"""The page of ``redteam measure``: accuracy against tokens, costs, and what is kept where."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from reports import measurement as records
from reports.html.render import environment, styled
from reports.html.svg import tag
from reports.measurement import Measurement, Setting, accuracy_interval

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 220, 130, 26, 108


def render(found: Measurement) -> str:
    """The page as text."""
    template = environment().get_template("measurement.html")
    targets = list(dict.fromkeys(one.target for one in found.settings))
    return template.render(
        found=found,
        columns=records.COLUMNS,
        practical=records.PRACTICAL_FORMULA,
        targets=[_target(found, target) for target in targets],
        **styled(),
    )


def write(folder: Path, found: Measurement) -> Path:
    """Write the page beside the record."""
    path = folder / "measurement.html"
    path.write_text(render(found), encoding="utf-8")
    return path


def _target(found: Measurement, target: str) -> dict[str, Any]:
    full = found.full(target)
    curves = list(found.curves(target))
    control = dict(curves).get("random") or next(
        (settings for name, settings in curves if name.startswith("random")), []
    )
    return {
        "name": target,
        "full": full,
        "rows": list(records.rows(found, target)),
        "layers": [
            (one.compression or "all tokens", " ".join(f"{n:.4g}" for n in one.speed.visual))
            for one in found.of(target)
            if one.speed is not None
        ],
        "scores": [
            (one.compression or "all tokens", records.scores_text(one))
            for one in found.of(target)
            if records.scores_text(one)
        ],
        "plots": [_plot(full, method, settings, control, found) for method, settings in curves],
        "maps": [
            {"name": one.compression, "svg": heat(one.grid, one.frequency)}
            for one in found.of(target)
            if one.compression and one.grid and one.frequency
        ],
        "overlaps": _closest(found, target),
        "evidence": [
            {
                "one": one,
                "only": heat(one.grid, one.only, signed=True),
                "without": heat(one.grid, one.without, signed=True),
            }
            for one in found.evidence
            if one.target == target and one.grid[0] * one.grid[1] == len(one.only)
        ],
        "horizons": [one for one in found.horizons if one.target == target],
    }


def _closest(found: Measurement, target: str) -> list[dict[str, Any]]:
    """For each setting, the one whose kept sets are most and least like its own."""
    pairs: dict[str, list[tuple[float, str]]] = {}
    for one in found.overlaps:
        if one.target == target and _budget(one.first) == _budget(one.second):
            pairs.setdefault(one.first, []).append((one.jaccard, one.second))
            pairs.setdefault(one.second, []).append((one.jaccard, one.first))
    return [
        {"name": name, "most": max(others), "least": min(others)} for name, others in pairs.items()
    ]


def _budget(label: str) -> str:
    return label.rpartition(" ")[2]


def _plot(
    full: Setting,
    method: str,
    settings: Sequence[Setting],
    control: Sequence[Setting],
    found: Measurement,
) -> dict[str, Any]:
    best = found.practical(full.target, method)
    return {
        "name": method,
        "svg": _curve(full, settings, control if method != "random" else ()),
        "practical": None if best is None else f"K_prac {best.left:.4g}",
    }


def _curve(full: Setting, settings: Sequence[Setting], control: Sequence[Setting]) -> Markup:
    """Accuracy against retention, 0 to 1 on both axes, with random selection in grey."""
    parts = []
    for level in (0.0, 0.5, 1.0):
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH, y1=_y(level), y2=_y(level), class_="tick"))
        parts.append(tag("text", f"{level:g}", x=0, y=_y(level) + 4))
    for share, label in ((0.0, "0"), (0.5, "half"), (1.0, "all tokens")):
        anchor = {0.0: "start", 0.5: "middle", 1.0: "end"}[share]
        parts.append(tag("text", label, x=_x(share), y=_HEIGHT - 4, text_anchor=anchor))
    parts.append(
        tag("line", x1=_LEFT, x2=_WIDTH, y1=_y(full.accuracy), y2=_y(full.accuracy), class_="zero")
    )
    parts += _line(full, control, "s0") + _line(full, settings, "s1")
    return tag(
        "svg", Markup().join(parts), class_="curves", width=_WIDTH, height=_HEIGHT, role="img",
        aria_label="accuracy against the share of tokens kept",
    )  # fmt: skip


def _line(full: Setting, settings: Sequence[Setting], style: str) -> list[Markup]:
    points = [(1.0, full.accuracy)] if settings else []
    points += [(one.left / max(1.0, one.tokens), one.accuracy) for one in settings]
    parts = []
    for (x1, y1), (x2, y2) in itertools.pairwise(points):
        parts.append(
            tag("line", x1=_x(x1), y1=_y(y1), x2=_x(x2), y2=_y(y2), class_=f"curve {style}")
        )
    for one in settings:
        x, (low, high) = _x(one.left / max(1.0, one.tokens)), accuracy_interval(one)
        parts.append(tag("line", x1=x, x2=x, y1=_y(low), y2=_y(high), class_=f"span {style}"))
        parts.append(tag("circle", cx=x, cy=_y(one.accuracy), r=3, class_=f"dot {style}"))
    return parts


def _x(share: float) -> float:
    return round(_LEFT + 4 + (_WIDTH - _LEFT - 10) * share, 2)


def _y(value: float) -> float:
    return round(_BOTTOM - (_BOTTOM - 8) * min(1.0, max(0.0, value)), 2)


def heat(grid: tuple[int, int], values: Sequence[float], *, signed: bool = False) -> Markup:
    """A map of values on a grid: darker is larger; below zero in the other colour.

    Args:
        grid: rows and columns.
        values: row by row, in [0, 1], or scaled by their largest absolute value if `signed`.
        signed: whether they may be negative.
    """
    rows, columns = grid
    largest = max((abs(value) for value in values), default=0.0) if signed else 1.0
    cells = []
    for index, value in enumerate(values):
        share = 0.0 if largest <= 0 else min(1.0, abs(value) / largest)
        if share < 0.004:
            continue
        cells.append(
            tag("rect", x=index % columns, y=index // columns, width=1, height=1,
                class_="below" if value < 0 else "above", fill_opacity=round(share, 3))
        )  # fmt: skip
    frame = tag("rect", x=0, y=0, width=columns, height=rows, class_="frame")
    return tag(
        "svg", Markup().join([frame, *cells]), class_="heat", viewBox=f"0 0 {columns} {rows}",
        role="img", aria_label="map over the positions of the picture",
    )  # fmt: skip
