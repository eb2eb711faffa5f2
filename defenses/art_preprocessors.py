"""Input transforms of the Adversarial Robustness Toolbox, by name: ``art.JpegCompression``.

Pictures go through ART's own classes (``art.defences.preprocessor``, version 1.20.1, MIT), so that
results are those of the library; gradients take the backward pass named by each (BPDA). Settings
under which a transform would do nothing to 8-bit pictures cannot be chosen.
"""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from defenses.base import AdaptiveRoute, DefenseError, InputDefense
from defenses.differentiable_jpeg import jpeg

_LEVELS = 255


class ArtPreprocessor(InputDefense):
    """Base of the transforms of ART. Subclasses say which class, and how to call it."""

    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.BPDA
    cuts_off: ClassVar[bool] = False
    """Whether ART casts levels to whole numbers, which drops what is behind the point."""

    def __post_init__(self) -> None:
        """Refuse at once where ART is not installed.

        Raises:
            DefenseError: saying how to install it.
        """
        if importlib.util.find_spec("art") is None:
            raise DefenseError(
                f"defence {self.name} is a class of the Adversarial Robustness Toolbox, which is "
                "not installed; pip install 'redteam[art]'"
            )

    @abstractmethod
    def preprocessor(self) -> Any:  # noqa: ANN401 - ART is untyped
        """The instance of ART, for levels in [0, 255], channels first."""

    def transform(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Through ART, on levels: in [0, 1] its JPEG would truncate 8-bit pictures by a level."""
        del generators
        levels = images.detach() * _LEVELS
        if self.cuts_off:
            levels = levels.round()
        found = self.preprocessor()(levels.cpu().numpy())[0]
        return (torch.from_numpy(found) / _LEVELS).to(images).clamp(0, 1)


def _class(name: str) -> Any:  # noqa: ANN401
    return getattr(import_module("art.defences.preprocessor"), name)


@dataclass(frozen=True, kw_only=True)
class JpegCompression(ArtPreprocessor):
    """Compress the picture as JPEG and show the model the result.

    Paper: Dziugaite et al., "A study of the effect of JPG compression on adversarial images" (arXiv
    1608.00853). Colour is subsampled, as PIL does by default.

    Args:
        quality: of the JPEG, 1 to 95 (above, PIL advises against it).

    *Differs from the paper in …*: pictures are rounded to 8 bits before, as a file is. Backward it
    is a JPEG in torch whose rounding has a slope (`defenses.differentiable_jpeg`), where ART itself
    offers the identity.
    """

    name: ClassVar[str] = "art.JpegCompression"
    cuts_off: ClassVar[bool] = True

    quality: Annotated[int, Interval(ge=1, le=95)] = 50

    def preprocessor(self) -> Any:  # noqa: ANN401
        """ART's JpegCompression."""
        return _class("JpegCompression")(
            clip_values=(0, _LEVELS), quality=self.quality, channels_first=True
        )

    def surrogate(self, images: Tensor) -> Tensor:
        """The same in torch, with softly rounded coefficients."""
        return jpeg(images, self.quality)


@dataclass(frozen=True, kw_only=True)
class FeatureSqueezing(ArtPreprocessor):
    """Fewer grey levels for each channel.

    Paper: Xu et al., "Feature Squeezing" (NDSS 2018, arXiv 1704.01155), bit-depth reduction:
    ``round(x · (2^b − 1)) / (2^b − 1)``.

    Args:
        bit_depth: b, 1 to 7. ART's default, 8, does nothing to an 8-bit picture.

    *Differs from the paper in …*: nothing. Backward it is the identity (straight-through).
    """

    name: ClassVar[str] = "art.FeatureSqueezing"

    bit_depth: Annotated[int, Interval(ge=1, le=7)] = 4

    def preprocessor(self) -> Any:  # noqa: ANN401
        """ART's FeatureSqueezing."""
        return _class("FeatureSqueezing")(clip_values=(0, _LEVELS), bit_depth=self.bit_depth)

    def surrogate(self, images: Tensor) -> Tensor:
        """The same in torch, straight-through."""
        return squeezed(images, self.bit_depth)


@dataclass(frozen=True, kw_only=True)
class SpatialSmoothing(ArtPreprocessor):
    """Replace every pixel by the median of its neighbourhood, channel by channel.

    Paper: Xu et al., "Feature Squeezing" (NDSS 2018, arXiv 1704.01155), median smoothing.

    Args:
        window_size: side of the neighbourhood in pixels. A window of 1 would do nothing.

    *Differs from the paper in …*: odd windows only. Backward it is the gradient of the median
    itself, that of the pixel which is taken.
    """

    name: ClassVar[str] = "art.SpatialSmoothing"

    window_size: Literal[3, 5, 7] = 3

    def preprocessor(self) -> Any:  # noqa: ANN401
        """ART's SpatialSmoothing."""
        return _class("SpatialSmoothing")(window_size=self.window_size, channels_first=True)

    def surrogate(self, images: Tensor) -> Tensor:
        """The same in torch."""
        return median(images, self.window_size)


class ArtRandom(ArtPreprocessor):
    """Base of the transforms that draw. ART draws from numpy's one global stream.

    Each picture gets a state of that stream which follows from its own seed; afterwards the stream
    goes on as if nothing had been drawn. Backward they are the identity, under the mean over draws.
    """

    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.EOT
    stochastic: ClassVar[bool] = True

    def transform(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Through ART one by one, on values in [0, 1] with channels last, as ART's own default."""
        rows = images.detach().permute(0, 2, 3, 1).cpu().numpy()
        pairs = zip(rows, generators, strict=True)
        found = np.concatenate([self._one(row[None], generator) for row, generator in pairs])
        hard = torch.from_numpy(found).permute(0, 3, 1, 2).to(images).clamp(0, 1)
        return images + (hard - images).detach()

    def _one(self, image: npt.NDArray[np.float32], generator: torch.Generator) -> Any:  # noqa: ANN401
        before = np.random.get_state()
        np.random.seed(int(torch.randint(2**32, (1,), generator=generator)))
        try:
            return self.preprocessor()(image)[0]
        finally:
            np.random.set_state(before)


@dataclass(frozen=True, kw_only=True)
class TotalVarMin(ArtRandom):
    """Keep some pixels, drawn at random, and fill in the rest by the smoothest picture.

    Paper: Guo et al., "Countering Adversarial Images using Input Transformations" (ICLR 2018, arXiv
    1711.00117), total variation minimisation: of each channel the z that minimises
    ``‖m ⊙ (z − x)‖₂ + lamb · TV_p(z)``, m drawn pixel by pixel. L-BFGS-B, one channel after the
    other on a CPU: seconds for a picture of 336 pixels, and as long in every step of an adaptive
    attack and for each of its draws.

    Args:
        prob: chance of a pixel to be kept, in (0, 1].
        norm: p, of the differences along a row or column: 1 or 2.
        lamb: weight of the variation, > 0; 0 would do nothing.
        max_iter: iterations of the solver, ≥ 1.

    *Differs from the paper in …*: ART's problem has the norm of the differences of whole rows and
    columns, and starts at the picture itself, so that few iterations leave much of it as it is;
    there, Bregman's split, and as many pixels kept as ``prob`` says. Backward it is the identity.
    """

    name: ClassVar[str] = "art.TotalVarMin"

    prob: Annotated[float, Interval(gt=0, le=1)] = 0.3
    norm: Literal[1, 2] = 2
    lamb: Annotated[float, Gt(0)] = 0.5
    max_iter: Annotated[int, Ge(1)] = 10

    def preprocessor(self) -> Any:  # noqa: ANN401
        """ART's TotalVarMin."""
        return _class("TotalVarMin")(
            prob=self.prob,
            norm=self.norm,
            lamb=self.lamb,
            max_iter=self.max_iter,
            clip_values=(0, 1),
        )


@dataclass(frozen=True, kw_only=True)
class GaussianAugmentation(ArtRandom):
    """Add Gaussian noise to the picture, once.

    Paper: Zantedeschi et al., "Efficient Defenses Against Adversarial Attacks" (AISec 2017, arXiv
    1707.06728), which trains with such noise; at inference it is one draw of `gaussian_vote`.

    Args:
        sigma: deviation of the noise in [0, 1] pixel units, > 0. ART's default, 1, leaves nothing
            to be seen.

    *Differs from the paper in …*: nothing is trained; the noise is on the picture that is asked
    about. Backward it is the identity, also where the noise ran into 0 or 1.
    """

    name: ClassVar[str] = "art.GaussianAugmentation"

    sigma: Annotated[float, Interval(gt=0, le=0.5)] = 0.05

    def preprocessor(self) -> Any:  # noqa: ANN401
        """ART's GaussianAugmentation, without augmentation."""
        return _class("GaussianAugmentation")(
            sigma=self.sigma,
            augmentation=False,
            apply_fit=False,
            apply_predict=True,
            clip_values=(0, 1),
        )


def squeezed(images: Tensor, bit_depth: int) -> Tensor:
    """Bit-depth reduction in torch: what `FeatureSqueezing` gives, straight-through backward.

    Args:
        images: ``[B, 3, H, W]`` in [0, 1].
        bit_depth: bits of a channel, 1 to 7.
    """
    most: int = 2**bit_depth - 1
    return images + ((images * most).round() / most - images).detach()


def median(images: Tensor, window: int) -> Tensor:
    """Median filter in torch, ``[B, 3, H, W]``; the picture is mirrored at its edges.

    Args:
        images: live.
        window: side of the neighbourhood in pixels, odd.
    """
    half = window // 2
    wide = images
    for dim in (2, 3):
        size = images.shape[dim]
        place = torch.arange(-half, size + half, device=images.device).remainder(2 * size)
        wide = wide.index_select(dim, torch.minimum(place, 2 * size - 1 - place))
    patches: Tensor = wide.unfold(2, window, 1).unfold(3, window, 1)
    middle: Tensor = patches.flatten(4).median(-1).values
    return middle
