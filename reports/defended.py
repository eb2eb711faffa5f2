"""The table of defences, from summary.json: badge, what they save, what they cost, what failed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from reports import draws
from reports.marks import bare, failed
from reports.terminal import Table
from reports.text import epsilon_text, interval, number, plain

CAPTION: Final = (
    "CSFR without → with the defence at the largest budget below 64/255, worst case over attacks, "
    "sample by sample: of attacks that do not know it, and of attacks that do. Clean accuracy and "
    "seconds of one compressed answer, mean and 95th percentile, without → with it."
)


_COLUMNS: Final = (
    ("defense", False),
    ("badge", False),
    ("target", False),
    ("compression", False),
    ("ε", True),
    ("CSFR, not knowing it", True),
    ("CSFR, knowing it", True),
    ("over draws, expected", True),
    ("clean, full", True),
    ("clean, compressed", True),
    ("seconds", True),
    ("failed rules", False),
)
"""Name, and whether it holds numbers."""


def table(summary: Mapping[str, Any]) -> Table | None:
    """One row for each defence and place, the target where there are several; None without any."""
    places = [(one, place) for one in summary.get("defenses", ()) for place in one["places"]]
    if not places:
        return None
    times = {
        (one["defense"], one["target"], one["compression"]): one["seconds"]
        for one in summary["timings"].get("defenses", ())
    }
    rows = []
    for one, place in places:
        top = headline(place)
        seconds = times.get((one["defense"], place["target"], place["compression"]))
        rows.append(
            (
                bare(one["defense"]),
                place["badge"],
                plain(place["target"]),
                plain(place["compression"]),
                epsilon_text(top["epsilon"]) if top else "—",
                _change(top, "non_adaptive"),
                _change(top, "adaptive"),
                _drawn(top),
                _accuracy(place["clean"], "full"),
                _accuracy(place["clean"], "compressed"),
                _took(seconds),
                ", ".join(str(rule["rule"]) for rule in failed(place)) or "none",
            )
        )
    shown = [
        (name, number_, column)
        for (name, number_), column in zip(_COLUMNS, zip(*rows, strict=True), strict=True)
        if name != "target" or len(set(column)) > 1
        if name != "over draws, expected" or set(column) != {NOTHING}
    ]
    return Table(
        columns=tuple(name for name, _, _ in shown),
        numeric=tuple(number_ for _, number_, _ in shown),
        rows=tuple(zip(*(column for _, _, column in shown), strict=True)),
    )


def _change(budget: Mapping[str, Any] | None, sort: str) -> str:
    if budget is None or not budget[sort]["attacks"]:
        return "no attack"
    rate = budget[sort]["csfr"]
    return f"{number(rate['none']['value'], 2)} → {interval(rate['defended'], 2)}"


NOTHING: Final = "—"
"""Of a defence that draws nothing, or was asked under one draw."""


def _drawn(budget: Mapping[str, Any] | None) -> str:
    """CSFR over draws of the evaluation, of attacks that know it; else of those that do not."""
    for sort in ("adaptive", "non_adaptive"):
        if budget is not None and "draws" in budget[sort]:
            return draws.drawn_text(budget[sort]["draws"])
    return NOTHING


def _accuracy(clean: Mapping[str, Any], path: str) -> str:
    both = clean[path]
    return f"{number(both['none']['value'], 2)} → {number(both['defended']['value'], 2)}"


def _took(seconds: Mapping[str, Any] | None) -> str:
    """Compressed path: ``0.012 → 0.031 (p95 0.014 → 0.040)``."""
    both = (seconds or {}).get("compressed") or {}
    if not both.get("none") or not both.get("defended"):
        return "n/a"
    (mean, p95) = (
        f"{number(both['none'][part], 3)} → {number(both['defended'][part], 3)}"
        for part in ("mean", "p95")
    )
    return f"{mean} (p95 {p95})"


def headline(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """The budget that stands in the table: the largest below 64/255, else the largest."""
    budgets = entry["budgets"]
    small = [one for one in budgets if not one["large"]]
    known = [one for one in small if one["adaptive"]["attacks"]]
    found = known or small or budgets
    return found[-1] if found else None
