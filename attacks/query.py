"""A black-box attack on text answers alone, for a small number of questions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge
from torch import Tensor

from attacks.base import Attack, Proposal
from attacks.budget import Budget, quantise
from attacks.patterns import PATTERNS
from attacks.seeds import SeedBank
from targets.base import Batch, Knowledge, QueryView


@dataclass(frozen=True, kw_only=True)
class Query(Attack):
    """Ask the deployed target about structured patterns until one changes its answer.

    All the attacker sees is text, judged right or wrong; there is no score to follow. Decision-
    based attacks that walk along the boundary (Brendel et al., arXiv 1712.04248) need thousands of
    questions, and so does white noise. Structured patterns need few: this is random search over
    procedural noise, after Co et al., "Procedural Noise Adversarial Examples for Black-Box Attacks
    on Deep Convolutional Networks" (arXiv 1810.00470). Gabor noise, stripes, blocks and low-
    frequency noise take turns, each with parameters drawn anew, at the corner of the ball.

    The search ends at the first wrong answer: a finding is an answer that was given to the very
    image that is saved. Where there is none, the last pattern asked is the result, known not to
    work on this target.

    Args:
        queries: most questions per sample, ≥ 1.
        pattern: one kind of pattern, or ``mixed`` for all in turn.
        norm: norm of the ball; in l2 a pattern is scaled to the length.

    *Differs from the paper in …*: patterns are signs; Gabor noise has random phases everywhere
    instead of sparse kernels, and stripes and blocks stand beside it instead of Perlin noise;
    parameters are drawn, not found by Bayesian optimisation, which needs scores. A search for the
    smallest radius that changes the answer, from outside the ball inwards, found no more with
    50 to 100 questions and was left out.
    """

    name: ClassVar[str] = "query"
    knowledge: ClassVar[Knowledge] = Knowledge.QUERY

    queries: Annotated[int, Ge(1)] = 50
    pattern: Literal["mixed", "gabor", "stripes", "blocks", "low_frequency"] = "mixed"
    norm: Literal["linf", "l2"] = "linf"

    def budget(self, epsilon: float) -> Budget:
        """Radius, norm and queries; there are no gradient steps."""
        return Budget(epsilon, self.norm, queries=self.queries)

    def propose(self, view: QueryView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Ask until every sample was answered wrongly or its questions are spent."""
        images = batch.images.clone()
        rows = list(range(len(batch.ids)))
        for number in range(budget.queries):
            tried = self._pattern(batch.images, budget, number, rng)
            images[rows] = tried[rows]
            some = batch.rows(rows)
            right = some.right(view.ask(images[rows], some.questions))
            rows = [row for row, still in zip(rows, right, strict=True) if still]
            if not rows:
                break
        return Proposal(images)

    def _pattern(self, clean: Tensor, budget: Budget, number: int, rng: SeedBank) -> Tensor:
        """What is asked as the n-th question about every sample, as it would be saved."""
        kinds = list(PATTERNS.values()) if self.pattern == "mixed" else [PATTERNS[self.pattern]]
        signs = kinds[number % len(kinds)]((clean.shape[-2], clean.shape[-1]), rng)
        length = 1.0 if budget.norm == "linf" else math.sqrt(clean[0].numel())
        return quantise(clean, clean + signs * (budget.epsilon / length), budget)
