"""Image processors of PaliGemma and Gemma 3 as differentiable functions of images in [0, 1].

Both resample the whole picture to one square without keeping its shape. Gemma 3 can also look at
crops of long pictures, which it calls pan and scan; the whole picture comes first, then the crops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from targets.errors import TargetError
from targets.preprocessing.clip import Preprocessor
from targets.preprocessing.layout import Layout

Region = tuple[int, int, int, int]
"""Top, left, bottom, right of a part of a picture, in its pixels."""


@dataclass(frozen=True, slots=True)
class PanAndScan:
    """Crops along the longer side of a picture that is far from square.

    Attributes:
        min_crop_size: shortest side a crop may have, in pixels, ≥ 1.
        max_crops: most crops of a picture, ≥ 1.
        min_elongation: longer ÷ shorter side from which pictures are cropped at all.
    """

    min_crop_size: int
    max_crops: int
    min_elongation: float

    def regions(self, size: tuple[int, int]) -> tuple[Region, ...]:
        """The crops of a picture of this height and width; none for one that is near square.

        Raises:
            TargetError: if a crop would be empty, which the real processor cannot do either.
        """
        height, width = size
        short, long = min(size), max(size)
        if long / short < self.min_elongation:
            return ()
        count = min(long // self.min_crop_size, math.floor(long / short + 0.5))
        count = min(self.max_crops, max(2, count))
        step = math.ceil(long / count)
        if min(step, short) < self.min_crop_size:
            return ()
        if step * (count - 1) >= long:
            raise TargetError(
                f"pan and scan would cut a picture of {height} × {width} into {count} crops of "
                f"{step} pixels, the last of which is empty; lower pan_and_scan_max_num_crops "
                f"({self.max_crops}) or raise pan_and_scan_min_crop_size ({self.min_crop_size})"
            )
        edges = [(step * index, min(long, step * (index + 1))) for index in range(count)]
        if width >= height:
            return tuple((0, start, height, end) for start, end in edges)
        return tuple((start, 0, end, width) for start, end in edges)


@dataclass(frozen=True, slots=True)
class GemmaPreprocessing:
    """Image processor of PaliGemma (SigLIP's) or Gemma 3 on tensors; see `Preprocessing`.

    Attributes:
        tile: what is done to the whole picture and to each crop.
        tokens: rows and columns of the visual tokens of one tile, as the language model gets them.
        scan: how crops are cut; None for no crops.
    """

    tile: Preprocessor
    tokens: tuple[int, int]
    scan: PanAndScan | None = None

    @classmethod
    def of(
        cls,
        processor: Any,  # noqa: ANN401 - transformers is untyped
        config: Any,  # noqa: ANN401
        *,
        rounded: bool = True,
    ) -> GemmaPreprocessing:
        """Read the settings of a real processor and the model it belongs to.

        Args:
            processor: of PaliGemma or Gemma 3, or only its image processor. The whole processor
                is better, since its own image options have precedence (pan and scan).
            config: configuration of the model.
            rounded: round resampled pictures to 8 bits, as the real processor does.

        Raises:
            TargetError: for settings this preprocessor has no meaning for, or a processor that
                does not belong to the model.
        """
        images = getattr(processor, "image_processor", processor)
        options = {} if images is processor else dict(getattr(processor, "images_kwargs", {}))
        for name, wanted in (("do_resize", True), ("do_center_crop", False), ("do_pad", False)):
            if bool(options.get(name, getattr(images, name, None))) is not wanted:
                raise TargetError(
                    f"image processor {type(images).__name__}: {name} is not supported as "
                    f"{not wanted}; {config.model_type} pictures are resampled whole to one size"
                )
        tile = Preprocessor.of(images, rounded=rounded)
        vision = config.vision_config
        if tile.size != (vision.image_size, vision.image_size):
            raise TargetError(
                f"the processor makes {tile.size} pictures, the vision tower takes "
                f"{vision.image_size} × {vision.image_size}; load the processor that belongs to "
                "the model"
            )
        patches = vision.image_size // vision.patch_size
        side = patches
        if config.model_type == "gemma3":
            side = int(config.mm_tokens_per_image**0.5)
            if patches % side:
                raise TargetError(
                    f"gemma3: {patches} × {patches} patches do not pool into {side} × {side} "
                    f"tokens (mm_tokens_per_image {config.mm_tokens_per_image})"
                )
        _same_count(processor, images, side * side)
        return cls(tile, (side, side), _scan(images, options))

    def __post_init__(self) -> None:
        """Check that one tile has one resampling and nothing cut off."""
        if self.tile.crops or self.tile.pads_square:
            raise TargetError("tiles are resampled whole: no centre crop and no padding")

    def inputs(self, images: Tensor) -> dict[str, Tensor]:
        """`pixel_values` of the model's ``forward``.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1], any height and width.

        Returns:
            ``[B · tiles, 3, S, S]``, all tiles of a picture before those of the next.
        """
        if images.dim() != 4:
            return {"pixel_values": self.tile(images)}  # which says what shape it takes
        tiles = [
            self.tile(images[..., top:bottom, left:right])
            for top, left, bottom, right in self.regions((images.shape[-2], images.shape[-1]))
        ]
        return {"pixel_values": torch.stack(tiles, 1).flatten(0, 1)}

    def regions(self, size: tuple[int, int]) -> tuple[Region, ...]:
        """What each tile of a picture of this height and width shows; the first is all of it."""
        crops = () if self.scan is None else self.scan.regions(size)
        return ((0, 0, *size), *crops)

    def layout(self, size: tuple[int, int]) -> Layout:
        """Tokens of a picture of this size, tile by tile, row by row."""
        grids = [
            Layout.grid(self.tokens, (float(top), float(left), float(bottom), float(right)))
            for top, left, bottom, right in self.regions(size)
        ]
        count = sum(grid.tokens for grid in grids)
        numbers = [torch.full_like(grid.tile, index) for index, grid in enumerate(grids)]
        return Layout(
            boxes=torch.cat([grid.boxes for grid in grids]),
            tile=torch.cat(numbers),
            row=torch.cat([grid.row for grid in grids]),
            column=torch.cat([grid.column for grid in grids]),
            shapes=(self.tokens,) * len(grids),
            base=0,
            columns=torch.arange(count),
            placeholders=count,
        )


def _same_count(processor: Any, images: Any, tokens: int) -> None:  # noqa: ANN401
    """Refuse a processor that writes another number of placeholders than the model makes."""
    for source in (processor, images):
        count = getattr(source, "image_seq_length", None)
        if count is not None and count != tokens:
            raise TargetError(
                f"{type(source).__name__} writes {count} placeholders a picture "
                f"(image_seq_length), the model makes {tokens} tokens; load the processor that "
                "belongs to the model"
            )


def _scan(images: Any, options: Mapping[str, Any]) -> PanAndScan | None:  # noqa: ANN401
    """Pan and scan as the processor would do it; None where it is off."""

    def option(name: str) -> Any:  # noqa: ANN401
        return options[name] if name in options else getattr(images, name, None)

    if not option("do_pan_and_scan"):
        return None
    names = ("min_crop_size", "max_num_crops", "min_ratio_to_activate")
    values = [option(f"pan_and_scan_{name}") for name in names]
    if any(value is None or value < least for value, least in zip(values, (1, 1, 0), strict=True)):
        given = dict(zip(names, values, strict=True))
        raise TargetError(
            f"image processor {type(images).__name__}: do_pan_and_scan needs pan_and_scan_… "
            f"options of at least 1 (sizes and counts), not {given}"
        )
    return PanAndScan(int(values[0]), int(values[1]), float(values[2]))
