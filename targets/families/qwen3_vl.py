"""Qwen3-VL: as Qwen2-VL, with features of earlier tower blocks added inside the language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from targets.errors import TargetError
from targets.families.qwen2_vl import QwenVL


class Qwen3VL(QwenVL):
    """Adapter for `Qwen3VLForConditionalGeneration`.

    DeepStack (arXiv 2406.04334) adds features of three tower blocks to the visual columns behind
    the first three decoder layers. Where columns have been dropped by then, those that are left
    get theirs; a merged token gets those of the token whose place it has [inferred], since the
    additions are made in the tower before anything is merged.

    Raises:
        TargetError: for a text model with a sliding window.
    """

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl",)
    why_whole: ClassVar[str] = (
        "squares of neighbouring patches are merged into tokens, behind the tower and behind some "
        "of its layers"
    )

    def attach(self, current: Any) -> Sequence[Any]:  # noqa: ANN401 - a function
        """Also puts itself around the addition of this one language model."""
        return [*super().attach(current), _DeepStack(self.text, current)]


class _DeepStack:
    """Stands around ``_deepstack_process`` of one language model until it is removed.

    The model keeps handing over the features of all visual tokens; they are picked here for those
    that are left at the layer they are added behind.
    """

    def __init__(self, text: Any, current: Any) -> None:  # noqa: ANN401
        self._text, self._current, self._behind = text, current, 0
        self._start = text.register_forward_pre_hook(self._begin)
        text.__dict__["_deepstack_process"] = self._add

    def remove(self) -> None:
        """Restore the model's own."""
        self._start.remove()
        self._text.__dict__.pop("_deepstack_process", None)

    def _begin(self, module: object, inputs: object) -> None:
        del module, inputs
        self._behind = 0

    def _add(self, hidden: Tensor, visual: Tensor, features: Tensor) -> Tensor:
        """Add `features`, one for each visual token in reading order, to what is left of them."""
        del visual
        # Called once behind each of the first layers, in their order.
        layer, self._behind = self._behind, self._behind + 1
        slots = self._current().group(layer).slots
        if slots is None:
            raise TargetError("qwen3_vl: visual features were added to columns without images")
        first = slots.totals.cumsum(0) - slots.totals
        tokens = (first[:, None] + slots.carries)[slots.alive]
        rows = slots.rows[:, None].expand_as(slots.columns)[slots.alive]
        places = (rows, slots.columns[slots.alive])
        added = features.to(hidden.device, hidden.dtype)[tokens]
        return hidden.index_put(places, added, accumulate=True)
