"""Defences of large vision-language models under visual-token compression: one defence, one file.

To add one, write a file with a frozen dataclass that extends the base of its kind and names how
an attack that knows it goes through it. Names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from defenses.base import (
        UNVERIFIED,
        AdaptiveRoute,
        Defense,
        DefenseError,
        DefenseKind,
        InputDefense,
    )
    from defenses.selection import SelectionDefense

__all__ = [
    "UNVERIFIED",
    "AdaptiveRoute",
    "Defense",
    "DefenseError",
    "DefenseKind",
    "InputDefense",
    "SelectionDefense",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        home = "defenses.selection" if name == "SelectionDefense" else "defenses.base"
        found: object = getattr(import_module(home), name)
        return found
    raise AttributeError(f"module 'defenses' has no attribute {name!r}")
