"""Qwen2.5-VL: as Qwen2-VL, with a tower most of whose blocks attend within windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from targets.families.qwen2_vl import QwenVL


class Qwen25VL(QwenVL):
    """Adapter for `Qwen2_5_VLForConditionalGeneration`.

    Inside the tower tokens stand window by window; whatever leaves this adapter has them row by
    row, as the language model gets them. In a windowed block the attention a patch receives comes
    from its own window only, which is no measure across windows; the features come from the last
    block, which has full attention in the published models.

    Raises:
        TargetError: for a text model with a sliding window.
    """

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)
    why_whole: ClassVar[str] = (
        "its layers attend within windows of a whole grid, and each square of neighbouring patches "
        "is merged into one token"
    )

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - transformers is untyped
        super().__init__(model)
        vision = model.config.vision_config
        self.window = int(vision.window_size) // self.merge // int(vision.patch_size)
        self.full = frozenset(int(layer) for layer in vision.fullatt_block_indexes)

    def token_order(self, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Picture by picture, window by window, row by row."""
        parts, first = [], 0
        for grid in grids:
            parts += [window + first for window in self._windows(grid)]
            first += grid[0] * grid[1]
        return torch.cat(parts)

    def segments(self, layer: int, grids: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """Whole pictures in blocks with full attention, else windows."""
        if layer in self.full:
            return super().segments(layer, grids)
        block = self.merge**2
        return tuple(len(window) * block for grid in grids for window in self._windows(grid))

    def _windows(self, grid: tuple[int, int]) -> list[Tensor]:
        """Tokens of each window of a picture, left to right and top to bottom; edges are cut."""
        tokens = torch.arange(grid[0] * grid[1]).view(grid)
        bands = torch.split(tokens, self.window, 0)
        return [part.flatten() for band in bands for part in torch.split(band, self.window, 1)]
