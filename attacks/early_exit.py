"""Leave a sample alone as soon as it is broken, for attacks on the answer.

AutoAttack leaves broken samples out of what follows (Croce & Hein, arXiv 2003.01690); so does every
step here. What is left is packed into a smaller batch (`attacks.descent.Ending`), so a pass really
gets cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, cast

import torch
from torch import Tensor

from attacks.answers import Aim, AnswerLoss
from attacks.budget import Budget
from attacks.errors import AttackError
from attacks.goal import QUESTIONS, Judge

CONFIDENCE: Final = 0.01
"""How far a sample has to be past the point where its answer may turn, in nats, before it is asked:
a failure has to outlive the rounding of another batch."""


class EarlyExit:
    """The loss of an attack on the answer, with an end: an `attacks.descent.Ending`.

    A sample is done when the target itself answers wrong to the 8-bit image: on the full path, the
    compressed path, both, or with preservation on the compressed path alone (`Aim.end`). The
    target is asked only where that can be: `AnswerLoss.hold` is below −0.01 and the loss is lower
    than when the sample was last asked in this run.

    Args:
        loss: watched.
        judge: asks.

    Raises:
        AttackError: the view holds a defence that draws.
    """

    def __init__(self, loss: AnswerLoss, judge: Judge) -> None:
        self.loss, self._judge = loss, judge
        self._asked = loss.batch.images.new_full((len(loss.batch.ids),), torch.inf)

    @classmethod
    def on(cls, loss: AnswerLoss) -> EarlyExit:
        """The end that an attack's aim has."""
        if getattr(loss.view, "random", False):
            raise AttackError(
                "stop_when_broken against a defence that draws at random: one wrong answer is one "
                "draw's, and a sample that left with it was not attacked in expectation. Leave "
                "stop_when_broken off for this attack"
            )
        return cls(loss, Judge(loss.view, loss.aim.end))

    def __call__(self, images: Tensor, step: int) -> Tensor:
        """The loss ``[B]``."""
        if step == 0:  # a restart owes nothing to the run before
            self._asked = torch.full_like(self._asked, torch.inf)
        return self.loss(images, step)

    def done(self, images: Tensor, loss: Tensor, may: Tensor) -> Tensor:
        """Which samples are broken; see `attacks.descent.Ending`."""
        hold = cast(Tensor, self.loss.hold)
        places = (may & (hold < -CONFIDENCE) & (loss < self._asked)).nonzero()[:, 0]
        found = torch.zeros_like(may)
        if len(places):
            self._asked[places] = loss[places]
            some = replace(self.loss.batch.rows(places.tolist()), images=images[places])
            found[places] = self._judge.broken(some).to(found.device)
        return found

    def of(self, rows: Sequence[int]) -> EarlyExit:
        """The same of some samples."""
        some = EarlyExit(self.loss.of(rows), self._judge)
        some._asked = self._asked[list(rows)]
        return some


def questions(aim: Aim, budget: Budget) -> int:
    """Most questions about one sample that early exit asks in a budget."""
    each = QUESTIONS if aim.end in ("both", "compression_only") else 1
    return each * (budget.steps + 1) * budget.restarts
