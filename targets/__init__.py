"""Targets: LVLMs, the compression of their visual tokens, and the views attacks get of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from targets.lvlm import LVLM, Answered

_HOMES: Final = {"LVLM": "targets.lvlm", "Answered": "targets.lvlm"}

__all__ = ["LVLM", "Answered"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the module holds
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
