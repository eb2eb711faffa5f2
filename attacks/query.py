"""A black-box attack on text answers alone, for a small number of questions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from attacks.base import Attack, Proposal
from attacks.budget import Budget, from_levels, quantise, to_levels
from attacks.patterns import PATTERNS, window
from attacks.seeds import SeedBank
from targets.base import Batch, Knowledge, QueryView

_WIDE: Final = 3.0
"""Radius, in units of epsilon, at which a first pattern that changes the answer is sought."""
_CLOSE: Final = 1.05
"""A radius below this times epsilon is taken to be epsilon."""


@dataclass(frozen=True, kw_only=True)
class Query(Attack):
    """Ask the deployed target about structured patterns until one changes its answer.

    All the attacker sees is text, judged right or wrong; there is no score to follow. Random signs
    need thousands of questions. Structured patterns (stripes, blocks, Gabor and low-frequency
    noise, one kind after the other) need few: procedural noise attacks, Co et al., "Procedural
    Noise Adversarial Examples for Black-Box Attacks on Deep Convolutional Networks"
    (arXiv 1810.00470). Where none works at once, the search follows the only number a text gives
    away, the radius at which the answer turns wrong, as decision-based attacks do (Brendel et al.,
    arXiv 1712.04248; RayS, Chen & Gu, arXiv 2006.12792):

    1. the first `explore` questions are fresh patterns at the corner of the ball;
    2. then a pattern that changes the answer is sought at 3 × epsilon, outside the ball;
    3. it is asked again closer by, at the geometric mean of its radius and epsilon; then it is
       changed, a random window of it by another pattern, and asked at `shrink` × its radius. What
       still changes the answer replaces it, until its radius is epsilon.

    The search ends at the first wrong answer inside the ball: a finding is an answer that was
    given to the very image that is saved. Otherwise the result is the pattern that came closest,
    at epsilon, which is as likely as not harmless.

    Args:
        queries: most questions per sample, ≥ 1.
        explore: questions at epsilon before the radius is searched, ≥ 0.
        shrink: factor on the radius for each change, in (0, 1).
        pattern: one kind of pattern, or ``mixed`` for all in turn.
        norm: norm of the ball; in l2 a pattern is scaled to the length.

    *Differs from the paper in …*: patterns are signs, at the corner of the ball; Gabor noise has
    random phases everywhere instead of sparse kernels; parameters are drawn instead of found by
    Bayesian optimisation; the direction is changed by windows of other patterns, not by flipping
    blocks in order, and its radius is not bisected to the end, for want of questions.
    """

    name: ClassVar[str] = "query"
    knowledge: ClassVar[Knowledge] = Knowledge.QUERY

    queries: Annotated[int, Ge(1)] = 50
    explore: Annotated[int, Ge(0)] = 8
    shrink: Annotated[float, Interval(gt=0, lt=1)] = 0.85
    pattern: Literal["mixed", "stripes", "gabor", "blocks", "low_frequency"] = "mixed"
    norm: Literal["linf", "l2"] = "linf"

    def budget(self, epsilon: float) -> Budget:
        """Radius, norm and queries; there are no gradient steps."""
        return Budget(epsilon, self.norm, queries=self.queries)

    def propose(self, view: QueryView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Ask until every sample is answered wrongly inside the ball or its questions are spent."""
        search = _Search(self, batch.images, budget)
        broken = torch.zeros(len(batch.ids), dtype=torch.bool)
        for number in range(self.queries):
            rows = [row for row, done in enumerate(broken.tolist()) if not done]
            if not rows:
                break
            signs, radius = search.next(number, rng)
            images = search.image(signs, radius)
            some = batch.rows(rows)
            right = some.right(view.ask(images[rows], some.questions))
            wrong = torch.zeros_like(broken)
            wrong[rows] = ~torch.tensor(right)
            search.learn(signs, radius, wrong)
            broken |= wrong & (radius <= budget.epsilon).cpu()
        reached = torch.full_like(search.radius, budget.epsilon)
        return Proposal(search.image(search.signs, reached))


class _Search:
    """Per sample the pattern that changed the answer at the smallest radius so far."""

    def __init__(self, attack: Query, clean: Tensor, budget: Budget) -> None:
        kinds = PATTERNS.values() if attack.pattern == "mixed" else [PATTERNS[attack.pattern]]
        self._attack, self._clean, self._budget = attack, clean, budget
        self._kinds = tuple(kinds)
        self.signs = torch.ones_like(clean)
        self.radius = torch.full_like(clean[:, 0, 0, 0], torch.inf)  # inf: nothing worked yet
        self._closer = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)

    def next(self, number: int, rng: SeedBank) -> tuple[Tensor, Tensor]:
        """The signs and radius to ask about next, for every sample."""
        size = (self._clean.shape[-2], self._clean.shape[-1])
        fresh = self._kinds[number % len(self._kinds)](size, rng)
        inside = window(size, rng)
        epsilon = self._budget.epsilon
        if number == 0:
            self.signs = fresh  # the result for want of a better one
        if number < self._attack.explore:
            return fresh, torch.full_like(self.radius, epsilon)
        found = self.radius.isfinite()
        changed = torch.where(inside, fresh, self.signs)
        signs = _where(~found, fresh, _where(self._closer, self.signs, changed))
        wide = torch.full_like(self.radius, _WIDE * epsilon)
        nearer = torch.where(
            self._closer, (self.radius * epsilon).sqrt(), self.radius * self._attack.shrink
        )
        radius = torch.where(found, nearer, wide)
        return signs, torch.where(radius < _CLOSE * epsilon, epsilon, radius)

    def learn(self, signs: Tensor, radius: Tensor, wrong: Tensor) -> None:
        """Keep what changed the answer, and ask it closer by before it is changed again."""
        wrong = wrong.to(radius.device)
        self.signs = _where(wrong, signs, self.signs)
        self.radius = torch.where(wrong, radius, self.radius)
        self._closer = wrong

    def image(self, signs: Tensor, radius: Tensor) -> Tensor:
        """Patterns at a radius as they would be saved, ``[B, 3, H, W]``; in the ball if it is."""
        clean, budget = self._clean, self._budget
        delta = signs * radius.view(-1, 1, 1, 1)
        if budget.norm == "l2":
            delta = delta / math.sqrt(delta[0].numel())
        beyond = from_levels(to_levels((clean + delta).clamp(0, 1)))
        return _where(radius <= budget.epsilon, quantise(clean, clean + delta, budget), beyond)


def _where(rows: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(rows.view(-1, 1, 1, 1), yes, no)
