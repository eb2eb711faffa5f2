"""Weights of trained compressors for tiny models: random numbers, but a real folder."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from targets.compression import trained
from targets.compression.explainability_net import RelevanceNet
from targets.compression.quecc_net import QueryCompressor
from targets.compression.sparsifiner_net import Connectivity
from targets.compression.tokenflex_net import FlexProjector

TINY = {"text_width": 32, "text_layers": 4, "vision_width": 32, "vision_layers": 3}
"""Facts of the model in `tests/conformance/tiny.py`."""
_NETWORKS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "explainability": (RelevanceNet, {"channels": [4, 8], "kernel": 3}),
    "quecc": (
        QueryCompressor,
        {"vision": 32, "text": 32, "levels": 2, "heads": 4, "strides": [2, 3, 6]},
    ),
    "sparsifiner": (Connectivity, {"layers": 3, "tokens": 37, "width": 8}),
    "tokenflex": (FlexProjector, {"vision": 32, "text": 32, "hidden": 24}),
}
_FOLDER = tempfile.TemporaryDirectory(prefix="redteam-weights-")


def network(name: str, seed: int = 0) -> nn.Module:
    """A network for the tiny model, every matrix loud."""
    kind, arguments = _NETWORKS[name]
    made = trained.seeded(kind, arguments, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                scale = parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return made.eval().requires_grad_(False)


@functools.lru_cache
def folder(name: str, seed: int = 0) -> str:
    """A folder with the weights of `network`; gone when the tests end."""
    path = Path(_FOLDER.name) / f"{name}-{seed}"
    trained.write(path, name, network(name, seed), _NETWORKS[name][1], TINY)
    return str(path)
