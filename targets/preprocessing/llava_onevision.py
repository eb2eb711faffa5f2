"""LLaVA-OneVision's image processor as a differentiable function of images in [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from targets.preprocessing.layout import Layout
from targets.preprocessing.llava_next import LlavaNextPreprocessor, check_images
from targets.preprocessing.resampling import resize


@dataclass(frozen=True, slots=True)
class LlavaOnevisionPreprocessor(LlavaNextPreprocessor):
    """As LLaVA-NeXT's where a picture is the only one of its prompt, else one padded square.

    Attributes:
        alone: whether each picture is the only one of its prompt. Prompts with several pictures
            get one tile of each: padded to a square, then resampled.
    """

    alone: bool = True

    def inputs(self, images: Tensor) -> dict[str, Tensor]:
        """`pixel_values`, `image_sizes` and `batch_num_images`; see `LlavaNextPreprocessor`.

        Where pictures are not alone, all of `images` are taken as those of one prompt.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1]; any height and width.

        Raises:
            TargetError: for another shape.
        """
        size = check_images(images)
        levels, count = images * 255, len(images)
        views = self.tiles(levels) if self.alone else self._square(levels)[:, None]
        prompts = [1] * count if self.alone else [count]
        return {
            "pixel_values": self.normalise(views),
            "image_sizes": torch.tensor([size] * count, device=images.device),
            "batch_num_images": torch.tensor(prompts, device=images.device),
        }

    def layout(self, size: tuple[int, int]) -> Layout:
        """Tokens of a picture of this height and width; newlines are placeholders only."""
        return self.packing.layout(size) if self.alone else self.packing.single(size)

    def _square(self, levels: Tensor) -> Tensor:
        """Pictures in the middle of squares of the mean colour, in the size of a tile."""
        height, width = levels.shape[-2:]
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        pad = (left, side - width - left, top, side - height - top)
        colour = levels.new_tensor(self.background)
        outside = torch.nn.functional.pad(torch.zeros_like(levels[:1, :1]), pad, value=1.0)
        square = torch.nn.functional.pad(levels, pad) + outside * colour[:, None, None]
        tile = self.packing.tile
        return resize(square, (tile, tile), self.resample, rounded=self.rounded)
