"""Compressors of visual tokens, and the session that installs one in a model.

Names are imported on first use, so that reading a compressor's options does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from targets.compression.attentive_removal import AttentiveRemoval
    from targets.compression.base import Compressor, Selection
    from targets.compression.catp import CATP
    from targets.compression.cdpruner import CDPruner
    from targets.compression.divprune import DivPrune
    from targets.compression.downsample import Downsample
    from targets.compression.drop_all import DropAll
    from targets.compression.explainability import Explainability
    from targets.compression.fastervlm import FasterVLM
    from targets.compression.fastv import FastV
    from targets.compression.grid import Grid
    from targets.compression.hiprune import HiPrune
    from targets.compression.hired import HiRED
    from targets.compression.information_horizon import InformationHorizon
    from targets.compression.pool import Pool
    from targets.compression.prumerge import PruMerge
    from targets.compression.pyramiddrop import PyramidDrop
    from targets.compression.quecc import QueCC
    from targets.compression.random import Random
    from targets.compression.session import CompressionSession, compress
    from targets.compression.sparsevlm import SparseVLM
    from targets.compression.sparsifiner import Sparsifiner
    from targets.compression.token_sparse_attention import TokenSparseAttention
    from targets.compression.tokenflex import TokenFLEX
    from targets.compression.tome import ToMe
    from targets.compression.transprune import TransPrune
    from targets.compression.uniform import Uniform
    from targets.compression.vasparse import VASparse
    from targets.compression.visiondrop import VisionDrop
    from targets.compression.visionzip import VisionZip
    from targets.compression.vispruner import VisPruner
    from targets.compression.zoo_prune import ZooPrune

_HOMES: Final = {
    "AttentiveRemoval": "attentive_removal",
    "CATP": "catp",
    "CDPruner": "cdpruner",
    "CompressionSession": "session",
    "Compressor": "base",
    "DivPrune": "divprune",
    "Downsample": "downsample",
    "DropAll": "drop_all",
    "Explainability": "explainability",
    "FastV": "fastv",
    "FasterVLM": "fastervlm",
    "Grid": "grid",
    "HiPrune": "hiprune",
    "HiRED": "hired",
    "Pool": "pool",
    "PruMerge": "prumerge",
    "InformationHorizon": "information_horizon",
    "PyramidDrop": "pyramiddrop",
    "QueCC": "quecc",
    "Random": "random",
    "Selection": "base",
    "SparseVLM": "sparsevlm",
    "Sparsifiner": "sparsifiner",
    "ToMe": "tome",
    "TokenFLEX": "tokenflex",
    "TokenSparseAttention": "token_sparse_attention",
    "TransPrune": "transprune",
    "Uniform": "uniform",
    "VASparse": "vasparse",
    "VisPruner": "vispruner",
    "VisionDrop": "visiondrop",
    "VisionZip": "visionzip",
    "ZooPrune": "zoo_prune",
    "compress": "session",
}

__all__ = [
    "CATP",
    "AttentiveRemoval",
    "CDPruner",
    "CompressionSession",
    "Compressor",
    "DivPrune",
    "Downsample",
    "DropAll",
    "Explainability",
    "FastV",
    "FasterVLM",
    "Grid",
    "HiPrune",
    "HiRED",
    "InformationHorizon",
    "Pool",
    "PruMerge",
    "PyramidDrop",
    "QueCC",
    "Random",
    "Selection",
    "SparseVLM",
    "Sparsifiner",
    "ToMe",
    "TokenFLEX",
    "TokenSparseAttention",
    "TransPrune",
    "Uniform",
    "VASparse",
    "VisPruner",
    "VisionDrop",
    "VisionZip",
    "ZooPrune",
    "compress",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the module holds
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
