"""Translation consensus: keep what the compressor finds important wherever the picture lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.functional import pad

from defenses.base import AdaptiveRoute
from defenses.selection import View, ViewConsensus, single_grid
from targets.errors import CompressionError
from targets.preprocessing import Layout

Moves = tuple[Sequence[int], Sequence[int]]
"""Pixels each picture of a batch is moved down, and to the right."""


@dataclass(frozen=True, kw_only=True)
class TranslationConsensus(ViewConsensus):
    """Rank the tokens in four shifted views of the picture and keep those they agree on.

    Paper: "Still There, No Longer Seen" (CIRA), section 6 and appendix F: translation-consensus
    selection. Views T(0, 0), T(d, 0), T(0, d), T(d, d), with d half a patch, reflect-padded and
    cropped; the scores of each are moved back by bilinear sampling with reflection padding
    (d / patch tokens); ``q_i = 1 − (r_i − 1) / (N − 1)`` in each view, mean over views, top K.
    Features, keys and merging are those of the unshifted picture. Costs three more passes of the
    vision tower, in one batch; where a compressor ranks in the language model, also of the layers
    up to there.

    Args:
        shift: d in pixels of the given picture, ≥ 0; None is half a token. 0 is no defence.
        views: ``public``, the four above; ``random``, the picture and shifts drawn anew for every
            query from the square of ± 2d pixels [inferred].
        number: views in all, ≥ 2, the picture itself being one; only for ``random``.
        average: over views, ``mean`` or ``median`` (of an even number, the lower).

    Raises:
        DefenseError: when it is to protect a compressor that does not choose by an attention, at
            one point, a number fixed in advance.
        CompressionError: for pictures of several tiles, and for a shift as large as the picture.

    *Differs from the paper in …*: the picture is shifted as it is given, not behind its
    preprocessing, which is the same where it has the tower's size; sampling mirrors at the centres
    of the outermost tokens, as the padding does at the outermost pixels; ``random`` and ``median``
    are ours, and so is the gradient: rank quantiles have none, so backward each stands for the mean
    sigmoid of its leads over the others.
    """

    name: ClassVar[str] = "translation_consensus"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.BPDA

    shift: Annotated[int, Ge(0)] | None = None
    views: Literal["public", "random"] = "public"
    number: Annotated[int, Ge(2)] = 4
    average: Literal["mean", "median"] = "mean"

    @property
    def route(self) -> AdaptiveRoute:
        """Random views need the mean over draws as well."""
        return AdaptiveRoute.EOT if self.draws else self.adaptive

    @property
    def draws(self) -> bool:
        """Only if the shifts are drawn."""
        return self.views == "random"

    @property
    def looks(self) -> int:
        """Three, or as many as are drawn."""
        return 0 if self.shift == 0 else self.number - 1 if self.draws else 3

    def look_again(
        self, images: Tensor, layout: Layout, generators: Sequence[torch.Generator]
    ) -> Sequence[View]:
        """The three shifted pictures, or those drawn; none where the shift is 0."""
        rows, columns, high, wide = single_grid(layout, self.name)
        shift = half_token(high, wide) if self.shift is None else self.shift
        if shift == 0:
            return ()
        most = 2 * shift if self.draws else shift
        if most >= min(images.shape[-2:]):
            raise CompressionError(
                f"defence {self.name}: a shift of {most} pixels does not fit pictures of "
                f"{images.shape[-2]} × {images.shape[-1]}; lower `shift`"
            )
        count = len(images)
        moves: list[Moves] = [((a,) * count, (b,) * count) for a, b in public_moves(shift)]
        if self.draws:
            moves = [_drawn_moves(most, generators) for _ in range(self.number - 1)]
        return [
            View(
                torch.stack([translated(*one) for one in zip(images, *move, strict=True)]),
                Aligned((rows, columns), (high, wide), move),
            )
            for move in moves
        ]

    def reduce(self, own: Tensor, others: Sequence[Tensor]) -> Tensor:
        """Mean or median over the picture and its views."""
        stacked = torch.stack([own, *others])
        return stacked.mean(0) if self.average == "mean" else stacked.median(0).values


@dataclass(frozen=True, slots=True)
class Aligned:
    """Moves values of the tokens of shifted pictures back to where the pictures have them.

    Attributes:
        grid: rows and columns of the tokens.
        pitch: pixels from one token to the next, down and to the right.
        move: pixels each picture of the batch was moved down, and to the right.
    """

    grid: tuple[int, int]
    pitch: tuple[float, float]
    move: Moves

    def __call__(self, values: Tensor) -> Tensor:
        """Values ``[B, V]`` aligned, ``[B, V]``."""
        found = values.reshape(len(values), *self.grid)
        for dim, (moved, pitch) in enumerate(zip(self.move, self.pitch, strict=True), 1):
            offset = torch.tensor(moved, dtype=torch.float64, device=values.device) / pitch
            found = sampled(found, offset, dim)
        return found.flatten(1)


def public_moves(shift: int) -> tuple[tuple[int, int], ...]:
    """Down and right of the published views, the unshifted one aside."""
    return (0, shift), (shift, 0), (shift, shift)


def half_token(high: float, wide: float) -> int:
    """Half the side of a square as large as a token of these pixels; at least 1."""
    return max(1, round(math.sqrt(high * wide) / 2))


def translated(image: Tensor, down: int, right: int) -> Tensor:
    """A picture ``[3, H, W]`` moved by whole pixels; what enters is their own reflection."""
    height, width = image.shape[-2:]
    sides = (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0))
    wide = pad(image, sides, mode="reflect")
    top, left = max(-down, 0), max(-right, 0)
    return wide[..., top : top + height, left : left + width]


def sampled(values: Tensor, offset: Tensor, dim: int) -> Tensor:
    """Values ``[B, rows, columns]`` read `offset` places further along `dim`, linearly.

    Places beyond the ends are mirrored at the first and the last, which are not repeated.

    Args:
        values: live.
        offset: float64 ``[B]``, in places.
        dim: 1 or 2.
    """
    size = values.shape[dim]
    wanted = torch.arange(size, device=values.device) + offset[:, None]  # [B, n]
    low = wanted.floor()
    share = (wanted - low).to(values.dtype)
    other = 3 - dim

    def read(place: Tensor) -> Tensor:
        index = _mirrored(place.long(), size).unsqueeze(other)
        return values.gather(dim, index.expand_as(values))

    weight = share.unsqueeze(other)
    return read(low) * (1 - weight) + read(low + 1) * weight


def _mirrored(place: Tensor, size: int) -> Tensor:
    if size == 1:
        return torch.zeros_like(place)
    last = size - 1
    mirrored: Tensor = last - (place.remainder(2 * last) - last).abs()
    return mirrored


def _drawn_moves(most: int, generators: Sequence[torch.Generator]) -> Moves:
    pairs = [torch.randint(-most, most + 1, (2,), generator=one).tolist() for one in generators]
    return tuple(down for down, _ in pairs), tuple(right for _, right in pairs)
