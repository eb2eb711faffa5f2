"""Evade and succeed: an attack that must also pass a detector, made of one that need not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from attacks.base import Attack, Proposal
from attacks.budget import Budget, quantise
from attacks.errors import AttackError
from attacks.seeds import SeedBank
from targets.base import Batch, Knowledge, WhiteBoxView

Suspicion = Callable[[Tensor, tuple[str, ...], int], Tensor]
"""Scores ``[B]`` of images and their questions under one draw of a detector, live."""


@dataclass(frozen=True, kw_only=True)
class Evade(Attack):
    """Descend on ``L_task + c · max(0, score − threshold + margin)``, c searched for each sample.

    Carlini and Wagner, "Adversarial Examples Are Not Easily Detected" (arXiv 1705.07263): a
    detector is broken by whoever puts it into the loss. The attack it is made of runs several
    times: with c = 0, then c = 1, then ten times more while the image is flagged, and half way
    between two weights once one passes unflagged and one breaks the answer. Of each sample the
    image is kept that breaks the answer *and* passes; else one that breaks it; else one that
    passes. [inferred] in the details.

    Not in the catalogue: a run makes it of an attack with ``adaptive: true`` for each detector.

    Args:
        inner: the attack; it `takes_penalty`.
        suspicion: of the detector; None before it is calibrated, when nothing can be attacked yet.
        limit: threshold to stay under.
        scale: unit of the score, > 0: its deviation on clean pictures.
        rounds: runs of the attack, ≥ 1.
        margin: how far under the threshold to aim, in units of the score, ≥ 0.
        draws: of a random detector, of which the mean is taken, ≥ 1.
        passes: passes of one picture through a model in one score, ≥ 1.

    Raises:
        AttackError: if the attack does not descend on the penalty.
    """

    name: ClassVar[str] = "evade"
    knowledge: ClassVar[Knowledge] = Knowledge.WHITE_BOX

    inner: Attack
    suspicion: Suspicion | None = None
    limit: float = 0.0
    scale: Annotated[float, Gt(0)] = 1.0
    rounds: Annotated[int, Ge(1)] = 4
    margin: Annotated[float, Ge(0)] = 0.1
    draws: Annotated[int, Ge(1)] = 1
    passes: Annotated[int, Ge(1)] = 1

    def __post_init__(self) -> None:
        """Check the options, then that the attack can be made to evade."""
        super().__post_init__()
        if not self.inner.takes_penalty:
            raise AttackError(
                f"attack {self.inner.name} does not descend on a loss that a penalty is added to, "
                "so it cannot evade a detector"
            )

    def gradients(self, budget: Budget) -> int:
        """Those of the attack in each run, and of the score at each step of all but the first."""
        steps = budget.steps * budget.restarts
        weighted = (self.rounds - 1) * steps * self.passes * self.draws
        return self.rounds * self.inner.gradients(budget) + weighted

    def budget(self, epsilon: float) -> Budget:
        """That of the attack, with the questions of every run."""
        inner = self.inner.budget(epsilon)
        return replace(inner, queries=self.rounds * inner.queries)

    def canvas(self, images: Tensor) -> Tensor:
        """That of the attack."""
        return self.inner.canvas(images)

    def standing(self, *, random: bool) -> Attack | None:
        """That of the attack: a detector is no part of the answer, so its jumps are none of it."""
        return self.inner.standing(random=random)

    def propose(self, view: WhiteBoxView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Search for the weight; keep the best image of each sample."""
        search = _Search(batch.images)
        forwards = backwards = 0
        notes: tuple[str, ...] = ()
        for number in range(self.rounds):
            penalty = _Hinge(self, batch.questions, search.weight)
            given = replace(batch, penalty=penalty if number else None)
            made = self.inner.propose(view, given, budget, rng.child(f"weight {number}"))
            found = made if isinstance(made, Proposal) else Proposal(made)
            if number and budget.steps and not penalty.asked[0]:
                raise AttackError(
                    f"attack {self.inner.name} never looked at its penalty, so it evades nothing"
                )
            # Counted in pictures: of a batch that shrinks, not all are looked at in every step.
            count = max(len(batch.ids), 1)
            forwards += math.ceil(penalty.asked[0] / count) + self.passes * self.draws
            backwards += math.ceil(penalty.asked[1] / count)
            images = _settled(batch, found, budget)
            with torch.no_grad():
                hidden = self._mean(images, batch.questions) <= self.limit
            right = batch.right(view.ask(images, batch.questions, path="compressed"))
            broken = ~torch.tensor(right, device=images.device)
            search.see(images, found, hidden.to(images.device), broken)
            notes = (*notes, *(note for note in found.notes if note not in notes))
        return search.result(notes, forwards, backwards)

    def _mean(self, images: Tensor, questions: tuple[str, ...]) -> Tensor:
        """The score, mean over draws."""
        if self.suspicion is None:
            raise AttackError("attack evade: the detector it is to evade is not calibrated yet")
        drawn = [self.suspicion(images, questions, draw) for draw in range(self.draws)]
        return torch.stack(drawn).mean(0)


@dataclass(frozen=True, slots=True)
class _Hinge:
    """The penalty ``c · max(0, (score − threshold) / scale + margin)``; see `targets.base`."""

    attack: Evade
    questions: tuple[str, ...]
    weight: Tensor
    asked: list[int] = field(default_factory=lambda: [0, 0])
    """Passes of all pictures, and gradients of them."""

    def __call__(self, images: Tensor) -> Tensor:
        attack = self.attack
        passes = attack.passes * attack.draws
        self.asked[0] += passes * len(images)
        self.asked[1] += passes * len(images) * images.requires_grad
        above = (attack._mean(images, self.questions) - attack.limit) / attack.scale
        return self.weight.to(above) * (above + attack.margin / attack.scale).clamp_min(0)

    def rows(self, indices: Sequence[int]) -> _Hinge:
        rows = list(indices)
        questions = tuple(self.questions[row] for row in rows)
        return _Hinge(self.attack, questions, self.weight[rows], self.asked)


class _Search:
    """Per sample the weight to try next and the best image so far."""

    def __init__(self, clean: Tensor) -> None:
        count = len(clean)
        self.weight = clean.new_ones(count)
        self._low, self._high = clean.new_zeros(count), clean.new_full((count,), torch.inf)
        self._worth = clean.new_full((count,), -1.0)
        self._images = clean.clone()
        self._found: Proposal | None = None
        self._first = True

    def see(self, images: Tensor, found: Proposal, hidden: Tensor, broken: Tensor) -> None:
        """Note what a weight led to, and choose the next."""
        worth = 2.0 * broken + 1.0 * hidden
        take = worth > self._worth
        self._worth = torch.where(take, worth, self._worth)
        self._images = torch.where(take.view(-1, 1, 1, 1), images, self._images)
        self._found = found if self._found is None else _merged(self._found, found, take)
        if self._first:  # without a penalty: it says nothing about a weight above 0
            self._first = False
            return
        self._low = torch.where(~hidden, self.weight, self._low)
        self._high = torch.where(hidden & ~broken, self.weight, self._high)
        middle = (self._low + self._high) / 2
        raised = torch.where(self._high.isinf(), self.weight * 10, middle)
        self.weight = torch.where(hidden & broken, self.weight, raised)

    def result(self, notes: tuple[str, ...], forwards: int, backwards: int) -> Proposal:
        """The best images."""
        found = Proposal(self._images) if self._found is None else self._found
        return replace(
            found,
            images=self._images,
            believed=self._worth >= 2,
            mask=None,
            notes=notes,
            forwards=forwards,
            backwards=backwards,
        )


def _merged(old: Proposal, new: Proposal, take: Tensor) -> Proposal:
    """Traces of the run that each sample's image comes from."""
    done = None if old.done is None or new.done is None else torch.where(take, new.done, old.done)
    traces = [
        None if one is None or two is None else torch.where(take, two, one)
        for one, two in ((old.loss, new.loss), (old.gradient, new.gradient), (old.kept, new.kept))
    ]
    exact = old.exact
    if exact is not None and new.exact is not None:
        exact = torch.where(take, new.exact, exact)
    return replace(old, loss=traces[0], gradient=traces[1], done=done, kept=traces[2], exact=exact)


def _settled(batch: Batch, found: Proposal, budget: Budget) -> Tensor:
    """The images as they will be saved."""
    images = found.images.detach()
    if found.mask is not None:
        images = torch.where(found.mask > 0, images, batch.images)
    return quantise(batch.images, images, budget)
