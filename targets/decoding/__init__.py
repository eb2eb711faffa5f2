"""Decoding methods: how a model's answer tokens are chosen, beside greedy decoding.

Names are imported on first use, so that reading a method's options does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from targets.decoding.attention import AttentionCall, AttentionRule, Columns
    from targets.decoding.base import Decoding, Step, View

_HOMES: Final = {
    "AttentionCall": "attention",
    "AttentionRule": "attention",
    "Columns": "attention",
    "Decoding": "base",
    "Step": "base",
    "View": "base",
}

__all__ = ["AttentionCall", "AttentionRule", "Columns", "Decoding", "Step", "View"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the module holds
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
