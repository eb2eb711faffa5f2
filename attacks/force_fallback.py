"""Forced fall-back: make a ranking look unstable, so that a defence against that gives up speed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast, get_args

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from attacks.base import Attack, Proposal
from attacks.budget import Budget
from attacks.cira import translations
from attacks.descent import Descent, descend
from attacks.errors import AttackError
from attacks.seeds import SeedBank
from targets.base import Batch, CompressedView, Knowledge
from targets.compression.scoring import precise, standardised

if TYPE_CHECKING:
    from targets.compression.base import Compressor

Signal = Literal["jaccard", "gap", "kendall"]
SOFTNESS = 0.25
"""Width of a relaxed step, in standard deviations of the log-score."""
BLIND = (
    "the compressor's ranking does not follow the picture, so no picture can make it unstable, and "
    "no defence checks whether it is"
)
"""Why there is nothing to do against some compressors."""


@dataclass(frozen=True, kw_only=True)
class ForceFallback(Attack):
    """Make shifted views of the picture disagree on the ranking, whatever the answer becomes.

    An attack on availability, against the defence that answers with all tokens where a ranking is
    not stable (`defenses.rank_margin`): each picture that falls back costs an uncompressed answer
    on top of the check. No publication describes it; **it is ours**. Over the four public views
    v of translation consensus, with z the standardised log-scores, moved back, b the middle of the
    K-th and the next best of a view, and T a softness, minimise one of::

        jaccard   mean_{v < w} Σ a_v a_w / Σ (a_v + a_w − a_v a_w),  a_v = sigmoid((z_v − b_v) / T)
        kendall   mean_v mean_{i ≠ j} tanh((z_i − z_j) / T) · tanh((z_{v,i} − z_{v,j}) / T)
        gap       −mean_i exp(−((z_i − b) / T)²)                       on the picture alone

    Args:
        signal: what the defence looks at, which the attacker has to know or guess.
        shift: pixels of the shifts, ≥ 1; None is half a token.
        steps: gradient steps T, ≥ 0.
        alpha: step size in [0, 1] pixel units; None is epsilon / 6. It falls to zero as a cosine.
        restarts: random starts, best loss kept per sample, ≥ 1.
        momentum: decay of accumulated gradients, ≥ 0.

    Raises:
        AttackError: where the tokens are no full grid, or for a shift as large as the picture,
            unless the signal is ``gap``; see also `attacks.descent.descend`.

    *Differs from the paper in …*: there is none. What is minimised is a relaxation; whether a
    picture falls back is decided by the hard signal and a threshold that the attack does not know.
    Without such a defence it wins nothing. With ``adaptive: true`` it becomes
    `attacks.raise_alarm` against a detector, whose alarm is what costs there.
    """

    name: ClassVar[str] = "force_fallback"
    knowledge: ClassVar[Knowledge] = Knowledge.COMPRESSED
    sometimes_idle: ClassVar[bool] = True
    raises_alarm: ClassVar[bool] = True

    signal: Literal["jaccard", "gap", "kendall"] = "jaccard"
    shift: Annotated[int, Ge(1)] | None = None
    steps: Annotated[int, Ge(0)] = 50
    alpha: Annotated[float, Gt(0)] | None = None
    restarts: Annotated[int, Ge(1)] = 1
    momentum: Annotated[float, Ge(0)] = 0.7

    def idle(self, compressor: Compressor) -> str | None:
        """Why there is nothing to do where the ranking does not follow an attention."""
        return None if compressor.attends else BLIND

    def against(self, defense: str, options: Mapping[str, object]) -> ForceFallback | None:
        """Against the check itself: with its own signal and shift, on the compressor as it is."""
        signal, shift = options.get("signal"), options.get("shift")
        if defense != "rank_margin" or options.get("views") == "random":
            return None
        return replace(
            self,
            signal=cast(Signal, signal) if signal in get_args(Signal) else self.signal,
            shift=shift if type(shift) is int else None,
        )

    @property
    def gradients_per_step(self) -> int:
        """One for each view that is ranked."""
        return 1 if self.signal == "gap" else 4

    def budget(self, epsilon: float) -> Budget:
        """Linf radius, step size, steps and restarts."""
        return Budget(epsilon, "linf", self.alpha, self.steps, self.restarts)

    def propose(
        self, view: CompressedView, batch: Batch, budget: Budget, rng: SeedBank
    ) -> Proposal:
        """Count what is kept of the clean images, then descend."""
        with torch.enable_grad():  # whether the ranking follows the picture shows in the graph
            clean = view.rank(batch.images.clone().requires_grad_(), batch.questions)
            places = view.encode(batch.images[:1]).score.shape[1]
        # A compressor that shrinks the picture first ranks other tokens than the picture has.
        if not clean.log_score.requires_grad or clean.kept.shape[1] != places:
            return Proposal(batch.images, notes=(f"nothing was changed: {BLIND}",))
        count = clean.kept.sum(1)
        grid = None if self.signal == "gap" else self._grid(view, batch, clean.kept.shape[1])

        def loss(images: Tensor, step: int) -> Tensor:
            del step
            if grid is None:
                return -crowding(view.rank(images, batch.questions).log_score, count)
            shown = translations(images, grid.shift)
            scores = view.rank(shown, tuple(batch.questions) * 4).log_score.chunk(4)
            aligned = [
                grid.moved_back(score, *move) for score, move in zip(scores, _MOVES, strict=True)
            ]
            if self.signal == "kendall":
                return agreement(aligned)
            return soft_overlap(aligned, count)

        how = Descent(schedule="cosine", momentum=self.momentum)
        return descend(loss, batch, budget, rng, how=how)

    def _grid(self, view: CompressedView, batch: Batch, tokens: int) -> Grid:
        size = (batch.images.shape[-2], batch.images.shape[-1])
        grid = Grid.of(view, tokens, size, batch.images.device)
        if self.shift is not None:
            grid = replace(grid, shift=self.shift)
        if grid.shift >= min(size):
            raise AttackError(
                f"attack {self.name}: shift is {grid.shift} pixels in pictures of {size[0]} × "
                f"{size[1]}; it must be below {min(size)}"
            )
        return grid


_MOVES = ((0, 0), (0, 1), (1, 0), (1, 1))
"""Down and right of the views that `attacks.cira.translations` makes, in shifts."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the tokens of a picture lie.

    Attributes:
        shape: rows and columns.
        pitch: pixels from one token to the next, down and to the right.
        shift: pixels of the shifts.
    """

    shape: tuple[int, int]
    pitch: tuple[float, float]
    shift: int

    @classmethod
    def of(
        cls, view: CompressedView, tokens: int, size: tuple[int, int], device: torch.device
    ) -> Grid:
        """The grid of pictures of a size, by the pixels of the first and the last token.

        Raises:
            AttackError: if these do not span as many tokens as there are.
        """
        ends = torch.zeros(2, tokens, dtype=torch.bool, device=device)
        ends[0, 0] = ends[1, -1] = True
        first, last = (_box(mask) for mask in view.token_mask_to_pixels(ends, size)[:, 0] > 0)
        high, wide = first[2] - first[0], first[3] - first[1]
        rows = round((last[0] - first[0]) / max(high, 1)) + 1
        columns = round((last[1] - first[1]) / max(wide, 1)) + 1
        if rows * columns != tokens:
            raise AttackError(
                f"attack force_fallback aligns the rankings of shifted pictures on one grid, and "
                f"{tokens} tokens do not fill one of {rows} × {columns}; use a model that sees a "
                "picture as one tile, or signal: gap"
            )
        return cls((rows, columns), (high, wide), max(1, round(math.sqrt(high * wide) / 2)))

    def moved_back(self, values: Tensor, down: int, right: int) -> Tensor:
        """Values ``[B, V]`` of a picture shifted by so many shifts, where the picture has them."""
        found = values.reshape(len(values), *self.shape)
        for dim, moved, pitch in ((1, down, self.pitch[0]), (2, right, self.pitch[1])):
            if moved:
                found = _read(found, moved * self.shift / pitch, dim)
        return found.flatten(1)


def soft_overlap(scores: Sequence[Tensor], count: Tensor) -> Tensor:
    """Relaxed mean Jaccard index of the `count` best tokens over all pairs of scores, ``[B]``.

    Args:
        scores: two or more ``[B, V]``, live; they are standardised.
        count: long ``[B]``, 1 ≤ count ≤ V.
    """
    among = []
    for score in scores:
        z = standardised(precise(score))
        among.append(torch.sigmoid((z - _bar(z, count)) / SOFTNESS))
    pairs = []
    for one, two in itertools.combinations(among, 2):
        both = (one * two).sum(1)
        pairs.append(both / (one.sum(1) + two.sum(1) - both))
    return torch.stack(pairs).mean(0)


def agreement(scores: Sequence[Tensor]) -> Tensor:
    """Relaxed mean rank correlation of the first scores with each of the others, ``[B]``.

    Args:
        scores: two or more ``[B, V]``, live; they are standardised. V ≥ 2.
    """
    z = [standardised(precise(score)) for score in scores]
    tokens = z[0].shape[1]

    def order(values: Tensor) -> Tensor:
        return torch.tanh((values[:, :, None] - values[:, None]) / SOFTNESS)

    mine = order(z[0])
    found = [(mine * order(other)).sum((1, 2)) for other in z[1:]]
    return torch.stack(found).mean(0) / (tokens * (tokens - 1))


def crowding(score: Tensor, count: Tensor) -> Tensor:
    """How near the tokens lie to the boundary, ``[B]`` in [0, 1]; the nearer, the smaller its gap.

    The gap itself has a gradient at two tokens, which are others after every step.

    Args:
        score: ``[B, V]``, live; it is standardised.
        count: long ``[B]``, K.
    """
    z = standardised(precise(score))
    return torch.exp(-(((z - _bar(z, count)) / SOFTNESS) ** 2)).mean(1)


def _edge(values: Tensor, count: Tensor) -> Tensor:
    """The K-th and the next best of each row, ``[B, 2]``; twice the last where all are kept."""
    falling = values.sort(dim=1, descending=True).values
    return falling.gather(1, torch.stack([count - 1, count], 1).clamp(0, values.shape[1] - 1))


def _bar(values: Tensor, count: Tensor) -> Tensor:
    return _edge(values.detach(), count).mean(1, keepdim=True)


def _read(values: Tensor, offset: float, dim: int) -> Tensor:
    """Rows (1) or columns (2) read `offset` places on, linearly; mirrored at the outermost."""
    size = values.shape[dim]
    last = max(size - 1, 1)
    wanted = torch.arange(size, dtype=torch.float64) + offset
    low = wanted.floor()
    share = (wanted - low).to(values)

    def at(place: Tensor) -> Tensor:
        index = last - (place.long().remainder(2 * last) - last).abs()
        return values.index_select(dim, index.clamp_max(size - 1).to(values.device))

    weight = share.view(-1, 1) if dim == 1 else share.view(1, -1)
    return at(low) * (1 - weight) + at(low + 1) * weight


def _box(mask: Tensor) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of what is True in ``[H, W]``; all 0 where nothing is."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    if not len(rows):
        return 0, 0, 0, 0
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
