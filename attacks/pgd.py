"""Projected gradient descent on the answer: knowing nothing of compression, or everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Interval
from torch import Tensor

from attacks.base import Attack, Proposal
from attacks.budget import Budget
from attacks.descent import Descent, descend
from attacks.seeds import SeedBank
from targets.base import Batch, Knowledge, WhiteBoxView


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Raise the negative log-likelihood of the correct answer by projected gradient steps.

    Paper: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks"
    (arXiv 1706.06083), with the answer's token-mean cross-entropy as the loss. The loss trace is
    the log-likelihood, which falls.

    Args:
        path: ``full`` attacks the model with all visual tokens and does not know the compressor,
            so one image serves all of them; ``compressed`` attacks through the compressor, with
            the hard selection forward and a sigmoid relaxation of the top-k backward.
        steps: gradient steps T, ≥ 0; 0 is the random start alone.
        alpha: step size in [0, 1] pixel units; None is epsilon / 6.
        restarts: random starts, best loss kept per sample, ≥ 1.
        momentum: decay of accumulated gradients in [0, 1]; 0 is plain PGD.
        schedule: step size over the run.
        random_start: begin at a random point of the ball.
        norm: norm of the ball; alpha has its unit.

    Raises:
        AttackError: see `attacks.descent.descend`.

    *Differs from the paper in …*: the loss is that of a sequence, every iterate is judged as the
    8-bit image that will be saved, and the best iterate is kept instead of the last.
    """

    name: ClassVar[str] = "pgd"
    knowledge: ClassVar[Knowledge] = Knowledge.WHITE_BOX

    path: Literal["full", "compressed"] = "full"
    steps: Annotated[int, Ge(0)] = 40
    alpha: Annotated[float, Gt(0)] | None = None
    restarts: Annotated[int, Ge(1)] = 1
    momentum: Annotated[float, Interval(ge=0, le=1)] = 0.0
    schedule: Literal["constant", "cosine", "halving"] = "constant"
    random_start: bool = True
    norm: Literal["linf", "l2"] = "linf"

    @property
    def knows_compression(self) -> bool:
        """Only on the compressed path."""
        return self.path == "compressed"

    def budget(self, epsilon: float) -> Budget:
        """Radius, norm, step size, steps and restarts."""
        return Budget(epsilon, self.norm, self.alpha, self.steps, self.restarts)

    def propose(self, view: WhiteBoxView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Descend on the log-likelihood of the correct answer."""

        def log_likelihood(images: Tensor, step: int) -> Tensor:
            del step
            return -view.answer_nll(
                images,
                batch.questions,
                batch.answers,
                path=self.path,
                straight_through=self.path == "compressed",
            )

        how = Descent(
            momentum=self.momentum, schedule=self.schedule, random_start=self.random_start
        )
        return descend(log_likelihood, batch, budget, rng, how=how)
