"""CLIP- and LLaVA-style image processors as differentiable functions of images in [0, 1].

Images that already have the model's size are not resampled at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from targets.errors import TargetError
from targets.preprocessing.layout import Layout
from targets.preprocessing.resampling import resize


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a picture of one size reaches the model.

    Attributes:
        pad: pixels added left/right and top/bottom before resampling: (top, bottom, left, right).
        resized: height and width after resampling.
        crop: offset of the crop (top, left) in the resampled picture; negative means padding.
    """

    pad: tuple[int, int, int, int]
    resized: tuple[int, int]
    crop: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Preprocessor:
    """A CLIP- or LLaVA-style image processor on tensors.

    Attributes:
        size: what the model takes, height and width.
        shortest_edge: length the shorter edge is resampled to; None for exactly `resize_to`.
        resize_to: height and width resampled to, where there is no shortest edge; None for no
            resampling.
        crops: whether the centre is cut out.
        pads_square: whether pictures are padded to squares first.
        resample: PIL's code.
        scale: factor on levels 0 … 255.
        mean: of each channel, after scaling.
        std: of each channel.
        rounded: round resampled pictures to 8 bits, as the real processor does.
        tokens: rows and columns of the visual tokens the model makes of its input.
    """

    size: tuple[int, int]
    shortest_edge: int | None
    resize_to: tuple[int, int] | None
    crops: bool
    pads_square: bool
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rounded: bool = True
    tokens: tuple[int, int] = (1, 1)

    @classmethod
    def of(
        cls,
        processor: Any,  # noqa: ANN401 - untyped
        *,
        tokens: tuple[int, int] = (1, 1),
        rounded: bool = True,
    ) -> Preprocessor:
        """Read the settings of a real image processor.

        Args:
            processor: a CLIP or LLaVA image processor of transformers.
            tokens: see the attribute.
            rounded: see the attribute.

        Raises:
            TargetError: for settings this preprocessor has no meaning for.
        """
        edges = _sizes(processor.size) if processor.do_resize else {}
        crop = _sizes(processor.crop_size) if processor.do_center_crop else {}
        shortest = edges.get("shortest_edge")
        exact = (edges["height"], edges["width"]) if "height" in edges else None
        size = (crop["height"], crop["width"]) if "height" in crop else exact
        if size is None or (shortest is not None and not crop):
            raise TargetError(
                f"image processor {type(processor).__name__}: size {processor.size} with "
                f"do_center_crop {processor.do_center_crop} gives pictures of varying size; "
                "supported are a centre crop, or a fixed height and width"
            )
        channels = 3
        normalise = bool(processor.do_normalize)
        return cls(
            size=size,
            shortest_edge=shortest,
            resize_to=exact,
            crops=bool(crop),
            pads_square=bool(getattr(processor, "do_pad", False)),
            resample=int(processor.resample),
            scale=float(processor.rescale_factor) if processor.do_rescale else 1.0,
            mean=tuple(processor.image_mean) if normalise else (0.0,) * channels,
            std=tuple(processor.image_std) if normalise else (1.0,) * channels,
            rounded=rounded,
            tokens=tokens,
        )

    def geometry(self, size: tuple[int, int]) -> Geometry:
        """How pictures of this height and width are padded, resampled and cropped."""
        height, width = size
        pad = (0, 0, 0, 0)
        if self.pads_square and height != width:
            side = max(height, width)
            top, left = (side - height) // 2, (side - width) // 2
            pad = (top, side - height - top, left, side - width - left)
            height = width = side
        resized = (height, width)
        if self.resize_to is not None:
            resized = self.resize_to
        elif self.shortest_edge is not None:
            short, long = min(height, width), max(height, width)
            longer = int(self.shortest_edge * long / short)
            edge = self.shortest_edge
            resized = (longer, edge) if width <= height else (edge, longer)
        if not self.crops:
            return Geometry(pad, resized, (0, 0))
        top, left = (
            (have - want) // 2 if have >= want else -math.ceil((want - have) / 2)
            for have, want in zip(resized, self.size, strict=True)
        )
        return Geometry(pad, resized, (top, left))

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised input of the vision tower.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1], any height and width.

        Returns:
            ``[B, 3, *size]``, differentiable in `images`.

        Raises:
            TargetError: for another shape.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise TargetError(
                f"images are {list(images.shape)}; expected [B, 3, H, W], RGB in [0, 1]"
            )
        here = (images.shape[-2], images.shape[-1])
        if here != self.size or self.geometry(here) != Geometry((0, 0, 0, 0), here, (0, 0)):
            images = self._reshape(images * 255, self.geometry(here)) / 255
        mean = images.new_tensor(self.mean)[:, None, None]
        std = images.new_tensor(self.std)[:, None, None]
        factor = 255 * self.scale
        scaled = images if abs(factor - 1) < 1e-9 else images * factor
        return (scaled - mean) / std

    def _reshape(self, levels: Tensor, how: Geometry) -> Tensor:
        top, bottom, left, right = how.pad
        if any(how.pad):
            # The background is the mean colour in whole levels, as in the real processor.
            colour = levels.new_tensor([float(int(value * 255)) for value in self.mean])
            padded = torch.nn.functional.pad(levels, (left, right, top, bottom))
            outside = torch.nn.functional.pad(
                torch.zeros_like(levels[:1, :1]), (left, right, top, bottom), value=1.0
            )
            levels = padded + outside * colour[:, None, None]
        levels = resize(levels, how.resized, self.resample, rounded=self.rounded)
        if not self.crops:
            return levels
        (top, left), (height, width) = how.crop, self.size
        # Negative padding crops; positive padding is black, as in the real processor.
        bottom = height - how.resized[0] + top
        right = width - how.resized[1] + left
        return torch.nn.functional.pad(levels, (-left, right, -top, bottom))

    def inputs(self, images: Tensor) -> dict[str, Tensor]:
        """`pixel_values` of the model's ``forward``; see `Preprocessing`."""
        return {"pixel_values": self(images)}

    def layout(self, size: tuple[int, int]) -> Layout:
        """Tokens of a picture of this size, row by row."""
        return Layout.grid(self.tokens, self._box(size))

    def _box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """What of a picture of `size` the model sees: top, left, bottom, right in its pixels."""
        how = self.geometry(size)
        edges = []
        for axis in (0, 1):
            before = how.pad[2 * axis]
            padded = size[axis] + before + how.pad[2 * axis + 1]
            pixels = padded / how.resized[axis]
            start = how.crop[axis] * pixels - before
            edges.append((start, start + self.size[axis] * pixels))
        (top, bottom), (left, right) = edges
        return top, left, bottom, right


def _sizes(size: Any) -> dict[str, int]:  # noqa: ANN401 - a dict or a SizeDict of transformers
    found = {}
    for name in ("shortest_edge", "height", "width"):
        value = size.get(name) if isinstance(size, dict) else getattr(size, name, None)
        if value is not None:
            found[name] = int(value)
    return found
