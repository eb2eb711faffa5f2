"""LLaVA-NeXT's image processor as a differentiable function of images in [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from targets.errors import TargetError
from targets.preprocessing.anyres import Packing, pairs
from targets.preprocessing.layout import Layout
from targets.preprocessing.resampling import resize


@dataclass(frozen=True, slots=True)
class LlavaNextPreprocessor:
    """A view of the whole picture and tiles of it, normalised.

    Attributes:
        packing: how pictures are cut, and their features packed.
        resample: PIL's code.
        scale: factor on levels 0 … 255.
        mean: of each channel, after scaling.
        std: of each channel.
        background: levels of each channel around pictures that are padded to squares.
        rounded: round resampled pictures to 8 bits, as the real processor does.
    """

    packing: Packing
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    background: tuple[float, ...]
    rounded: bool = True

    @classmethod
    def of(
        cls,
        processor: Any,  # noqa: ANN401 - transformers is untyped
        config: Any,  # noqa: ANN401
        *,
        rounded: bool = True,
    ) -> Self:
        """Read the settings of a real image processor and of the model it belongs to.

        Args:
            processor: a LLaVA-NeXT image processor of transformers.
            config: configuration of the model, which packs the features.
            rounded: see the attribute.

        Raises:
            TargetError: if the two disagree, or for settings this has no meaning for.
        """
        return cls(**_settings(processor, config), rounded=rounded)

    def inputs(self, images: Tensor) -> dict[str, Tensor]:
        """`pixel_values` ``[B, tiles, 3, t, t]`` and `image_sizes` ``[B, 2]``.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1]; any height and width.

        Raises:
            TargetError: for another shape.
        """
        size = check_images(images)
        views = self.tiles(images * 255)
        return {
            "pixel_values": self.normalise(views),
            "image_sizes": torch.tensor([size] * len(images), device=images.device),
        }

    def layout(self, size: tuple[int, int]) -> Layout:
        """Tokens of a picture of this height and width; newlines are placeholders only."""
        return self.packing.layout(size)

    def tiles(self, levels: Tensor) -> Tensor:
        """The whole picture squeezed into a tile, then its tiles row by row, in levels.

        Args:
            levels: ``[B, 3, H, W]`` in levels 0 … 255.

        Returns:
            ``[B, tiles, 3, t, t]``.
        """
        side = self.packing.tile
        how = self.packing.tiling((levels.shape[-2], levels.shape[-1]))
        base = resize(levels, (side, side), self.resample, rounded=self.rounded)
        large = resize(levels, how.resized, self.resample, rounded=self.rounded)
        (top, left), (rows, columns) = how.offset, how.shape
        bottom = rows * side - how.resized[0] - top
        right = columns * side - how.resized[1] - left
        # Black, before normalisation: the real processor pads 8-bit pictures with zeros.
        large = torch.nn.functional.pad(large, (left, right, top, bottom))
        cut = large.view(*large.shape[:2], rows, side, columns, side)
        parts = cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        return torch.cat([base[:, None], parts], 1)

    def normalise(self, levels: Tensor) -> Tensor:
        """Levels ``[…, 3, t, t]`` as the vision tower takes them."""
        mean = levels.new_tensor(self.mean)[:, None, None]
        std = levels.new_tensor(self.std)[:, None, None]
        return (levels * self.scale - mean) / std


def check_images(images: Tensor) -> tuple[int, int]:
    """Height and width of a batch of RGB images.

    Raises:
        TargetError: unless it is ``[B, 3, H, W]``.
    """
    if images.dim() != 4 or images.shape[1] != 3:
        raise TargetError(f"images are {list(images.shape)}; expected [B, 3, H, W], RGB in [0, 1]")
    return images.shape[-2], images.shape[-1]


def _settings(processor: Any, config: Any) -> dict[str, Any]:  # noqa: ANN401
    """Attributes of a preprocessor, from a real one and the model's configuration."""
    packing, name = Packing.of(config), type(processor).__name__
    pinpoints = pairs(processor.image_grid_pinpoints)
    if pinpoints != packing.pinpoints:
        raise TargetError(
            f"image processor {name}: image_grid_pinpoints {list(pinpoints)} are not the model's "
            f"{list(packing.pinpoints)}; load the processor that belongs to the model"
        )
    named = {"size": processor.size}
    if processor.do_center_crop:
        named["crop_size"] = processor.crop_size
    for option, value in named.items():
        edges = _edges(value)
        if set(edges) != {packing.tile}:
            raise TargetError(
                f"image processor {name}: {option} {edges} does not give tiles of "
                f"{packing.tile} × {packing.tile}, which the model's vision tower takes"
            )
    normalise = bool(processor.do_normalize)
    return {
        "packing": packing,
        "resample": int(processor.resample),
        "scale": float(processor.rescale_factor) if processor.do_rescale else 1.0,
        "mean": tuple(processor.image_mean) if normalise else (0.0,) * 3,
        "std": tuple(processor.image_std) if normalise else (1.0,) * 3,
        # The mean colour in whole levels, as in the real processor.
        "background": tuple(float(int(value * 255)) for value in processor.image_mean),
    }


def _edges(size: Any) -> list[int]:  # noqa: ANN401 - a dict or a SizeDict of transformers
    """All lengths a size names."""
    names = ("shortest_edge", "longest_edge", "height", "width", "max_height", "max_width")
    found = (size.get(n) if isinstance(size, dict) else getattr(size, n, None) for n in names)
    return [int(value) for value in found if value is not None]
