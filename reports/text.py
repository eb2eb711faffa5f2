"""How numbers and foreign strings are written for people, the same in every report."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

NOT_APPLICABLE = "n/a"
"""Shown where a metric has an empty denominator: never 0."""

_INVISIBLE = frozenset("\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u3164\ufeff\uffa0")


def plain(text: str, limit: int = 2_000) -> str:
    """Make a foreign string safe to show: one line, nothing invisible, nothing that reorders text.

    Control, bidirectional, zero-width, surrogate, private and unassigned characters become visible
    escapes such as ``⟨U+202E⟩``, so that what a reader sees is what the string holds.

    Args:
        text: an answer, a question, a name: anything that came from outside.
        limit: longest result in characters before an ellipsis.
    """
    if len(text) <= limit and text.isprintable() and _INVISIBLE.isdisjoint(text):
        return text  # most strings, and all coordinates of charts
    shown = "".join(_visible(character) for character in text[: limit + 1])
    return shown if len(text) <= limit else shown[:limit] + "…"


def _visible(character: str) -> str:
    if character in "\n\r\t\u2028\u2029" or unicodedata.category(character) == "Zs":
        return " "
    if character in _INVISIBLE or not character.isprintable():
        return f"⟨U+{ord(character):04X}⟩"
    return character


def epsilon_text(epsilon: float) -> str:
    """Write a budget as people do: ``8/255`` where it is a whole number of grey levels.

    A radius above 1 is an l2 norm and no number of levels.
    """
    levels = epsilon * 255
    if epsilon <= 1 and abs(levels - round(levels)) < 1e-3:  # six decimals are written
        return f"{round(levels)}/255"
    return f"{epsilon:.4g}"


def number(value: float | None, digits: int = 3) -> str:
    """Write one number, or ``n/a``; a true minus sign, and no minus before a rounded zero."""
    if value is None:
        return NOT_APPLICABLE
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = f"{0:.{digits}f}"
    return text.replace("-", "−")


def interval(estimate: Mapping[str, Any], digits: int = 3) -> str:
    """Write ``value [low, high]`` of one entry of a cell's metrics."""
    if estimate["value"] is None:
        return NOT_APPLICABLE
    shown = number(estimate["value"], digits)
    if estimate["low"] is None:
        return shown
    return f"{shown} [{number(estimate['low'], digits)}, {number(estimate['high'], digits)}]"


def count(n: int, singular: str, plural: str | None = None) -> str:
    """Write a count with its noun: ``1 gate``, ``2,000 gates``."""
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"
