"""The smallest budget at which an attack breaks each sample, by bisection."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge
from torch import Tensor

from attacks.base import Attack, OwnLoss, Proposal
from attacks.budget import LEVELS, Budget, to_levels
from attacks.goal import QUESTIONS, Goal, Judge
from attacks.members import gradients, make_member
from attacks.seeds import SeedBank
from attacks.suite import CLEAN, Job, Made, Suite, believing, padded
from targets.base import Batch, Knowledge, WhiteBoxView


@dataclass(frozen=True, kw_only=True)
class Minimal(Attack):
    """Find the smallest perturbation, in 8-bit levels, with which another attack breaks a sample.

    Bisection over epsilon, per sample, between no change and the budget of the cell: the attack is
    run at the middle, the target's own greedy answers to the 8-bit image say whether the sample
    broke, and a break tightens the upper end to the largest change that was really made (Carlini &
    Wagner, "Towards Evaluating the Robustness of Neural Networks", arXiv 1608.04644, search their
    trade-off constant likewise). The image at the smallest breaking budget is returned, so the
    linf distance of a broken sample is its minimal epsilon, an upper bound on the true one. A
    sample that holds at the whole budget keeps the image made there and is censored; one that was
    wrong before any attack is left as it is.

    Args:
        attack: name in `attacks.members.MEMBERS`, or ``suite``.
        steps: gradient steps of every run of it, ≥ 1.
        resolution: the search ends when the ends are this many levels apart, ≥ 1.
        goal: what counts as a break: ``compression_only``, the compressed path wrong while the
            path with all tokens is right; ``compressed``; ``full``.

    Raises:
        AttackError: an unknown attack; see also that attack.

    *Differs from the paper in …*: no paper. Bisection assumes that what breaks at one budget
    breaks at every larger one; where it does not, the budget found breaks all the same, but a
    smaller one may have been missed.
    """

    name: ClassVar[str] = "minimal"
    knowledge: ClassVar[Knowledge] = Knowledge.WHITE_BOX

    attack: str = "pgd"
    steps: Annotated[int, Ge(1)] = 20
    resolution: Annotated[int, Ge(1)] = 1
    goal: Literal["compression_only", "compressed", "full"] = "compression_only"

    def __post_init__(self) -> None:
        """Construct the attack once, so that a wrong name is found at once."""
        super().__post_init__()
        self._member()

    def budget(self, epsilon: float) -> Budget:
        """The ball; steps and queries are those of all runs, judgements included."""
        member = self._member()
        one = member.budget(epsilon)
        whole = Budget(epsilon)
        runs = 1 + max(0, math.ceil(math.log2(max(1.0, whole.levels / self.resolution))))
        return Budget(
            epsilon,
            steps=runs * gradients(member, epsilon),
            queries=runs * (one.queries + QUESTIONS) + QUESTIONS,
        )

    def propose(self, view: WhiteBoxView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Bisect every sample; samples at the same budget are attacked together."""
        judge = Judge(view, self.goal)
        found = _Search.of(batch, budget.levels)
        seeds = rng.child("search").seeds
        due = {budget.levels: judge.open(batch).nonzero()[:, 0].tolist()}
        while any(due.values()):
            for levels, rows in sorted(due.items()):
                job = Job(self._member(), view, batch, levels / LEVELS, seeds)
                made = job.run(rows)
                found.learn(levels, made, judge.broken(made.batch), self.attack)
            due = found.due(self.resolution)
        return found.proposal(self.goal)

    def _member(self) -> Attack:
        if self.attack == Suite.name:
            return Suite(steps=self.steps, goal=self.goal)
        return make_member(self.name, self.attack, self.steps)


@dataclass(slots=True)
class _Search:
    """Where the search of each sample stands, in 8-bit levels."""

    clean: Tensor
    images: Tensor
    low: list[int]  # largest budget at which the sample held
    high: list[int | None]  # smallest change that broke it; None if none did
    made_by: list[str]
    loss: list[list[float]]
    checks: list[tuple[str, ...]]
    own: list[OwnLoss]
    notes: list[str]
    whole: int

    @classmethod
    def of(cls, batch: Batch, levels: int) -> _Search:
        count = len(batch.ids)
        return cls(
            clean=batch.images,
            images=batch.images.clone(),
            low=[0] * count,
            high=[None] * count,
            made_by=[CLEAN] * count,
            loss=[[] for _ in range(count)],
            checks=[()] * count,
            own=[OwnLoss()] * count,
            notes=[],
            whole=levels,
        )

    def learn(self, levels: int, made: Made, broken: Tensor, name: str) -> None:
        """Take in what a run at a budget did; its image is kept if it breaks, or is the first."""
        change = to_levels(made.batch.images) - to_levels(self.clean[made.rows])
        sizes = change.flatten(1).abs().amax(1).int().tolist()
        self.notes += [note for note in made.result.notes if note not in self.notes]
        for place, row in enumerate(made.rows):
            if broken[place]:
                self.high[row] = sizes[place]
            else:
                self.low[row] = levels
            if broken[place] or levels == self.whole:
                self.images[row] = made.batch.images[place]
                self.made_by[row] = (made.result.made_by or (name,) * len(made.rows))[place]
                self.loss[row] = made.result.loss[place]
                self.checks[row] = made.result.checks[place]
                self.own[row] = replace(made.result.own[place], believed=bool(broken[place]))

    def due(self, resolution: int) -> dict[int, list[int]]:
        """Rows whose ends are further apart than the resolution, by the budget to try next."""
        found: dict[int, list[int]] = {}
        for row, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            if high is not None and high - low > resolution:
                found.setdefault((low + high) // 2, []).append(row)
        return found

    def proposal(self, goal: Goal) -> Proposal:
        """What `propose` returns."""
        return Proposal(
            self.images,
            loss=padded(self.loss),
            notes=tuple(self.notes),
            made_by=tuple(self.made_by),
            checks=tuple(self.checks),
            own=tuple(believing(self.own, goal)),
        )
