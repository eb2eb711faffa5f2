"""Random resizing and padding: the patch grid falls differently on every query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor
from torch.nn.functional import interpolate

from defenses.base import AdaptiveRoute, InputDefense


@dataclass(frozen=True, kw_only=True)
class ResizePad(InputDefense):
    """Shrink the picture by a random amount and put it at a random place on its mean colour.

    Paper: Xie et al., "Mitigating Adversarial Effects Through Randomization" (ICLR 2018, arXiv
    1711.01991): 299 pixels to U[299, 331), zero-padded at random to 331. Here the picture keeps
    its size: height and width are scaled by one share, drawn so that the height is a whole number
    of pixels, uniform from `smallest` of it to all of it; 300 of 336 by default. Shrinking moves
    the patch grid as well.

    Args:
        smallest: least share of the height that is kept, in (0, 1]; 1 is no defence.

    *Differs from the paper in …*: it shrinks instead of enlarging, because models take pictures of
    one size [inferred]; the border has the mean colour of the picture instead of black; resampling
    is bilinear with antialiasing.
    """

    name: ClassVar[str] = "resize_pad"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.EOT
    stochastic: ClassVar[bool] = True

    smallest: Annotated[float, Interval(gt=0, le=1)] = 0.893

    def transform(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Resize and pad each picture with its own draws."""
        pairs = zip(images, generators, strict=True)
        return torch.stack([self._one(image, generator) for image, generator in pairs])

    def _one(self, image: Tensor, generator: torch.Generator) -> Tensor:
        height, width = image.shape[-2:]
        high = _between(max(1, round(self.smallest * height)), height, generator)
        wide = max(1, round(high * width / height))
        top = _between(0, height - high, generator)
        left = _between(0, width - wide, generator)
        if (high, wide) == (height, width):
            return image
        small = interpolate(image[None], (high, wide), mode="bilinear", antialias=True)[0]
        canvas = image.mean((1, 2), keepdim=True).expand_as(image)
        inside = torch.zeros(1, height, width, dtype=torch.bool, device=image.device)
        inside[:, top : top + high, left : left + wide] = True
        sides = (left, width - wide - left, top, height - high - top)
        placed = torch.nn.functional.pad(small, sides)
        return torch.where(inside, placed, canvas).clamp(0, 1)  # rounding of the resampling


def _between(low: int, high: int, generator: torch.Generator) -> int:
    """A whole number, uniform in [low, high]."""
    return int(torch.randint(low, high + 1, (1,), generator=generator))
