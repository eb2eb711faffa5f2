"""A suite of attacks, cheap to dear, that leaves a sample alone once it is broken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from attacks.base import Attack, AttackResult, OwnLoss, Proposal
from attacks.budget import Budget
from attacks.errors import AttackError
from attacks.goal import QUESTIONS, Goal, Judge
from attacks.members import gradients, make_member, members_for
from attacks.seeds import SeedBank
from targets.base import Batch, Knowledge, WhiteBoxView
from targets.errors import KnowledgeError, TargetError

CLEAN = "clean"
"""What `made_by` says of a sample that was left as it is."""


@dataclass(frozen=True, kw_only=True)
class Suite(Attack):
    """Run one attack after another on the samples that none before has broken: the worst case.

    Counted as AutoAttack counts (Croce & Hein, "Reliable evaluation of adversarial robustness with
    an ensemble of diverse parameter-free attacks", arXiv 2003.01690): robust is a sample that
    withstands every member, the mean over samples of the minimum over members, not the minimum of
    means. A sample is judged by the target's own greedy answers to its 8-bit image. What was wrong
    before any attack is left as it is. Where no member breaks a sample, the image that came nearest
    is kept: see `attacks.goal.Judge.nearness`.

    Every member gets a view no wider than it declares. `Proposal.made_by` says which member made an
    image; the loss trace and the self-checks of a sample are those of that member. A member that
    cannot run on the compressor in use is left out, with a note.

    Args:
        members: names of `attacks.members.MEMBERS`, in the order in which they run; empty is all
            that suit the goal, from cheap to dear.
        steps: gradient steps of each member that takes any, ≥ 1.
        goal: ``compression_only``, the compressed path wrong while the path with all tokens is
            right; ``compressed``, the compressed path wrong; ``full``, the full path wrong.

    Raises:
        AttackError: an unknown member, or one named twice.

    *Differs from the paper in …*: the members are those of this package, and the goal may be a
    failure of the compressed path alone.
    """

    name: ClassVar[str] = "suite"
    knowledge: ClassVar[Knowledge] = Knowledge.WHITE_BOX

    members: tuple[str, ...] = ()
    steps: Annotated[int, Ge(1)] = 20
    goal: Literal["compression_only", "compressed", "full"] = "compression_only"

    def __post_init__(self) -> None:
        """Construct every member once, so that a wrong name is found at once."""
        super().__post_init__()
        if len(set(self.members)) < len(self.members):
            raise AttackError(f"attack suite: members {', '.join(self.members)} repeat themselves")
        self._attacks()

    def budget(self, epsilon: float) -> Budget:
        """The ball; steps and queries are the sums over the members, judgements included."""
        members = self._attacks()
        parts = [attack.budget(epsilon) for attack in members.values()]
        return Budget(
            epsilon,
            steps=sum(gradients(attack, epsilon) for attack in members.values()),
            queries=sum(part.queries for part in parts) + QUESTIONS * (len(parts) + 1),
        )

    def propose(self, view: WhiteBoxView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Run the members in order on what is left."""
        judge = Judge(view, self.goal)
        kept = _Kept.of(batch)
        left = judge.open(batch)
        for name, attack in self._attacks().items():
            rows = left.nonzero()[:, 0].tolist()
            if not rows:
                break
            job = Job(attack, view, batch, budget.epsilon, rng.child(name).seeds)
            made, problem = _what_works(job, rows)
            if problem:
                kept.notes.append(f"{name} {problem}")
            if made is not None:
                broken = judge.broken(made.batch)
                kept.take(name, made, broken, judge.nearness(made.batch))
                left[torch.tensor(made.rows)[broken]] = False
        return kept.proposal(self.goal)

    def _attacks(self) -> dict[str, Attack]:
        """Members by name, in order."""
        names = self.members or members_for(self.goal)
        return {name: make_member(self.name, name, self.steps) for name in names}


@dataclass(frozen=True, slots=True)
class Made:
    """What one attack made of some samples of a batch.

    Attributes:
        rows: of the batch, in order.
        batch: these samples with the attacked images.
        result: of the attack, aligned with `rows`.
    """

    rows: list[int]
    batch: Batch
    result: AttackResult


@dataclass(frozen=True, slots=True)
class Job:
    """One attack on a batch, in a view no wider than it declares.

    Attributes:
        attack: any whose knowledge a white box includes.
        view: of a white box.
        batch: clean samples.
        epsilon: budget in [0, 1] pixel units.
        seeds: one for each sample.
    """

    attack: Attack
    view: WhiteBoxView
    batch: Batch
    epsilon: float
    seeds: Sequence[int]

    def run(self, rows: Sequence[int]) -> Made:
        """Attack some of the samples."""
        some = self.batch.rows(rows)
        result = self.attack(self.view, some, self.epsilon, [self.seeds[row] for row in rows])
        return Made(list(rows), replace(some, images=result.images), result)


def _what_works(job: Job, rows: Sequence[int]) -> tuple[Made | None, str]:
    """The samples an attack can be run on, and what kept it from the others.

    Samples at fault for themselves are set aside and the others repeated: results never depend on
    which samples share a batch.
    """
    try:
        return job.run(rows), ""
    except KnowledgeError:
        raise
    except AttackError as error:
        fine = [row for row in rows if job.batch.ids[row] not in error.sample_ids]
        if fine and len(fine) < len(rows):
            made, later = _what_works(job, fine)
            return made, "; ".join(filter(None, (f"failed on some samples: {error}", later)))
        return None, f"was left out: {error}"
    except TargetError as error:
        return None, f"was left out: {error}"


@dataclass(slots=True)
class _Kept:
    """For each sample the best image so far and whose it is."""

    images: Tensor
    made_by: list[str]
    near: Tensor  # float64 [B]; +inf once broken
    loss: list[list[float]]
    checks: list[tuple[str, ...]]
    own: list[OwnLoss]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, batch: Batch) -> _Kept:
        count = len(batch.ids)
        return cls(
            images=batch.images.clone(),
            made_by=[CLEAN] * count,
            near=torch.full((count,), -math.inf, dtype=torch.float64),
            loss=[[] for _ in range(count)],
            checks=[()] * count,
            own=[OwnLoss()] * count,
        )

    def take(self, name: str, made: Made, broken: Tensor, near: Tensor) -> None:
        """Keep images that break their sample, or come nearer than any before."""
        near = near.masked_fill(broken, math.inf)
        self.notes += [note for note in made.result.notes if note not in self.notes]
        for place, row in enumerate(made.rows):
            if near[place] > self.near[row]:
                self.near[row] = near[place]
                self.images[row] = made.batch.images[place]
                self.made_by[row] = (made.result.made_by or (name,) * len(made.rows))[place]
                self.loss[row] = made.result.loss[place]
                self.checks[row] = made.result.checks[place]
                self.own[row] = replace(made.result.own[place], believed=bool(broken[place]))

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


def padded(traces: Sequence[Sequence[float]]) -> Tensor | None:
    """Loss traces of different lengths as ``[steps, B]`` with NaN behind the ends."""
    length = max(map(len, traces), default=0)
    if not length:
        return None
    rows = [[*trace, *[math.nan] * (length - len(trace))] for trace in traces]
    return torch.tensor(rows, dtype=torch.float64).t()


def believing(own: Sequence[OwnLoss], goal: Goal) -> list[OwnLoss]:
    """What was judged by asking; asking about all tokens tells nothing of the compressed answer."""
    return [one if goal != "full" else replace(one, believed=None) for one in own]
