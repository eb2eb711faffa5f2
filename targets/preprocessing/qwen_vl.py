"""Qwen-VL's image processor as a differentiable function: smart resize, then flat patches.

A picture keeps its own size, rounded so that whole blocks of patches fit and the number of pixels
stays in bounds; patches leave block by block, so that every run of merge × merge of them becomes
one token of the language model. Qwen2-VL, Qwen2.5-VL and Qwen3-VL share it.
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

_LONGEST: Final = 200
"""Pictures more than this many times as long as wide are refused, as the real processor does."""
_CHANNELS: Final = 3


@dataclass(frozen=True, slots=True)
class QwenPreprocessor:
    """The image processor of Qwen2-VL, Qwen2.5-VL and Qwen3-VL on tensors.

    Equal to the processor that works with PIL; the one that works with torchvision resamples
    with other rounding.

    Attributes:
        resizes: whether pictures are resampled at all.
        min_pixels: fewest pixels after resampling.
        max_pixels: most pixels after resampling.
        resample: PIL's code.
        scale: factor on levels 0 … 255.
        mean: of each channel, after scaling.
        std: of each channel.
        patch: side of a patch, pixels.
        frames: times each picture is repeated, since the tower's patches are that deep in time.
        merge: side of the square of patches that makes one token.
        rounded: round resampled pictures to 8 bits, as the real processor does.
    """

    resizes: bool
    min_pixels: int
    max_pixels: int
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch: int
    frames: int
    merge: int
    rounded: bool = True

    @classmethod
    def of(
        cls,
        processor: Any,  # noqa: ANN401 - transformers is untyped
        vision_config: Any = None,  # noqa: ANN401
        *,
        rounded: bool = True,
    ) -> QwenPreprocessor:
        """Read the settings of a real image processor.

        Args:
            processor: a Qwen2-VL image processor of transformers.
            vision_config: configuration of the tower the patches are for; None for no check.
            rounded: see the attribute.

        Raises:
            TargetError: for settings this preprocessor has no meaning for, or patches of another
                shape than the tower takes.
        """
        low, high = _bounds(processor)
        normalise = bool(processor.do_normalize)
        made = cls(
            resizes=bool(processor.do_resize),
            min_pixels=low,
            max_pixels=high,
            resample=int(processor.resample),
            scale=float(processor.rescale_factor) if processor.do_rescale else 1.0,
            mean=tuple(processor.image_mean) if normalise else (0.0,) * _CHANNELS,
            std=tuple(processor.image_std) if normalise else (1.0,) * _CHANNELS,
            patch=int(processor.patch_size),
            frames=int(processor.temporal_patch_size),
            merge=int(processor.merge_size),
            rounded=rounded,
        )
        if vision_config is not None:
            made._check(vision_config)
        return made

    def _check(self, config: Any) -> None:  # noqa: ANN401
        pairs = {
            "patch_size": (self.patch, config.patch_size),
            "temporal_patch_size": (self.frames, config.temporal_patch_size),
            "merge_size": (self.merge, config.spatial_merge_size),
            "channels": (_CHANNELS, config.in_channels),
        }
        for name, (ours, theirs) in pairs.items():
            if ours != theirs:
                raise TargetError(
                    f"the image processor's {name} is {ours}, the vision tower's is {theirs}; "
                    "load the processor that belongs to the model"
                )

    @property
    def block(self) -> int:
        """Side of the square of pixels behind one token, after resampling."""
        return self.patch * self.merge

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width after resampling ("smart resize").

        Both become the nearest multiple of `block` (halves go to the even one); if that leaves the
        bounds on pixels, the picture is scaled to the bound first and then rounded inwards.

        Raises:
            TargetError: for a picture too long for its width, or one that is not resampled and
                does not consist of whole blocks.
        """
        height, width = size
        block = self.block
        if not self.resizes:
            if height % block or width % block:
                raise TargetError(
                    f"the image processor does not resize, and a {height} × {width} picture is "
                    f"not made of whole blocks of {block} × {block} pixels; crop or pad it"
                )
            return size
        if max(size) > _LONGEST * min(size):
            raise TargetError(
                f"a {height} × {width} picture is more than {_LONGEST} times as long as it is "
                "wide, which this family refuses; crop or pad it"
            )
        high, wide = (round(edge / block) * block for edge in size)
        # The roots are those of the real processor, so that their last bit falls the same way.
        if high * wide > self.max_pixels:
            shrink = math.sqrt((height * width) / self.max_pixels)
            high, wide = (max(block, math.floor(edge / shrink / block) * block) for edge in size)
        elif high * wide < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            high, wide = (math.ceil(edge * grow / block) * block for edge in size)
        return high, wide

    def patch_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches the tower gets of a picture of this size."""
        high, wide = self.resized(size)
        return high // self.patch, wide // self.patch

    def inputs(self, images: Tensor) -> dict[str, Tensor]:
        """`pixel_values` and `image_grid_thw` of the model's ``forward``.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1], any height and width, one for the batch.

        Returns:
            ``pixel_values [B·P, 3 · frames · patch²]``, picture after picture, differentiable in
            `images`, and ``image_grid_thw`` long ``[B, 3]``.

        Raises:
            TargetError: for another shape.
        """
        if images.dim() != 4 or images.shape[1] != _CHANNELS:
            raise TargetError(
                f"images are {list(images.shape)}; expected [B, 3, H, W], RGB in [0, 1]"
            )
        here = (images.shape[-2], images.shape[-1])
        wanted = self.resized(here)
        if wanted != here:
            levels = resize(images * 255, wanted, self.resample, rounded=self.rounded)
            images = levels / 255
        patches = self._patches(self._normalised(images))
        rows, columns = wanted[0] // self.patch, wanted[1] // self.patch
        grid = torch.tensor([[1, rows, columns]], device=images.device).repeat(len(images), 1)
        return {"pixel_values": patches, "image_grid_thw": grid}

    def layout(self, size: tuple[int, int]) -> Layout:
        """Tokens of a picture of this size, row by row; each covers merge × merge patches."""
        rows, columns = self.patch_grid(size)
        shape = (rows // self.merge, columns // self.merge)
        return Layout.grid(shape, (0.0, 0.0, float(size[0]), float(size[1])))

    def _normalised(self, images: Tensor) -> Tensor:
        mean = images.new_tensor(self.mean)[:, None, None]
        std = images.new_tensor(self.std)[:, None, None]
        factor = 255 * self.scale
        scaled = images if abs(factor - 1) < 1e-9 else images * factor
        return (scaled - mean) / std

    def _patches(self, images: Tensor) -> Tensor:
        """Cut ``[B, 3, H, W]`` into flat patches, block by block."""
        patch, merge = self.patch, self.merge
        count, _, height, width = images.shape
        rows, columns = height // self.block, width // self.block
        split = images.reshape(count, _CHANNELS, rows, merge, patch, columns, merge, patch)
        # B, block row, block column, row in it, column in it, C, pixel row, pixel column
        ordered = split.permute(0, 2, 5, 3, 6, 1, 4, 7)
        # A still picture is a film of equal frames.
        film = ordered.unsqueeze(6).expand(*[-1] * 6, self.frames, *[-1] * 2)
        return film.reshape(-1, _CHANNELS * self.frames * patch * patch)


def _bounds(processor: Any) -> tuple[int, int]:  # noqa: ANN401
    """Fewest and most pixels, which the real processor calls its shortest and longest edge."""
    size = processor.size
    found = []
    for name in ("shortest_edge", "longest_edge"):
        value = size.get(name) if isinstance(size, dict) else getattr(size, name, None)
        found.append(value)
    low, high = found
    if processor.do_resize and not (low and high):
        raise TargetError(
            f"image processor {type(processor).__name__}: size is {size}; expected a "
            "shortest_edge and a longest_edge (the fewest and the most pixels of a picture)"
        )
    return int(low or 0), int(high or 0)
