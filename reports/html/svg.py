"""Charts as inline SVG: no script, no library, readable in both colour schemes and on paper.

Horizontal positions are percentages and the SVG has no view box, so a chart follows the width of
the page while its text keeps its size. Colours come from classes in report.css.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from reports.text import plain


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values to percentages of the width.

    Attributes:
        low: value at the left end.
        high: value at the right end.
        ticks: values with a line.
    """

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Position in percent, kept within the chart."""
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(1.0, max(0.0, share)), 3)


_Vertical = Callable[[float], float]

UNIT = Scale(0, 1, (0, 0.25, 0.5, 0.75, 1))


def scale_for(values: Iterable[float]) -> Scale:
    """A scale with round ticks around values of a gap, 0 included."""
    ends = [0.0, *values]
    low, high = max(-1.0, min(ends)), min(1.5, max(ends))
    step = next(s for s in (0.05, 0.1, 0.25, 0.5, 1.0) if (high - low) / s <= 6 or s == 1.0)
    first, last = int(low // step), -int(-high // step)
    ticks = tuple(round(i * step, 2) for i in range(first, max(last, first + 1) + 1))
    return Scale(ticks[0], ticks[-1], ticks)


def tag(name: str, content: Markup | str = "", /, **attributes: object) -> Markup:
    """One element; ``class_`` and ``stroke_width`` become ``class`` and ``stroke-width``."""
    pairs = (
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), plain(str(value), 200_000))
        for key, value in attributes.items()
        if value is not None
    )
    inner = content if isinstance(content, Markup) else escape(plain(content))
    return Markup("<{0}{1}>{2}</{0}>").format(name, Markup().join(pairs), inner)


def grid(scale: Scale, height: float) -> Markup:
    """Vertical lines at the ticks, zero stronger."""
    return Markup().join(
        tag(
            "line", x1=f"{scale.at(tick)}%", x2=f"{scale.at(tick)}%", y1=0, y2=height,
            class_="zero" if tick == 0 else "tick",
        )
        for tick in scale.ticks
    )  # fmt: skip


def axis(scale: Scale) -> Markup:
    """The numbers below a stack of charts that share a scale."""
    labels = Markup().join(
        tag(
            "text", f"{tick:g}".replace("-", "−"), x=f"{scale.at(tick)}%", y=12,
            text_anchor="middle",
        )
        for tick in scale.ticks
    )  # fmt: skip
    return tag("svg", labels, class_="axis", width="100%", height=16, aria_hidden="true")


def interval_row(
    scale: Scale,
    value: float,
    low: float | None,
    high: float | None,
    kind: str,
    label: str,
    *,
    hollow: bool = False,
) -> Markup:
    """One dot with its interval; a hollow dot for controls, so that colour is not all."""
    parts = [grid(scale, 22)]
    if low is not None and high is not None:
        left, right = scale.at(low), scale.at(high)
        parts.append(tag("line", x1=f"{left}%", x2=f"{right}%", y1=11, y2=11, class_="span"))
        parts += [
            tag("line", x1=f"{x}%", x2=f"{x}%", y1=7, y2=15, class_="span") for x in (left, right)
        ]
    parts.append(
        tag("circle", cx=f"{scale.at(value)}%", cy=11, r=4.5, class_="hollow" if hollow else "dot")
    )
    return tag(
        "svg", Markup().join(parts), class_=f"plot {kind}", width="100%", height=22, role="img",
        aria_label=label,
    )  # fmt: skip


def bar_row(
    clean: float, attacked: float, low: float, high: float, kind: str, label: str
) -> Markup:
    """Accuracy on clean images as a pale bar, on attacked ones as a solid bar with its interval."""
    parts = [
        grid(UNIT, 16),
        tag("rect", x=0, y=2, width=f"{UNIT.at(clean)}%", height=12, class_="pale"),
        tag("rect", x=0, y=2, width=f"{UNIT.at(attacked)}%", height=12, class_="solid"),
        tag("line", x1=f"{UNIT.at(low)}%", x2=f"{UNIT.at(high)}%", y1=8, y2=8, class_="whisker"),
    ]
    return tag(
        "svg", Markup().join(parts), class_=f"bar {kind}", width="100%", height=16, role="img",
        aria_label=label,
    )  # fmt: skip


def stacked_row(parts: Sequence[tuple[str, int]], label: str) -> Markup:
    """Exclusive shares of one whole, each with its count where there is room for it."""
    whole, start, drawn = sum(count for _, count in parts) or 1, 0.0, []
    for name, count in parts:
        if not count:
            continue
        share = 100 * count / whole
        drawn.append(
            tag("rect", x=f"{round(start, 3)}%", y=2, width=f"{round(share, 3)}%", height=16,
                class_=f"stage-{name}")
        )  # fmt: skip
        if share > 2.2 * len(str(count)) + 1:
            middle = f"{round(start + share / 2, 3)}%"
            kind = f"on on-{name}"
            drawn.append(
                tag("text", f"{count:,}", x=middle, y=14, text_anchor="middle", class_=kind)
            )
        start += share
    return tag(
        "svg", Markup().join(drawn), class_="stack-bar", width="100%", height=20, role="img",
        aria_label=label,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a curve: x in [0, 1] of the width, the rest in [0, 1]."""

    x: float
    value: float
    low: float
    high: float


def curves(
    series: Sequence[tuple[str, Sequence[Point]]],
    ticks: Sequence[tuple[float, str]],
    *,
    knots: bool = True,
) -> Markup:
    """Curves with bands over a common axis.

    Args:
        series: classes of each curve and its points, left to right.
        ticks: positions in [0, 1] and their labels.
        knots: mark the points.
    """
    height, top, bottom = 170, 8, 150
    span = bottom - top

    def y(value: float) -> float:
        return round(bottom - span * min(1.0, max(0.0, value)), 2)

    parts = []
    for level in (0, 0.25, 0.5, 0.75, 1):
        parts.append(
            tag("line", x1="0%", x2="100%", y1=y(level), y2=y(level),
                class_="tick" if level else "zero")
        )  # fmt: skip
        parts.append(tag("text", f"{level:g}", x=0, y=y(level) - 3))
    for x, label in ticks:
        anchor = "start" if x < 0.05 else "end" if x > 0.95 else "middle"
        parts.append(tag("text", label, x=f"{_inset(x)}%", y=height - 4, text_anchor=anchor))
    for kind, points in series:
        parts.append(_band(points, kind, y, height))
        parts += _line(points, kind, y, knots)
    return tag("svg", Markup().join(parts), class_="curves", width="100%", height=height,
               aria_hidden="true")  # fmt: skip


def _inset(x: float) -> float:
    """Percent of the width, with room for the numbers of the vertical axis."""
    return round(9 + 88 * x, 3)


def _band(points: Sequence[Point], kind: str, y: _Vertical, height: int) -> Markup:
    upper = [f"{_inset(p.x)},{y(p.high)}" for p in points]
    lower = [f"{_inset(p.x)},{y(p.low)}" for p in reversed(points)]
    area = tag("polygon", points=" ".join(upper + lower))
    return tag(
        "svg", area, viewBox=f"0 0 100 {height}", preserveAspectRatio="none", width="100%",
        height=height, class_=f"band {kind}",
    )  # fmt: skip


def _line(points: Sequence[Point], kind: str, y: _Vertical, knots: bool) -> list[Markup]:
    parts = [
        tag(
            "line", x1=f"{_inset(a.x)}%", y1=y(a.value), x2=f"{_inset(b.x)}%", y2=y(b.value),
            class_=f"curve {kind}",
        )
        for a, b in pairwise(points)
    ]  # fmt: skip
    return parts + [
        tag("circle", cx=f"{_inset(p.x)}%", cy=y(p.value), r=4, class_=f"knot {kind}")
        for p in points
        if knots
    ]


@dataclass(frozen=True, slots=True)
class Dot:
    """A dot that came from elsewhere.

    Attributes:
        label: what stands in it.
        x: before and after.
        y: likewise, in [0, 1].
        whisker: interval of y after.
        filled: else hollow.
    """

    label: str
    x: tuple[float, float]
    y: tuple[float, float]
    whisker: tuple[float, float]
    filled: bool


def scatter(dots: Sequence[Dot], across: str, upwards: str) -> Markup:
    """Labelled dots, each with a line from where it came; y from 0 to 1.

    Args:
        dots: what is drawn.
        across: name of the horizontal axis.
        upwards: name of the vertical one.
    """
    height, top, bottom = 246, 34, 196
    ends = [value for dot in dots for value in dot.x]
    scale = _around(min(ends), max(ends))

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * min(1.0, max(0.0, value)), 2)

    def x(value: float) -> str:
        return f"{_inset(scale.at(value) / 100)}%"

    parts = [tag("text", upwards, x=0, y=11)]
    for level in (0, 0.25, 0.5, 0.75, 1):
        parts.append(
            tag("line", x1="0%", x2="100%", y1=y(level), y2=y(level),
                class_="tick" if level else "zero")
        )  # fmt: skip
        parts.append(tag("text", f"{level:g}", x=0, y=y(level) - 3))
    for tick in scale.ticks:
        parts.append(tag("text", f"{tick:g}", x=x(tick), y=bottom + 16, text_anchor="middle"))
    parts.append(tag("text", across, x="100%", y=height - 10, text_anchor="end"))
    for dot in dots:
        low, high = dot.whisker
        (x0, x1), (y0, y1) = map(x, dot.x), map(y, dot.y)
        parts += [
            tag("line", x1=x0, y1=y0, x2=x1, y2=y1, class_="came"),
            tag("circle", cx=x0, cy=y0, r=3, class_="came"),
            tag("line", x1=x1, x2=x1, y1=y(low), y2=y(high), class_="span"),
        ]
    for dot in dots:  # above all lines
        kind = "dot" if dot.filled else "hollow"
        parts.append(tag("circle", cx=x(dot.x[1]), cy=y(dot.y[1]), r=9, class_=kind))
        parts.append(
            tag("text", dot.label, x=x(dot.x[1]), y=y(dot.y[1]) + 4, text_anchor="middle",
                class_=f"in-{kind}")
        )  # fmt: skip
    return tag("svg", Markup().join(parts), class_="curves scatter s1", width="100%",
               height=height, aria_hidden="true")  # fmt: skip


def _around(low: float, high: float) -> Scale:
    """A scale with round ticks around values that need not include 0."""
    reach = max(high - low, 0.02)
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 25, 50, 100, 1e3, 1e6)
                if reach / s <= 6)  # fmt: skip
    first, last = int(low // step), -int(-high // step)
    last = max(last, first + 1)
    return Scale(
        first * step, last * step, tuple(round(i * step, 6) for i in range(first, last + 1))
    )


Boxes = Sequence[tuple[float, float, float, float]]
"""Top, left, bottom, right."""


def overlay(
    grid_size: tuple[int, int],
    kept: Sequence[int],
    evidence: Sequence[int] | None,
    boxes: Boxes | None = None,
    *,
    halo: bool = True,
) -> Markup:
    """Darken the dropped tokens of an image and outline the evidence.

    In units of one token of the grid, or of a pixel where `boxes` are given.

    Args:
        grid_size: rows and columns of the tokens.
        kept: tokens left.
        evidence: tokens that show what is asked about; None if unknown.
        boxes: where tokens lie, if not on one grid over the picture.
        halo: a dark edge around the outline, for pictures of any colour.
    """
    rows, columns = grid_size
    if boxes is None:
        dropped = sorted(set(range(rows * columns)) - set(kept))
        hidden, edge = _squares(dropped, columns), _outline(evidence, columns)
    else:
        # Tiles lie over the whole picture: what one of them dropped, another may have kept.
        dropped = sorted(set(range(len(boxes))) - set(kept))
        hidden, edge = _rectangles(boxes, dropped), _rectangles(boxes, evidence or ())
    made = tag("path", class_="dropped", d=hidden)
    if evidence and halo:
        made += tag("path", class_="evidence-halo", d=edge)
    return made + tag("path", class_="evidence", d=edge) if evidence else made


def _rectangles(boxes: Boxes, tokens: Iterable[int]) -> str:
    parts = []
    for top, left, bottom, right in (boxes[i] for i in tokens):
        parts.append(f"M{left:g} {top:g}H{right:g}V{bottom:g}H{left:g}z")
    return "".join(parts)


def _squares(tokens: Sequence[int], columns: int) -> str:
    """Runs of a row as one rectangle: a report may hold two thousand of these."""
    parts: list[str] = []
    start = 0
    for index, token in enumerate(tokens):
        ends = index + 1 == len(tokens) or tokens[index + 1] != token + 1
        if ends or (token + 1) % columns == 0:
            first = tokens[start]
            width = token - first + 1
            parts.append(f"M{first % columns} {first // columns}h{width}v1h-{width}z")
            start = index + 1
    return "".join(parts)


def _outline(tokens: Sequence[int] | None, columns: int) -> str:
    """Only the edges between a token of the set and one outside it."""
    inside = {(i // columns, i % columns) for i in tokens or ()}
    edges = []
    for row, column in sorted(inside):
        if (row - 1, column) not in inside:
            edges.append(f"M{column} {row}h1")
        if (row + 1, column) not in inside:
            edges.append(f"M{column} {row + 1}h1")
        if (row, column - 1) not in inside:
            edges.append(f"M{column} {row}v1")
        if (row, column + 1) not in inside:
            edges.append(f"M{column + 1} {row}v1")
    return "".join(edges)


def sparkline(values: Sequence[float]) -> Markup:
    """A small curve of a loss trace."""
    low, high = min(values), max(values)
    reach = (high - low) or 1.0
    points = " ".join(
        f"{100 * i / max(1, len(values) - 1):.1f},{22 - 20 * (value - low) / reach:.1f}"
        for i, value in enumerate(values)
    )
    line = tag("polyline", points=points)
    return tag("svg", line, class_="spark", viewBox="0 0 100 24", preserveAspectRatio="none",
               width=90, height=22, aria_hidden="true")  # fmt: skip
