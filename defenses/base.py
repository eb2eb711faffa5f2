"""What a defence must say about itself before its numbers are believed.

A defence measured only against attacks that do not know it is an over-estimate (Tramèr et al.,
arXiv 2002.08347; Croce et al., arXiv 2202.13711). So each names the route by which an adaptive
attack goes through it, and one without a route is reported as unverified, whatever it scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import StrEnum
from typing import ClassVar, final

import torch
from torch import Tensor

UNVERIFIED = "UNVERIFIED (upper bound)"
"""Printed beside every result of a defence that no adaptive attack can be run against."""


class DefenseError(Exception):
    """A defence was declared or used in a way that has no meaning."""


class DefenseKind(StrEnum):
    """Where a defence acts."""

    INPUT = "input"
    """On the image, before the model."""
    SELECTION = "selection"
    """On which visual tokens are kept."""
    DECODING = "decoding"
    """On the next-token distribution or the attention while answering."""
    ENCODER = "encoder"
    """Another, hardened vision tower."""
    DETECTOR = "detector"
    """Answers nothing differently; says that an input looks attacked."""
    FALLBACK = "fallback"
    """On how many visual tokens a request gets."""
    STACK = "stack"
    """Several of these together."""


class AdaptiveRoute(StrEnum):
    """How an attack that knows the defence gets its gradient."""

    DIFFERENTIABLE = "differentiable"
    """Straight through it."""
    BPDA = "bpda"
    """Forward through it, backward through `surrogate` (Athalye et al., arXiv 1802.00420)."""
    EOT = "eot"
    """Mean gradient over draws of its randomness (Athalye et al., arXiv 1707.07397)."""
    NONE = "none"
    """No route is known, so its results are unverified."""


class Defense(ABC):
    """Base of all defences. Subclasses are ``@dataclass(frozen=True, kw_only=True)``.

    Their fields are their options and their `repr` is their provenance.

    Attributes:
        name: the technique.
        kind: where it acts; set by the base of the kind.
        adaptive: how an adaptive attack goes through it.
        stochastic: whether two runs on one image may differ. Such a defence needs EOT, or has no
            route: a gradient through one draw is an attack on that draw only.

    Raises:
        DefenseError: when a subclass that has a name lacks one of the others, or contradicts
            itself; raised where the class is defined.
    """

    name: ClassVar[str]
    kind: ClassVar[DefenseKind]
    adaptive: ClassVar[AdaptiveRoute]
    stochastic: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "name"):
            return  # the base of a kind
        for attribute, allowed in (("kind", DefenseKind), ("adaptive", AdaptiveRoute)):
            value = getattr(cls, attribute, None)
            if not isinstance(value, allowed):
                raise DefenseError(
                    f"defence {cls.name}: {attribute} is {value!r}; name one of "
                    f"{', '.join(f'{allowed.__name__}.{member.name}' for member in allowed)}"
                )
        if cls.stochastic and cls.adaptive not in (AdaptiveRoute.EOT, AdaptiveRoute.NONE):
            raise DefenseError(
                f"defence {cls.name} is stochastic, so its adaptive route is EOT or NONE, not "
                f"{cls.adaptive.name}"
            )

    iterative: ClassVar[bool] = False
    """Whether it optimises while it answers, so that an attack has to unroll it or go around it."""

    @property
    def route(self) -> AdaptiveRoute:
        """The route through this configuration; differs from `adaptive` where an option decides."""
        return self.adaptive

    @property
    def draws(self) -> bool:
        """Whether this configuration is random; differs from `stochastic` likewise."""
        return self.stochastic

    def parts(self) -> tuple[Defense, ...]:
        """The acts it is made of, each of a kind that acts; itself unless it is made of several."""
        return (self,)

    @property
    def verifiable(self) -> bool:
        """Whether an adaptive attack can be run against it at all."""
        return self.route is not AdaptiveRoute.NONE

    @property
    def badge(self) -> str | None:
        """`UNVERIFIED` where there is no adaptive route; None where evidence has to decide."""
        return None if self.verifiable else UNVERIFIED


class InputDefense(Defense):
    """A defence that changes the image before the model sees it."""

    kind: ClassVar[DefenseKind] = DefenseKind.INPUT

    @property
    def votes(self) -> int:
        """Draws that are answered each, of which the majority counts; 1 for no vote."""
        return 1

    @abstractmethod
    def transform(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Defend images; this is all an author writes.

        Args:
            images: float32 ``[B, 3, H, W]`` in [0, 1].
            generators: one CPU generator per sample, the only allowed source of randomness.

        Returns:
            Float32 ``[B, 3, H, W]`` in [0, 1].
        """

    def surrogate(self, images: Tensor) -> Tensor:
        """What the backward pass of BPDA goes through, ``[B, 3, H, W]``; the identity here."""
        return images

    @final
    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Apply the defence as deployed, with the gradient its adaptive route promises.

        Args:
            images: float32 ``[B, 3, H, W]`` in [0, 1].
            seeds: one per sample; a sample's result depends on its own seed only. For EOT an
                attack calls again with other seeds and takes the mean.

        Raises:
            DefenseError: wrong number of seeds, or a result of another shape, or outside [0, 1],
                or not finite.
        """
        if len(seeds) != len(images):
            raise DefenseError(
                f"defence {self.name}: {len(images)} images but {len(seeds)} seeds; one each"
            )
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        defended = self.transform(images, generators)
        self._check(images, defended)
        if self.adaptive is not AdaptiveRoute.BPDA:
            return defended
        backward = self.surrogate(images)
        return backward + (defended - backward).detach()

    def _check(self, images: Tensor, defended: Tensor) -> None:
        if defended.shape != images.shape:
            raise DefenseError(
                f"defence {self.name}: transform made {list(defended.shape)} of "
                f"{list(images.shape)}; the shape must stay"
            )
        low, high = defended.detach().aminmax()
        if not bool((low >= 0) & (high <= 1)):  # NaN fails every comparison
            raise DefenseError(
                f"defence {self.name}: transform gave values in [{float(low):.4g}, "
                f"{float(high):.4g}]; allowed is [0, 1]"
            )
