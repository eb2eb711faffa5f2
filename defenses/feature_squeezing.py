"""Feature squeezing: does the answer change when detail that nobody needs is taken away?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor
from torch.nn.functional import avg_pool2d

from defenses.art_preprocessors import squeezed
from defenses.base import AdaptiveRoute, DefenseError
from defenses.detector import Cost, Detector, Observation, State, Traffic, first_logprobs

_LEVELS = 255


@dataclass(frozen=True, kw_only=True)
class FeatureSqueezing(Detector):
    """Largest change of the first answer token's distribution over several squeezers.

    Paper: Xu et al., "Feature Squeezing" (NDSS 2018, arXiv 1704.01155), joint detection::

        score = max over s of ‖ p(x) − p(s(x)) ‖_1            in [0, 2]

    The defaults are the paper's for ImageNet: 5 bits, a 2 × 2 median, non-local means 11-3-4.

    Args:
        bit_depth: bits of a channel, 1 to 7; None leaves this squeezer out.
        window: side of the median in pixels; None leaves it out.
        search: side of the search window of non-local means in pixels, odd; None leaves it out.
        patch: side of the patches it compares, in pixels, odd.
        strength: h of its weights ``exp(−d² / h²)``, in levels of 255, > 0.

    Raises:
        DefenseError: without any squeezer, for even sides of non-local means.

    *Differs from the paper in …*: p is the distribution of the first token of an answer through the
    compressor, over the vocabulary, for there are no classes. (FATA, appendix H, takes scores of
    the true answer with all tokens, which nobody has in use.) Non-local means compare all channels
    at once, and an even median takes the upper of the two in the middle, as SciPy's does. Backward
    bit depth is straight-through.
    """

    name: ClassVar[str] = "feature_squeezing"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.BPDA

    bit_depth: Annotated[int, Interval(ge=1, le=7)] | None = 5
    window: Literal[2, 3, 5] | None = 2
    search: Annotated[int, Ge(3)] | None = 11
    patch: Annotated[int, Ge(1)] = 3
    strength: Annotated[float, Gt(0)] = 4.0

    def __post_init__(self) -> None:
        """Check the ranges, then that something is left to do."""
        super().__post_init__()
        if self.bit_depth is None and self.window is None and self.search is None:
            raise DefenseError(
                f"defence {self.name}: bit_depth, window and search are all null; name a squeezer"
            )
        for what, side in (("search", self.search), ("patch", self.patch)):
            if side is not None and side % 2 == 0:
                raise DefenseError(f"defence {self.name}: {what} is {side}; allowed is an odd side")

    def squeezers(self, images: Tensor) -> Iterator[Tensor]:
        """The pictures squeezed in each way, live."""
        if self.bit_depth is not None:
            yield squeezed(images, self.bit_depth)
        if self.window is not None:
            yield median(images, self.window)
        if self.search is not None:
            yield non_local_means(images, self.search, self.patch, self.strength)

    def observe(self, traffic: Traffic) -> Observation:
        """The l1 distances, ``[B, squeezers]``."""
        own = first_logprobs(traffic).double().exp()
        distances = [
            (first_logprobs(traffic.showing(one)).double().exp() - own).abs().sum(1)
            for one in self.squeezers(traffic.images)
        ]
        return {"distance": torch.stack(distances, 1)}

    def judge(self, seen: Observation, state: State) -> Tensor:
        """The largest."""
        del state
        return seen["distance"].amax(1)

    @property
    def passes(self) -> int:
        """The picture and its squeezed forms."""
        return 1 + sum(one is not None for one in (self.bit_depth, self.window, self.search))

    def cost(self, full: float) -> Cost:
        """A compressed pass for each squeezer; the picture's own is that of its answer."""
        del full
        return Cost(language=float(self.passes - 1), tower=float(self.passes - 1))


def median(images: Tensor, window: int) -> Tensor:
    """Median of the window around each pixel, ``[B, 3, H, W]``; mirrored at the edges.

    An even window reaches one pixel further up and left; of an even number of values the upper of
    the two in the middle is taken.

    Args:
        images: live.
        window: side in pixels, ≥ 1.
    """
    wide = _mirrored(images, window // 2, (window - 1) // 2)
    patches = wide.unfold(2, window, 1).unfold(3, window, 1).flatten(4)
    return patches.sort(-1).values[..., window * window // 2]


def non_local_means(images: Tensor, search: int, patch: int, strength: float) -> Tensor:
    """Mean of the pixels around, weighted by how alike their patches are, ``[B, 3, H, W]``.

    ``Σ_o w_o x(i + o) / Σ_o w_o`` with ``w_o = exp(−d² / h²)`` and d² the mean squared difference
    of the patches around i and i + o over pixels and channels (Buades et al., CVPR 2005).

    Args:
        images: in [0, 1], live.
        search: side of the window of offsets o, odd.
        patch: side of the patches, odd.
        strength: h, in levels of 255.
    """
    reach, half = search // 2, patch // 2
    height, width = images.shape[-2:]
    padded = _mirrored(images, half, half)
    far = _mirrored(padded, reach, reach)
    total, weights = torch.zeros_like(images), images.new_zeros(len(images), 1, height, width)
    for down in range(search):
        for right in range(search):
            moved = far[..., down : down + padded.shape[2], right : right + padded.shape[3]]
            apart = (moved - padded).square().mean(1, keepdim=True) * _LEVELS**2
            weight = torch.exp(-avg_pool2d(apart, patch, stride=1) / strength**2)
            inside = moved[..., half : half + height, half : half + width]
            total, weights = total + weight * inside, weights + weight
    return total / weights


def _mirrored(images: Tensor, before: int, after: int) -> Tensor:
    """Pictures with so many pixels more, mirrored at the edge, which is repeated."""
    for dim in (2, 3):
        size = images.shape[dim]
        place = torch.arange(-before, size + after, device=images.device).remainder(2 * size)
        images = images.index_select(dim, torch.minimum(place, 2 * size - 1 - place))
    return images
