"""What image processors that cut pictures into tiles have in common: settings, colours, layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from targets.errors import TargetError
from targets.preprocessing.layout import Layout

CHANNELS = 3


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings a processor really uses.

    Args:
        processor: a processor of transformers, or only its image processor. Where a whole
            processor overrides settings of its image processor, the override counts.
    """

    processor: Any

    @property
    def image_processor(self) -> Any:  # noqa: ANN401 - transformers is untyped
        """The image processor itself."""
        return getattr(self.processor, "image_processor", self.processor)

    @property
    def name(self) -> str:
        """Its class, for messages."""
        return type(self.image_processor).__name__

    def __call__(self, setting: str) -> Any:  # noqa: ANN401
        """The value of a setting.

        Raises:
            TargetError: if the image processor has no such setting.
        """
        overrides = getattr(type(self.processor), "images_kwargs", None) or {}
        if setting in overrides:
            return overrides[setting]
        if not hasattr(self.image_processor, setting):
            raise TargetError(
                f"image processor {self.name} has no setting {setting}; load the one that belongs "
                "to the model's family"
            )
        return getattr(self.image_processor, setting)

    def lengths(self, setting: str) -> dict[str, int]:
        """A size as a dictionary of the lengths it gives."""
        size = self(setting)
        if hasattr(size, "items"):
            size = dict(size.items())
        names = ("height", "width", "shortest_edge", "longest_edge")
        found = {
            name: size.get(name) if isinstance(size, dict) else getattr(size, name, None)
            for name in names
        }
        return {name: int(value) for name, value in found.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Colours:
    """From levels 0 … 255 to what the vision tower takes.

    Attributes:
        scale: factor on levels.
        mean: of each channel, after scaling.
        std: of each channel.
    """

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, settings: Settings) -> Colours:
        """Read them from an image processor."""
        scale = float(settings("rescale_factor")) if settings("do_rescale") else 1.0
        if not settings("do_normalize"):
            return cls(scale, (0.0,) * CHANNELS, (1.0,) * CHANNELS)
        return cls(scale, tuple(settings("image_mean")), tuple(settings("image_std")))

    def __call__(self, levels: Tensor) -> Tensor:
        """Normalise ``[…, 3, H, W]``."""
        mean = levels.new_tensor(self.mean)[:, None, None]
        std = levels.new_tensor(self.std)[:, None, None]
        return (levels * self.scale - mean) / std


def size_of(images: Tensor) -> tuple[int, int]:
    """Height and width of a batch of pictures.

    Raises:
        TargetError: unless it is ``[B, 3, H, W]``.
    """
    if images.dim() != 4 or images.shape[1] != CHANNELS:
        raise TargetError(f"images are {list(images.shape)}; expected [B, 3, H, W], RGB in [0, 1]")
    return images.shape[-2], images.shape[-1]


def cut(levels: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Cut pictures into tiles, row by row: ``[B, C, r·h, c·w]`` → ``[B, r·c, C, h, w]``.

    Args:
        levels: the pictures, at the size of the canvas.
        canvas: rows r and columns c of tiles.
    """
    rows, columns = canvas
    batch, channels, height, width = levels.shape
    parts = levels.reshape(batch, channels, rows, height // rows, columns, width // columns)
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def token_grid(
    family: str,
    config: Any,  # noqa: ANN401 - transformers is untyped
    image_size: int,
    shrink: int,
) -> tuple[int, int]:
    """Rows and columns of the tokens of one tile, `shrink` × `shrink` patches each.

    Raises:
        TargetError: if they do not come out whole, or the tower takes another size than this.
    """
    vision = config.vision_config
    taken, patch = (square_edge(family, vision, name) for name in ("image_size", "patch_size"))
    if taken != image_size:
        raise TargetError(
            f"{family}: the processor makes tiles of {image_size} pixels, the vision tower takes "
            f"{taken}; load the processor that belongs to the model"
        )
    side, rest = divmod(taken, patch * shrink)
    if rest or side == 0:
        raise TargetError(
            f"{family}: tiles of {taken} pixels do not divide into tokens of {shrink} × {shrink} "
            f"patches of {patch} pixels; this preprocessor needs tiles without a remainder"
        )
    return side, side


def check_count(family: str, processor: Any, setting: str, tokens: int) -> None:  # noqa: ANN401
    """Refuse a processor that writes another number of placeholders than a tile has tokens.

    Raises:
        TargetError: with both numbers. Image processors alone write none and always pass.
    """
    written = getattr(processor, setting, None)
    if written is not None and int(written) != tokens:
        raise TargetError(
            f"{family}: the processor writes {written} placeholders a tile ({setting}), the model "
            f"makes {tokens} tokens; load the processor that belongs to the model"
        )


def layout_of_tiles(
    shape: tuple[int, int], canvas: tuple[int, int], size: tuple[int, int]
) -> Layout:
    """Tiles row by row, and where there are several, one of the whole picture behind them.

    Args:
        shape: rows and columns of the tokens of a tile.
        canvas: rows and columns of tiles.
        size: height and width of the picture, over which the canvas is stretched.
    """
    rows, columns = canvas
    high, wide = size[0] / rows, size[1] / columns
    boxes = [
        (row * high, column * wide, (row + 1) * high, (column + 1) * wide)
        for row in range(rows)
        for column in range(columns)
    ]
    if len(boxes) > 1:
        boxes.append((0.0, 0.0, float(size[0]), float(size[1])))
    parts = [Layout.grid(shape, box) for box in boxes]
    count = len(parts) * parts[0].tokens
    return replace(
        parts[0],
        boxes=torch.cat([part.boxes for part in parts]),
        tile=torch.arange(len(parts)).repeat_interleave(parts[0].tokens),
        row=parts[0].row.repeat(len(parts)),
        column=parts[0].column.repeat(len(parts)),
        shapes=(shape,) * len(parts),
        base=len(parts) - 1,
        columns=torch.arange(count),
        placeholders=count,
    )


def canvas_of(layout: Layout) -> tuple[int, int]:
    """Rows and columns of tiles of a layout that `layout_of_tiles` made."""
    if len(layout.shapes) == 1:
        return 1, 1
    boxes = layout.boxes[layout.tile != layout.base]
    tops, lefts = (set(boxes[:, axis].tolist()) for axis in (0, 1))
    rows, columns = layout.shapes[0]
    return len(tops) // rows, len(lefts) // columns


def square_edge(family: str, config: Any, name: str) -> int:  # noqa: ANN401 - transformers is untyped
    """A length of a vision tower's configuration that may be given as height and width.

    Raises:
        TargetError: if those differ.
    """
    value = getattr(config, name)
    edges = set(value) if isinstance(value, list | tuple) else {value}
    if len(edges) != 1:
        raise TargetError(
            f"{family}: {name} of the vision tower is {value}; the model's own pixel shuffle "
            "takes squares only"
        )
    return int(edges.pop())
