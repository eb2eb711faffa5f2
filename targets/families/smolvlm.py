"""SmolVLM: Idefics3's architecture at a small size."""

from __future__ import annotations

from typing import ClassVar

from targets.families.idefics3 import Idefics3


class SmolVLM(Idefics3):
    """Adapter for `SmolVLMForConditionalGeneration` (SmolVLM2; the first SmolVLM is an Idefics3).

    Videos are not supported: their frames would count as images.
    """

    model_types: ClassVar[tuple[str, ...]] = ("smolvlm",)
    name = "smolvlm"
