"""Idefics3's and SmolVLM's image processor as a differentiable function.

A picture is resampled up to three times in a row, each time rounded to 8 bits: to its longest edge,
to whole tiles (which stretches it a little), and from there to the tile of the whole picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from targets.errors import TargetError
from targets.preprocessing.layout import Layout
from targets.preprocessing.resampling import resize
from targets.preprocessing.tiles import (
    Colours,
    Settings,
    check_count,
    cut,
    layout_of_tiles,
    size_of,
    token_grid,
)

_LONGEST: Final = 4096
"""No edge is made longer than this, whatever the settings say."""
_VISIBLE: Final = 1e-6
"""Added to tiles that are zero all over, which the model would take for padding and drop."""


@dataclass(frozen=True, slots=True)
class Idefics3Preprocessor:
    """The image processor of Idefics3 and SmolVLM on tensors.

    *Differs from the image processor in one case*: a tile whose values are all exactly 0 (a flat
    grey that no 8-bit picture has with the usual mean, but an attack may try) is moved by 1e-6. The
    model recognises padding by such tiles and would fail for want of features.

    Attributes:
        size: height and width of a tile, pixels.
        tokens: rows and columns of the tokens of a tile.
        resize_to: length the longest edge is resampled to first, or height and width; None for no
            such step.
        splits: whether pictures larger than a tile are cut into several.
        masks: whether a mask of real pixels is passed on; with pictures of one size it is all ones.
        resample: PIL's code.
        colours: scaling and normalisation.
        rounded: round resampled pictures to 8 bits, as the real processor does.
    """

    size: tuple[int, int]
    tokens: tuple[int, int]
    resize_to: int | tuple[int, int] | None
    splits: bool
    masks: bool
    resample: int
    colours: Colours
    rounded: bool = True

    @classmethod
    def of(cls, processor: Any, config: Any, *, rounded: bool = True) -> Idefics3Preprocessor:  # noqa: ANN401
        """Read the settings of a real processor.

        Args:
            processor: an Idefics3 or SmolVLM processor of transformers, or its image processor.
            config: configuration of the model.
            rounded: see the attribute.

        Raises:
            TargetError: for settings this preprocessor has no meaning for.
        """
        settings = Settings(processor)
        edge = settings.lengths("max_image_size").get("longest_edge", 0)
        if edge < 1:
            raise TargetError(
                f"image processor {settings.name}: max_image_size {settings('max_image_size')} "
                "has no longest_edge, which is the size of a tile"
            )
        grid = token_grid(config.model_type, config, edge, int(config.scale_factor))
        check_count(config.model_type, processor, "image_seq_len", grid[0] * grid[1])
        return cls(
            size=(edge, edge),
            tokens=grid,
            resize_to=_first_size(settings),
            splits=bool(settings("do_image_splitting")),
            masks=bool(settings("do_pad")),
            resample=int(settings("resample")),
            colours=Colours.of(settings),
            rounded=rounded,
        )

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of a picture of this size after the first resampling."""
        if self.resize_to is None:
            return size
        if not isinstance(self.resize_to, int):
            return self.resize_to
        height, width = _to_longest(size, self.resize_to)
        # The shorter edge is made even, which can make it the longer one.
        if size[1] >= size[0]:
            height = max(height + height % 2, 1)
        else:
            width = max(width + width % 2, 1)
        if max(height, width) > _LONGEST:
            height, width = _to_longest((height, width), _LONGEST)
        return max(height, 1), max(width, 1)

    def canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tiles a picture of this height and width is stretched over."""
        if not self.splits:
            return 1, 1
        here, edge = self.resized(size), self.size[0]
        longest = math.ceil(max(here) / edge) * edge
        rows, columns = (math.ceil(length / edge) for length in _to_longest(here, longest))
        return rows, columns

    def inputs(self, images: Tensor) -> dict[str, Tensor]:
        """`pixel_values` ``[B, T, 3, *size]`` and, if it is used, `pixel_attention_mask`.

        Raises:
            TargetError: for another shape, or a picture too narrow to have a tile.
        """
        size = size_of(images)
        rows, columns = self.canvas(size)
        if min(rows, columns) < 1:
            raise TargetError(
                f"a picture of {size[0]} × {size[1]} pixels is too narrow for tiles of "
                f"{self.size[0]}; the image processor makes none of it"
            )
        levels = self._resize(images * 255, self.resized(size))
        levels = self._resize(levels, (rows * self.size[0], columns * self.size[1]))
        tiles = cut(levels, (rows, columns))
        if rows * columns > 1:
            tiles = torch.cat([tiles, self._resize(levels, self.size)[:, None]], 1)
        pixels = self.colours(tiles)
        empty = (pixels == 0).flatten(2).all(2)
        pixels = pixels + _VISIBLE * empty[:, :, None, None, None]
        if not self.masks:
            return {"pixel_values": pixels}
        shape = (*pixels.shape[:2], *self.size)
        mask = torch.ones(shape, dtype=torch.long, device=pixels.device)
        return {"pixel_values": pixels, "pixel_attention_mask": mask}

    def layout(self, size: tuple[int, int]) -> Layout:
        """Tokens tile by tile, each row by row; the tile of the whole picture is the base.

        The text tokens between tiles are no placeholders and not counted.
        """
        return layout_of_tiles(self.tokens, self.canvas(size), size)

    def _resize(self, levels: Tensor, size: tuple[int, int]) -> Tensor:
        return resize(levels, size, self.resample, rounded=self.rounded)


def _to_longest(size: tuple[int, int], edge: int) -> tuple[int, int]:
    """A height and width of the same aspect whose longer edge is given; the other one is cut."""
    height, width = size
    aspect = width / height
    # Through width ÷ height in both cases, because the cut depends on how the quotient rounds.
    return (int(edge / aspect), edge) if width >= height else (edge, int(edge * aspect))


def _first_size(settings: Settings) -> int | tuple[int, int] | None:
    if not settings("do_resize"):
        return None
    lengths = settings.lengths("size")
    if "longest_edge" in lengths:
        return lengths["longest_edge"]
    if "height" in lengths and "width" in lengths:
        return lengths["height"], lengths["width"]
    raise TargetError(
        f"image processor {settings.name}: size {lengths} is not supported; it has to give "
        "longest_edge, or height and width"
    )
