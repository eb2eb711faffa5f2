"""What a defence saves against what it costs: robustness over clean accuracy and over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from reports import defended
from reports.html import svg
from reports.marks import VERIFIED, bare
from reports.text import epsilon_text, number, plain


@dataclass(frozen=True, slots=True)
class Defended:
    """One defence at one place.

    Attributes:
        number: in the drawing.
        name: of the defence.
        verified: whether attacks that know it were tried and every rule holds.
        clean: accuracy, compressed and clean, without and with it.
        robust: 1 − CSFR without and with it, the latter with its interval.
        slower: seconds of an answer as a multiple of those without it; None if unknown.
        words: all of it, for the legend.
    """

    number: int
    name: str
    verified: bool
    clean: tuple[float, float]
    robust: tuple[float, float, float, float]
    slower: float | None
    words: str


@dataclass(frozen=True, slots=True)
class TradeOff:
    """Two drawings of one target and compression, with the same dots.

    Attributes:
        title: the place.
        clean: robustness over clean accuracy.
        speed: robustness over the factor in time; empty if no time is known.
        dots: what is drawn.
    """

    title: str
    clean: Markup
    speed: Markup
    dots: tuple[Defended, ...]


def trade_offs(summary: Mapping[str, Any]) -> list[TradeOff]:
    """One for each target and compression with a defence that was attacked."""
    times = {
        (one["defense"], one["target"], one["compression"]): one["seconds"]
        for one in summary["timings"].get("defenses", ())
    }
    places: dict[tuple[str, str], list[Defended]] = {}
    for one in summary.get("defenses", ()):
        for place in one["places"]:
            where = place["target"], place["compression"]
            dots = places.setdefault(where, [])
            dot = _dot(len(dots) + 1, one["defense"], place, times.get((one["defense"], *where)))
            if dot is not None:
                dots.append(dot)
    several = len({target for target, _ in places}) > 1
    return [
        TradeOff(
            f"{plain(target)} · {plain(compression)}" if several else plain(compression),
            _drawn(dots, [dot.clean for dot in dots], "clean accuracy, compressed"),
            _speed([dot for dot in dots if dot.slower is not None]),
            tuple(dots),
        )
        for (target, compression), dots in places.items()
        if dots
    ]


def _dot(
    index: int, defense: str, place: Mapping[str, Any], seconds: Mapping[str, Any] | None
) -> Defended | None:
    """The hardest attacks that were tried decide: those that know it, else the others."""
    top, clean = defended.headline(place), place["clean"]["compressed"]
    if top is None or clean["none"]["value"] is None or clean["defended"]["value"] is None:
        return None
    knowing = bool(top["adaptive"]["attacks"])
    rates = top["adaptive" if knowing else "non_adaptive"]["csfr"]
    none, mine = rates["none"]["value"], rates["defended"]
    if mine["value"] is None:
        return None
    slower = _slower(seconds)
    accuracies = (clean["none"]["value"], clean["defended"]["value"])
    before = 1 - (mine["value"] if none is None else none)
    who = "attacks that know it" if knowing else "attacks that do not know it"
    time = "time unknown" if slower is None else f"×{number(slower, 2)} the time"
    return Defended(
        number=index,
        name=bare(defense),
        verified=place["badge"] == VERIFIED,
        clean=accuracies,
        robust=(before, 1 - mine["value"], 1 - mine["high"], 1 - mine["low"]),
        slower=slower,
        words=f"{bare(defense)}: holds {number(before, 2)} → {number(1 - mine['value'], 2)} "
        f"[{number(1 - mine['high'], 2)}, {number(1 - mine['low'], 2)}] at ε "
        f"{epsilon_text(top['epsilon'])} against {who}; clean {number(accuracies[0], 2)} → "
        f"{number(accuracies[1], 2)}; {time}",
    )


def _slower(seconds: Mapping[str, Any] | None) -> float | None:
    both = (seconds or {}).get("compressed") or {}
    if not both.get("none") or not both.get("defended") or not both["none"]["mean"]:
        return None
    return float(both["defended"]["mean"] / both["none"]["mean"])


def _speed(dots: Sequence[Defended]) -> Markup:
    steps = [(1.0, dot.slower) for dot in dots if dot.slower is not None]
    return _drawn(dots, steps, "time of an answer, × without it") if steps else Markup()


def _drawn(dots: Sequence[Defended], steps: Sequence[tuple[float, float]], label: str) -> Markup:
    """Dots with a line from where the same attacks stand without the defence."""
    return svg.scatter(
        [
            svg.Dot(
                str(dot.number), x, (dot.robust[0], dot.robust[1]), dot.robust[2:], dot.verified
            )
            for dot, x in zip(dots, steps, strict=True)
        ],
        label,
        "holds when compressed, 1 − CSFR",
    )
