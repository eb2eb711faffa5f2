"""Compressors of visual tokens, and the session that installs one in a model.

Names are imported on first use, so that reading a compressor's options does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from targets.compression.base import Compressor, Selection
    from targets.compression.divprune import DivPrune
    from targets.compression.drop_all import DropAll
    from targets.compression.explainability import Explainability
    from targets.compression.fastv import FastV
    from targets.compression.quecc import QueCC
    from targets.compression.random import Random
    from targets.compression.session import CompressionSession, compress
    from targets.compression.tokenflex import TokenFLEX
    from targets.compression.uniform import Uniform
    from targets.compression.visionzip import VisionZip

_HOMES: Final = {
    "CompressionSession": "session",
    "Compressor": "base",
    "DivPrune": "divprune",
    "DropAll": "drop_all",
    "Explainability": "explainability",
    "FastV": "fastv",
    "QueCC": "quecc",
    "Random": "random",
    "Selection": "base",
    "TokenFLEX": "tokenflex",
    "Uniform": "uniform",
    "VisionZip": "visionzip",
    "compress": "session",
}

__all__ = [
    "CompressionSession",
    "Compressor",
    "DivPrune",
    "DropAll",
    "Explainability",
    "FastV",
    "QueCC",
    "Random",
    "Selection",
    "TokenFLEX",
    "Uniform",
    "VisionZip",
    "compress",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the module holds
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
