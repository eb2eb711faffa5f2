"""Auto-PGD: projected gradient descent without a step size to choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from attacks.answers import Aim, AnswerLoss, wrong_options
from attacks.autostep import autostep
from attacks.base import Attack, Proposal
from attacks.budget import Budget
from attacks.early_exit import EarlyExit, questions
from attacks.seeds import SeedBank
from targets.base import Batch, Knowledge, WhiteBoxView


@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """Descend on the answer with a step size that is halved, per sample, when it stops helping.

    Paper: Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks" (arXiv 2003.01690), algorithm 1. Minimised, with step size η = 2·epsilon
    at first and d the steepest direction in the norm::

        z = P(x_k − η·d)           x_{k+1} = P(x_k + 0.75·(z − x_k) + 0.25·(x_k − x_{k−1}))

    At checkpoints (22 % of the steps, then 19 %, 16 % … later, at least 6 %) η is halved and the
    sample goes back to its best iterate, if fewer than 75 % of the steps improved on the one before
    or if neither η nor the best loss changed since the last checkpoint.

    Args:
        path: ``full`` attacks the model with all visual tokens and does not know the compressor;
            ``compressed`` goes through it, straight-through the top-k; ``both`` adds the two.
        full_weight: weight of the full path in ``both``, ≥ 0; the compressed path has 1.
        loss: ``ce``, mean log-likelihood of the right answer's tokens; ``margin``, log-probability
            of the right option minus that of the best other; ``dlr``, the same as a ratio of logit
            differences, which no rescaling of the logits can hide (eq. 6 and 7). ``margin`` and
            ``dlr`` use a sample's answer options; an open question has log p − log(1 − p) of its
            right answer instead. ``dlr`` needs three options, with targets four, so POPE cannot
            use it; samples with fewer get the margin, which is noted. Its gradient is zero where
            the right option is the third likeliest, so a random start may end there, broken.
        targets: APGD-T: aim at each sample's n likeliest wrong options on the clean image, one run
            each, and keep the image with the lowest margin, ≥ 0; 0 is no target. A sample with
            fewer wrong options has fewer runs, an open question one run without a target.
        preserve_weight: of the full path's answer distribution, see `attacks.pgd.PGD`; ≥ 0, with
            path ``compressed`` only.
        steps: gradient steps T of one run, ≥ 0; 0 is the random start alone.
        restarts: random starts of each run, best loss kept per sample, ≥ 1.
        random_start: begin at a random point of the ball; restarts after the first always do.
        norm: norm of the ball.
        stop_when_broken: a sample leaves at the first image that breaks it, see `attacks.pgd.PGD`,
            and is not run in later restarts or at later targets.

    Raises:
        AttackError: `preserve_weight` with another path than ``compressed``; `stop_when_broken`
            against a defence that draws; a right answer that is not among its options; see also
            `attacks.autostep.autostep`.

    *Differs from the paper in …*: every iterate is judged as the 8-bit image that will be saved,
    while the walk itself stays in floating point; the first of several starts is uniform in the
    ball; a checkpoint acts as soon as the losses it looks at are known; options stand in for
    classes; samples broken by one run are left out of the next, and of the rest of their own, only
    with `stop_when_broken`.
    """

    name: ClassVar[str] = "apgd"
    takes_penalty: ClassVar[bool] = True
    knowledge: ClassVar[Knowledge] = Knowledge.WHITE_BOX
    later: ClassVar[tuple[str, ...]] = ("stop_when_broken",)

    path: Literal["full", "compressed", "both"] = "full"
    full_weight: Annotated[float, Ge(0)] = 1.0
    loss: Literal["ce", "margin", "dlr"] = "ce"
    targets: Annotated[int, Ge(0)] = 0
    preserve_weight: Annotated[float, Ge(0)] = 0.0
    steps: Annotated[int, Ge(0)] = 100
    restarts: Annotated[int, Ge(1)] = 1
    random_start: bool = True
    norm: Literal["linf", "l2"] = "linf"
    stop_when_broken: bool = False

    def __post_init__(self) -> None:
        """Check the options, then that they agree."""
        super().__post_init__()
        self._aim.check(self.name)

    @property
    def _aim(self) -> Aim:
        return Aim(
            path=self.path,
            loss=self.loss,
            full_weight=self.full_weight,
            preserve_weight=self.preserve_weight,
        )

    @property
    def knows_compression(self) -> bool:
        """Unless it attacks the full path alone."""
        return self.path != "full"

    @property
    def stops_early(self) -> bool:
        """With `stop_when_broken`."""
        return self.stop_when_broken

    @property
    def gradients_per_step(self) -> int:
        """Two where the loss looks at both paths."""
        return 2 if self.path == "both" or self.preserve_weight else 1

    def budget(self, epsilon: float) -> Budget:
        """Radius, norm, steps, and restarts of all targets together; questions of early exit."""
        restarts = self.restarts * max(self.targets, 1)
        budget = Budget(epsilon, self.norm, None, self.steps, restarts)
        if not self.stop_when_broken:
            return budget
        return replace(budget, queries=questions(self._aim, budget))

    def believes(self, batch: Batch, losses: Sequence[float | None]) -> list[bool | None]:
        """Below 0 another option is likelier than the right one, on the compressed path alone.

        An open question has log-odds, below 0 of which the right answer may still be the likeliest.
        """
        if self.loss == "ce" or self.path != "compressed":
            return [None] * len(losses)
        options = batch.options or ((),) * len(losses)
        return [
            None if loss is None or len(known) < 2 else loss < 0
            for loss, known in zip(losses, options, strict=True)
        ]

    def propose(self, view: WhiteBoxView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Run without a target, or once for each of them."""
        one = replace(budget, restarts=self.restarts)
        if self.targets == 0:
            return self._descend(view, batch, one, rng)
        return self._targeted(view, batch, one, rng)

    def _descend(
        self,
        view: WhiteBoxView,
        batch: Batch,
        budget: Budget,
        rng: SeedBank,
        targets: Sequence[str | None] | None = None,
    ) -> Proposal:
        loss = AnswerLoss(view, batch, self._aim, targets, watched=self.stop_when_broken)
        objective = EarlyExit.on(loss) if self.stop_when_broken else loss
        found = autostep(objective, batch, budget, rng, random_start=self.random_start)
        return replace(found, notes=tuple(loss.notes))

    def _targeted(
        self, view: WhiteBoxView, batch: Batch, budget: Budget, rng: SeedBank
    ) -> Proposal:
        """Of one run for each target, per sample the image with the lowest margin."""
        wrong = wrong_options(view, batch, self.path, self.targets)
        first = [one[0] if one else None for one in wrong]
        best = self._descend(view, batch, budget, rng.child("target 0"), first)
        lowest = self._margin(view, batch, best.images)
        for number in range(1, max(map(len, wrong))):
            done = best.done.tolist() if best.done is not None else [False] * len(wrong)
            rows = [row for row, one in enumerate(wrong) if number < len(one) and not done[row]]
            if not rows:
                continue
            some, aims = batch.rows(rows), [wrong[row][number] for row in rows]
            own = SeedBank([rng.seeds[row] for row in rows], rng.device).child(f"target {number}")
            found = self._descend(view, some, budget, own, aims)
            reached = self._margin(view, some, found.images)
            take = reached < lowest[rows]
            if found.done is not None:
                take |= found.done
            best = _replaced(best, rows, found, take)
            lowest[rows] = torch.where(take, reached, lowest[rows])
        if all(wrong):
            return best
        note = (
            "questions without options have no wrong one to aim at; they were attacked untargeted"
        )
        return replace(best, notes=(*best.notes, note))

    def _margin(self, view: WhiteBoxView, batch: Batch, images: Tensor) -> Tensor:
        """What runs at different targets are compared by, ``[B]``."""
        with torch.no_grad():
            return AnswerLoss(view, batch, replace(self._aim, loss="margin"))(images, 0)


def _replaced(best: Proposal, rows: Sequence[int], found: Proposal, take: Tensor) -> Proposal:
    """The best run with those of some rows replaced where `take` ([rows]) says so."""
    where = torch.tensor(rows, device=take.device)[take]
    images = best.images.index_copy(0, where, found.images[take])
    traces = [
        None if old is None or new is None else old.index_copy(1, where, new[:, take])
        for old, new in ((best.loss, found.loss), (best.gradient, found.gradient))
    ]
    done, kept = best.done, best.kept
    if done is not None and found.done is not None:
        done = done.index_copy(0, where, found.done[take])
    if kept is not None and found.kept is not None:
        kept = kept.index_copy(0, where, found.kept[take])
    exact = best.exact
    if exact is not None and found.exact is not None:
        exact = exact.index_copy(1, where, found.exact[:, take])
    loss, gradient = traces
    return replace(
        best, images=images, loss=loss, gradient=gradient, done=done, kept=kept, exact=exact
    )
