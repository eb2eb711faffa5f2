"""What is printed of a defence's badge, from summary.json alone: marks, notes, failed rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from reports.text import count, plain

VERIFIED: Final = "ADAPTIVE-VERIFIED"
UNVERIFIED: Final = "UNVERIFIED (upper bound)"
MEANING: Final = (
    "A defence is ADAPTIVE-VERIFIED if every rule that applies and that can be checked holds. "
    "Otherwise its figures are an upper bound of what it saves: an attack that was not tried, or "
    "was too weak, may take it all away."
)
SHOWN: Final = 3
"""Failed rules in a note; all are in `redteam audit` and in the reports."""
_OWN: Final = " (unverified)"
"""What a scenario adds to the label of a defence that none of its attacks adapts to."""


def defense_text(cell: Mapping[str, Any]) -> str:
    """The defence of a cell of the summary, with its mark; "" without one."""
    return marked(cell["defense"], cell.get("badge", ""))


def marked(label: str, badge: str) -> str:
    """The label of a defence with the mark of its badge.

    A scenario marks what no attack of it adapts to; that mark is not said twice.
    """
    if label in ("", "none"):
        return ""
    return bare(label) + {VERIFIED: " (adaptive-verified)", UNVERIFIED: _OWN}.get(badge, "")


def worst(badges: Iterable[str]) -> str:
    """The badge of a defence at several places; "" without one."""
    found = set(badges)
    return UNVERIFIED if UNVERIFIED in found else VERIFIED if VERIFIED in found else ""


def bare(label: str) -> str:
    """The label of a defence without the mark that a scenario gives it."""
    return plain(label).removesuffix(_OWN)


def failed(entry: Mapping[str, Any], level: str = "MUST") -> list[Mapping[str, Any]]:
    """Rules of a level that failed at a place."""
    return [rule for rule in entry["rules"] if rule["state"] == "failed" and rule["level"] == level]


def unchecked(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rules that apply and that nothing in a run decides."""
    return [rule for rule in entry["rules"] if rule["state"] == "not checked"]


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What the figures of each defence are worth, with the first rules that failed."""
    found = []
    for one in summary.get("defenses", ()):
        name = bare(one["defense"])
        worst = next((p for p in one["places"] if p["badge"] != VERIFIED), one["places"][0])
        blocking = failed(worst)
        if not blocking:
            open_ = sorted({rule["rule"] for rule in unchecked(worst)})
            found.append(
                f"{name} is {VERIFIED}: every rule that can be checked holds; not checked: "
                f"{', '.join(map(str, open_)) or 'none'} (docs/defenses.md)."
            )
            continue
        told = "; ".join(rule_text(rule) for rule in blocking[:SHOWN])
        more = len(blocking) - SHOWN
        rest = f"; and {count(more, 'rule')} more" if more > 0 else ""
        where = f" on {plain(worst['target'])}, {plain(worst['compression'])}"
        found.append(f"{name} is {UNVERIFIED}{where}: {told}{rest}. All rules: redteam audit.")
    return found


def rule_text(rule: Mapping[str, Any]) -> str:
    """Number, what was seen, and what to do."""
    remedy = f" — {rule['remedy']}" if rule["remedy"] else ""
    return f"rule {rule['rule']} ({rule['title']}): {plain(rule['message'])}{remedy}"
