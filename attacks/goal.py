"""When an attacked image counts as a break, and which of two that do not came nearer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from targets.base import Batch, Path, WhiteBoxView

Goal = Literal["compression_only", "compressed", "full"]
End = Literal["compression_only", "compressed", "full", "both"]
"""The goals, and both paths wrong."""
GOALS: tuple[Goal, ...] = get_args(Goal)
QUESTIONS = 2
"""Most questions one judgement asks about a sample."""
_ON_BOTH = ("compression_only", "both")


@dataclass(frozen=True, slots=True)
class Judge:
    """Asks the target itself, greedily, as the evaluation will.

    Args:
        view: of a white box.
        goal: ``compression_only``, the compressed path wrong while the path with all tokens is
            right; ``compressed``, the compressed path wrong; ``full``, the full path wrong;
            ``both``, both wrong.
    """

    view: WhiteBoxView
    goal: End

    def open(self, batch: Batch) -> Tensor:
        """Samples that can still be broken, bool ``[B]``: right as they are on all paths judged."""
        found = torch.ones(len(batch.ids), dtype=torch.bool)
        paths: tuple[Path, ...] = ("full",) if self.goal == "full" else ("compressed",)
        for path in (*paths, "full") if self.goal in _ON_BOTH else paths:
            found[found.clone()] = self._right(_some(batch, found), path)
        return found

    def broken(self, batch: Batch) -> Tensor:
        """Whether each of B images, taken as it is, reaches the goal: bool ``[B]``."""
        if self.goal == "full":
            return ~self._right(batch, "full")
        wrong = ~self._right(batch, "compressed")
        if self.goal == "compression_only":
            wrong[wrong.clone()] = self._right(_some(batch, wrong), "full")
        elif self.goal == "both":
            wrong[wrong.clone()] = ~self._right(_some(batch, wrong), "full")
        return wrong

    def nearness(self, batch: Batch) -> Tensor:
        """How near each image comes to the goal, ``[B]``, larger is nearer.

        The negative log-likelihood of the right answer on the path that is to fail; for
        ``compression_only`` minus that on the path that is to hold; for ``both`` the smaller.
        """
        with torch.no_grad():
            doubt = self._nll(batch, "full" if self.goal == "full" else "compressed")
            if self.goal == "compression_only":
                doubt = doubt - self._nll(batch, "full")
            elif self.goal == "both":
                doubt = torch.minimum(doubt, self._nll(batch, "full"))
        return doubt

    def _nll(self, batch: Batch, path: Path) -> Tensor:
        found = self.view.answer_nll(batch.images, batch.questions, batch.answers, path=path)
        return found.detach().double().cpu()

    def _right(self, batch: Batch, path: Path) -> Tensor:
        if not batch.ids:
            return torch.zeros(0, dtype=torch.bool)
        texts = self.view.ask(batch.images, batch.questions, path=path)
        return torch.tensor(batch.right(texts), dtype=torch.bool)


def _some(batch: Batch, chosen: Tensor) -> Batch:
    return batch.rows(chosen.nonzero()[:, 0].tolist())
