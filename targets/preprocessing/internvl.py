"""InternVL's image processor (`GotOcr2ImageProcessor`) as a differentiable function.

A picture is stretched over the canvas of tiles whose aspect is nearest to its own, cut into tiles,
and a thumbnail of the whole picture follows where there is more than one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, slots=True)
class InternVLPreprocessor:
    """InternVL's image processor on tensors.

    Attributes:
        size: height and width of a tile, pixels.
        tokens: rows and columns of the tokens of a tile.
        min_tiles: fewest tiles of a canvas, ≥ 1.
        max_tiles: most tiles of a canvas, ≥ 1; 1 is one tile, always.
        resample: PIL's code.
        colours: scaling and normalisation.
        rounded: round resampled pictures to 8 bits, as the real processor does.
    """

    size: tuple[int, int]
    tokens: tuple[int, int]
    min_tiles: int
    max_tiles: int
    resample: int
    colours: Colours
    rounded: bool = True

    @classmethod
    def of(cls, processor: Any, config: Any, *, rounded: bool = True) -> InternVLPreprocessor:  # noqa: ANN401
        """Read the settings of a real processor.

        Args:
            processor: an InternVL processor of transformers, whose own defaults count (it turns
                tiles on), or only its image processor.
            config: configuration of the model.
            rounded: see the attribute.

        Raises:
            TargetError: for settings this preprocessor has no meaning for.
        """
        settings = Settings(processor)
        tiled = bool(settings("crop_to_patches")) and int(settings("max_patches")) > 1
        lengths = settings.lengths("size")
        size = (lengths.get("height", 0), lengths.get("width", 0))
        if size[0] != size[1] or size[0] < 1 or not (tiled or settings("do_resize")):
            raise TargetError(
                f"image processor {settings.name}: size {lengths} with do_resize "
                f"{settings('do_resize')} and crop_to_patches {settings('crop_to_patches')} does "
                "not give square tiles of one size; set equal height and width, and do_resize"
            )
        grid = token_grid("internvl", config, size[0], shrink_of(config))
        check_count("internvl", processor, "image_seq_length", grid[0] * grid[1])
        return cls(
            size=size,
            tokens=grid,
            min_tiles=int(settings("min_patches")) if tiled else 1,
            max_tiles=int(settings("max_patches")) if tiled else 1,
            resample=int(settings("resample")),
            colours=Colours.of(settings),
            rounded=rounded,
        )

    def canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tiles a picture of this height and width is stretched over.

        The aspect decides. Of equal aspects the one with more tiles wins as long as the picture
        has more than half the pixels of its canvas.
        """
        height, width = size
        best, least = (1, 1), float("inf")
        for rows, columns in self._canvases():
            apart = abs(width / height - columns / rows)
            pixels = self.size[0] * self.size[1] * rows * columns
            if apart < least or (apart == least and height * width > 0.5 * pixels):
                best, least = (rows, columns), apart
        return best

    def _canvases(self) -> list[tuple[int, int]]:
        """All canvases, the small ones first; the order decides between equal aspects."""
        sides = range(1, self.max_tiles + 1)
        every = [(rows, columns) for columns in sides for rows in sides]
        allowed = [c for c in every if self.min_tiles <= c[0] * c[1] <= self.max_tiles]
        return sorted(allowed, key=lambda canvas: canvas[0] * canvas[1])

    def inputs(self, images: Tensor) -> dict[str, Tensor]:
        """`pixel_values` ``[B·T, 3, *size]``, the tiles of a picture one after the other.

        Raises:
            TargetError: for another shape.
        """
        rows, columns = self.canvas(size_of(images))
        levels = images * 255
        stretched = (rows * self.size[0], columns * self.size[1])
        tiles = cut(self._resize(levels, stretched), (rows, columns))
        if rows * columns > 1:
            thumbnail = self._resize(levels, self.size)
            tiles = torch.cat([tiles, thumbnail[:, None]], 1)
        return {"pixel_values": self.colours(tiles.flatten(0, 1))}

    def layout(self, size: tuple[int, int]) -> Layout:
        """Tokens tile by tile, each row by row; the thumbnail is the base."""
        return layout_of_tiles(self.tokens, self.canvas(size), size)

    def _resize(self, levels: Tensor, size: tuple[int, int]) -> Tensor:
        return resize(levels, size, self.resample, rounded=self.rounded)


def shrink_of(config: Any) -> int:  # noqa: ANN401 - transformers is untyped
    """Patches along a token's edge: the inverse of ``downsample_ratio``.

    Raises:
        TargetError: if that is not whole.
    """
    shrink: int = round(1 / config.downsample_ratio)
    if shrink < 1 or abs(shrink * config.downsample_ratio - 1) > 1e-6:
        raise TargetError(
            f"internvl: downsample_ratio is {config.downsample_ratio}; it has to be 1 over a whole "
            "number, so that a token is a block of patches"
        )
    return shrink
