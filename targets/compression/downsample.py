"""Downsampling: a smaller picture, which gives fewer tokens to begin with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from targets.compression.base import Compressor, Cut, Scores, Seen, Stage
from targets.errors import CompressionError
from targets.families.base import Family
from targets.preprocessing.resampling import resize

_BICUBIC = 3
"""PIL's code."""


@dataclass(frozen=True, kw_only=True)
class Downsample(Compressor):
    """Shrink the picture before the image processor, for models that take pictures as they are.

    Baseline of VTC-Bench ("Are We Using the Right Benchmark: An Evaluation Framework for Visual
    Token Compression Methods", arXiv 2510.07143): with N tokens of which T shall be left, both
    sides are divided by ``D = √(N / T)``, with bicubic resampling as PIL does it.

    Args:
        retention: T ÷ N, in (0, 1]; how many tokens there really are follows from the model's own
            rounding of sizes, and from its smallest size.
        keep_tokens: not possible, since the number of tokens is the model's business.
        positions: no difference, since nothing is dropped from a sequence.

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: sides are rounded to whole pixels, levels to 8 bits, with a
    straight-through gradient. Models that bring
    pictures to set sizes or tiles of one size are refused, since they would lose detail, no token.
    """

    name: ClassVar[str] = "downsample"

    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    positions: Literal["keep", "reindex"] = "keep"

    def __post_init__(self) -> None:
        """Check the budget."""
        if self.keep_tokens is not None or self.retention is None:
            raise CompressionError(
                f"compressor downsample: give retention (left ÷ all, in (0, 1]), not keep_tokens "
                f"({self.keep_tokens!r}); how many tokens a picture has is decided by the model"
            )
        super().__post_init__()

    @property
    def stage(self) -> Stage:
        """The picture itself."""
        return Stage.PIXELS

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """None: nothing is dropped behind the processor."""
        del layers
        return ()

    def refuses(self, family: Family) -> str | None:
        """Where pictures are brought to set sizes, a smaller one has no fewer tokens."""
        if family.any_size:
            return None
        return (
            "pictures are brought to set sizes there, or cut into tiles of one size, so that a "
            "smaller one loses detail but hardly a token; use pool"
        )

    def shrink(self, images: Tensor) -> Tensor:
        """Pictures ``[B, 3, H, W]`` in [0, 1], both sides divided by D; differentiable."""
        size = self.size((images.shape[-2], images.shape[-1]))
        if size == (images.shape[-2], images.shape[-1]):
            return images
        return resize(images * 255, size, _BICUBIC, rounded=True) / 255

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the smaller picture, ≥ 1."""
        scale = (self.retention or 1.0) ** 0.5
        return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))

    def score(self, seen: Seen) -> Scores:
        """Nothing to rank: zeros ``[I, V]``."""
        zero = torch.zeros(seen.valid.shape, device=seen.valid.device)
        return Scores(zero, zero)
