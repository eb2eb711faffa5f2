"""A tiny randomly initialised model of every family; one line each.

A fixture module has `build_model(attention)` and `build_processor()`, and it or the module named
beside it has `inputs(processor, rows)` and `CASES` (rows of each kind of batch: a question and the
numbers of its pictures).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

FAMILIES: Final = {
    "llava": ("llava", "llava"),
    "llava_next": ("llava_next", "llava_next"),
    "llava_onevision": ("llava_onevision", "llava_next"),
    "qwen2_vl": ("qwen2_vl", "qwen"),
    "qwen2_5_vl": ("qwen2_5_vl", "qwen"),
    "qwen3_vl": ("qwen3_vl", "qwen"),
    "internvl": ("internvl", "tiled"),
    "idefics3": ("idefics3", "tiled"),
    "smolvlm": ("smolvlm", "tiled"),
    "paligemma": ("paligemma", "paligemma"),
    "gemma3": ("gemma3", "gemma3"),
}
"""``config.model_type`` → module of the model, module of the inputs."""


def build(family: str, attention: str = "sdpa") -> tuple[Any, Any]:
    """A model of a family and its processor."""
    module = import_module(f"families.{FAMILIES[family][0]}")
    return module.build_model(attention), module.build_processor()


def batch(family: str, processor: Any, case: str) -> dict[str, Any]:
    """The arguments of ``forward`` for one of `CASES`."""
    module = import_module(f"families.{FAMILIES[family][1]}")
    rows = import_module(f"families.{FAMILIES[family][1]}").CASES[case]
    made: dict[str, Any] = module.inputs(processor, rows)
    return made
