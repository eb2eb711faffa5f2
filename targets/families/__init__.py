"""Adapters to families of models; `family_of` finds the one for a loaded model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from targets.errors import TargetError

if TYPE_CHECKING:
    from targets.families.base import Family

SUPPORTED: Final = {
    "gemma3": "targets.families.gemma3:Gemma3",
    "idefics3": "targets.families.idefics3:Idefics3",
    "internvl": "targets.families.internvl:InternVL",
    "llava": "targets.families.llava:Llava",
    "llava_next": "targets.families.llava_next:LlavaNext",
    "llava_onevision": "targets.families.llava_onevision:LlavaOnevision",
    "paligemma": "targets.families.paligemma:PaliGemma",
    "qwen2_5_vl": "targets.families.qwen2_5_vl:Qwen25VL",
    "qwen2_vl": "targets.families.qwen2_vl:Qwen2VL",
    "qwen3_vl": "targets.families.qwen3_vl:Qwen3VL",
    "smolvlm": "targets.families.smolvlm:SmolVLM",
}
"""``config.model_type`` → where its adapter lives; a new family is one line and one file."""


def adapter_of(kind: str | None) -> type[Family] | None:
    """The adapter class for a ``config.model_type``; None if there is none."""
    import importlib

    if kind not in SUPPORTED:
        return None
    module, name = SUPPORTED[kind].split(":")
    found: type[Family] = getattr(importlib.import_module(module), name)
    return found


def family_of(model: Any) -> Family:  # noqa: ANN401 - transformers is untyped
    """The adapter for a loaded model.

    Raises:
        TargetError: if its family is not supported.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    adapter: Any = adapter_of(kind)
    if adapter is None:
        raise TargetError(
            f"models of type {kind!r} ({type(model).__name__}) are not supported; supported: "
            f"{', '.join(sorted(SUPPORTED))}"
        )
    family: Family = adapter(model)
    return family
