"""The Square Attack: random search on the scores of the deployed target, without gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from attacks.answers import by_count, option_margin, right_options
from attacks.base import Attack, Proposal
from attacks.budget import Budget, quantise
from attacks.seeds import SeedBank
from targets.base import Batch, Knowledge, ScoreView

HALVINGS: Final = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Iterations after which p is halved, of 10,000; other budgets are scaled to that."""
_TILES = 5  # per side, of the start in l2


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Repaint random squares of the perturbation and keep what lowers the margin.

    Paper: Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack
    via random search" (arXiv 1912.00049), algorithms 1 to 3. Minimised is the margin, log-
    probability of the right option minus that of the best other, on the deployed, compressed
    target. In linf the search starts at vertical stripes of ±epsilon and sets a square to ±epsilon
    in each colour; in l2 it starts at 5 × 5 tiles and moves length from one square to another. The
    share p of the picture that a square covers is halved nine times on the way.

    An open question, without options, has the log-probability of its whole right answer, its end
    included, for a score. A sample is asked for its answer when its score says that it may be wrong
    (a margin below 0; for an open question a probability below ½), and stops when the answer is
    wrong; these questions count like the others.

    Args:
        queries: most questions per sample, scores and answers together, ≥ 1. AutoAttack uses 5000.
        p: share of the picture at first, in (0, 1]. 0.8 is AutoAttack's; the paper has 0.05 in linf
            and 0.1 in l2 on ImageNet.
        norm: norm of the ball.

    Raises:
        AttackError: a right answer that is not among its options.

    *Differs from the paper in …*: options stand in for classes, and a wrong answer in words, not a
    negative margin, ends the search; candidates are scored as the 8-bit image that will be saved;
    a square may touch the last row and column; a repainting that changes nothing is turned over.
    """

    name: ClassVar[str] = "square"
    knowledge: ClassVar[Knowledge] = Knowledge.SCORES

    queries: Annotated[int, Ge(1)] = 1000
    p: Annotated[float, Interval(gt=0, le=1)] = 0.8
    norm: Literal["linf", "l2"] = "linf"

    def budget(self, epsilon: float) -> Budget:
        """Radius, norm and queries; there are no gradient steps."""
        return Budget(epsilon, self.norm, queries=self.queries)

    def propose(self, view: ScoreView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Search until every sample is broken or has spent its queries."""
        clean, linf = batch.images, budget.norm == "linf"
        size = (clean.shape[-2], clean.shape[-1])
        target = _Target(view, batch, budget.queries)
        delta = stripes(clean, budget, rng) if linf else tiles(clean, budget, rng)
        images = quantise(clean, clean + delta, budget)
        best = target.scores(images, range(len(images)))
        target.confirm(images, range(len(images)), best)
        trace = [best.clone()]
        for step in range(1, budget.queries):
            rows = target.running()
            if not rows:
                break
            share = share_at(self.p, step - 1, budget.queries)
            if linf:
                moved = repaint(delta, window_side(share, size), rng)
            else:
                moved = shift(clean, delta, budget, odd_side(share, size), rng)
            tried = quantise(clean[rows], clean[rows] + moved[rows], budget)
            found = target.scores(tried, rows)
            better = found < best[rows]
            won = torch.tensor(rows, device=better.device)[better]
            images[won], delta[won], best[won] = tried[better], moved[won], found[better]
            target.confirm(images, won.tolist(), best)
            missing = torch.full_like(best, math.nan)
            missing[rows] = best[rows]
            trace.append(missing)
        return Proposal(images, loss=torch.stack(trace), kept=best)


class _Target:
    """The deployed target, asked about samples that still run and can still pay."""

    def __init__(self, view: ScoreView, batch: Batch, queries: int) -> None:
        self._view, self._batch = view, batch
        self._left = [queries] * len(batch.ids)
        self._broken = [False] * len(batch.ids)

    def running(self) -> list[int]:
        """Samples that are not broken and have a query left."""
        states = zip(self._left, self._broken, strict=True)
        return [row for row, (left, broken) in enumerate(states) if left > 0 and not broken]

    def scores(self, images: Tensor, rows: Sequence[int]) -> Tensor:
        """Margin of each row's image, or log-probability for an open question, ``[rows]``."""
        found = torch.zeros(len(rows), device=images.device)
        place = {row: number for number, row in enumerate(rows)}
        for count, group in by_count(self._batch, rows).items():
            some, where = self._batch.rows(group), [place[row] for row in group]
            options = some.options or ()
            if count < 2:
                options = tuple((answer,) for answer in some.answers)
            values = self._view.option_scores(images[where], some.questions, options).float()
            if count < 2:
                found[where] = values[:, 0].to(found)
            else:
                found[where] = option_margin(values, right_options(some).to(values.device)).to(
                    found
                )
        for row in rows:
            self._left[row] -= 1
        return found

    def confirm(self, images: Tensor, rows: Iterable[int], scores: Tensor) -> None:
        """Ask for the answers of the rows that may be wrong; `images`, `scores`: of the batch."""
        counts = {row: count for count, some in by_count(self._batch, rows).items() for row in some}
        bars = {row: 0.0 if count > 1 else math.log(0.5) for row, count in counts.items()}
        asked = [row for row, bar in bars.items() if self._left[row] > 0 and scores[row] < bar]
        if not asked:
            return
        some = self._batch.rows(asked)
        texts = self._view.ask(images[asked], some.questions)
        for row, right in zip(asked, some.right(texts), strict=True):
            self._left[row] -= 1
            self._broken[row] = not right


def share_at(first: float, step: int, steps: int) -> float:
    """Share p of the picture that a square covers at an iteration of `steps`, 0 the first."""
    scaled = step * 10_000 // steps
    return float(first / 2 ** sum(scaled > bound for bound in HALVINGS))


def window_side(share: float, size: tuple[int, int]) -> int:
    """Side of a square that covers a share of a picture of this height and width, in pixels."""
    return max(1, min(round(math.sqrt(share * size[0] * size[1])), *size))


def odd_side(share: float, size: tuple[int, int]) -> int:
    """The same for l2: at least 3 and odd, as far as the picture is that large."""
    side = max(window_side(share, size), 3)
    side += side % 2 == 0
    largest = min(size) - (min(size) % 2 == 0)
    return min(side, largest)


def stripes(clean: Tensor, budget: Budget, rng: SeedBank) -> Tensor:
    """Start in linf: columns of ±epsilon, a sign for each column and colour, ``[B, 3, H, W]``."""
    return (rng.signs((3, 1, clean.shape[-1])) * budget.epsilon).expand_as(clean).clone()


def repaint(delta: Tensor, side: int, rng: SeedBank) -> Tensor:
    """Set one square per sample to one sign per colour (algorithm 2).

    Args:
        delta: ``[B, 3, H, W]`` of ±epsilon.
        side: of the square.
        rng: place and signs.
    """
    size = (delta.shape[-2], delta.shape[-1])
    inside = _inside(_corner(size, side, rng), side, size)
    paint = rng.signs((3, 1, 1)) * delta.abs().amax()
    same = ((delta == paint) | ~inside).flatten(1).all(1).view(-1, 1, 1, 1)
    return torch.where(inside, torch.where(same, -paint, paint), delta)


def tiles(clean: Tensor, budget: Budget, rng: SeedBank) -> Tensor:
    """Start in l2: 5 × 5 tiles of two opposite bumps with random signs, of length epsilon."""
    height, width = clean.shape[-2:]
    side = max(min(height, width) // _TILES, 1)
    rows, columns = height // side, width // side
    signs = rng.signs((3, rows, columns)).repeat_interleave(side, 2).repeat_interleave(side, 3)
    pattern = opposite_bumps(side).to(clean).repeat(rows, columns)
    delta = torch.zeros_like(clean)
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    delta[:, :, top : top + rows * side, left : left + columns * side] = signs * pattern
    return _scaled(delta, budget.epsilon)


def shift(clean: Tensor, delta: Tensor, budget: Budget, side: int, rng: SeedBank) -> Tensor:
    """Clear one square per sample and put its length, and what is unused, in another (algorithm 3).

    Args:
        clean: ``[B, 3, H, W]``.
        delta: ``[B, 3, H, W]``, of length epsilon before clipping to [0, 1].
        budget: the ball.
        side: of the squares, odd.
        rng: places, direction and signs.
    """
    size = (clean.shape[-2], clean.shape[-1])
    current = (clean + delta).clamp(0, 1) - clean
    unused = (budget.epsilon**2 - current.square().flatten(1).sum(1)).clamp_min(0)
    first, second = _corner(size, side, rng), _corner(size, side, rng)
    both = _inside(first, side, size) | _inside(second, side, size)
    available = (current * both).square().sum((2, 3)) + unused[:, None] / 3  # [B, 3]
    bumps = opposite_bumps(side).to(clean).expand(len(clean), 1, side, side)
    turned = rng.uniform((1, 1, 1)) < 0.5
    bumps = torch.where(turned, bumps.transpose(2, 3), bumps) * rng.signs((3, 1, 1))
    place = _indices(first, side)
    old = current[place]
    new = bumps + old / old.square().sum((2, 3), keepdim=True).sqrt().clamp_min(1e-12)
    length = new.square().sum((2, 3), keepdim=True).sqrt().clamp_min(1e-12)
    moved = torch.where(_inside(second, side, size), torch.zeros_like(current), current)
    moved[place] = new / length * available.sqrt()[..., None, None]
    return _scaled(moved, budget.epsilon)


def opposite_bumps(side: int) -> Tensor:
    """Two bumps one above the other with opposite signs, of length 1: ``[side, side]``."""
    upper = side // 2
    if upper == 0:
        return torch.ones(side, side)
    found = torch.cat([bump(upper, side), -bump(side - upper, side)])
    return torch.div(found, found.norm())


def bump(height: int, width: int) -> Tensor:
    """Nested rectangles around the centre, the j-th of weight 1 / (j + 1)², of length 1."""
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    distance = torch.maximum(rows[:, None], columns[None])
    weights = 1 / (torch.arange(max(height, width) // 2 + 1) + 1.0) ** 2
    outwards = weights.flip(0).cumsum(0).flip(0)  # of all rectangles from the j-th on
    found = outwards[distance]
    return torch.div(found, found.norm())


def _corner(size: tuple[int, int], side: int, rng: SeedBank) -> Tensor:
    """Row and column of the first pixel of a square inside the picture, ``[B, 2]``."""
    room = torch.tensor([size[0] - side + 1, size[1] - side + 1], device=rng.device)
    return (rng.uniform((2,)) * room).long().minimum(room - 1)


def _inside(corner: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    """The pixels of a square: bool ``[B, 1, H, W]``."""
    rows = torch.arange(size[0], device=corner.device)[None] - corner[:, :1]
    columns = torch.arange(size[1], device=corner.device)[None] - corner[:, 1:]
    tall, wide = (rows >= 0) & (rows < side), (columns >= 0) & (columns < side)
    return (tall[:, :, None] & wide[:, None, :])[:, None]


def _indices(corner: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What to index ``[B, 3, H, W]`` with for a square of each sample, ``[B, 3, side, side]``."""
    span = torch.arange(side, device=corner.device)
    samples = torch.arange(len(corner), device=corner.device).view(-1, 1, 1, 1)
    colours = torch.arange(3, device=corner.device).view(1, -1, 1, 1)
    rows = (corner[:, :1] + span).view(-1, 1, side, 1)
    columns = (corner[:, 1:] + span).view(-1, 1, 1, side)
    return samples, colours, rows, columns


def _scaled(delta: Tensor, length: float) -> Tensor:
    """Each sample's perturbation with this l2 length."""
    now = delta.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    return torch.mul(delta, length / now)
