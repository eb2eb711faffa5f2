"""Projected gradient descent on the answer: knowing nothing of compression, or everything."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Interval

from attacks.answers import Aim, AnswerLoss, choose_targets
from attacks.base import Attack, Proposal
from attacks.budget import Budget
from attacks.descent import Descent, descend
from attacks.early_exit import EarlyExit, questions
from attacks.errors import AttackError
from attacks.seeds import SeedBank
from targets.base import Batch, Knowledge, WhiteBoxView


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Make the right answer less likely, or a wanted one likelier, by projected gradient steps.

    Paper: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks"
    (arXiv 1706.06083), with the mean cross-entropy of the answer's tokens as the loss. Minimised,
    with y the right answer and t the target::

        L = log p(y), or −log p(t)            both: L(compressed) + full_weight · L(full)
        + preserve_weight · KL(p(·|clean, all tokens) ‖ p(·|attacked, all tokens))

    Args:
        path: ``full`` attacks the model with all visual tokens and does not know the compressor,
            so one image serves all of them; ``compressed`` attacks through the compressor, with
            the hard selection forward and a sigmoid relaxation of the top-k backward; ``both``
            attacks the two at once, at twice the cost.
        full_weight: weight of the full path in ``both``, ≥ 0; the compressed path has 1.
        target: None, any wrong answer; ``option``, each sample's likeliest wrong option on the
            clean image; or the wanted answer itself. Samples without options, or to which the
            wanted answer is right, are attacked without a target, which is noted.
        preserve_weight: of the full path's answer distribution, teacher-forced on the right
            answer, ≥ 0, per nat; with path ``compressed`` only. Seeks a failure under compression
            that the uncompressed model does not share, at twice the cost.
        steps: gradient steps T, ≥ 0; 0 is the random start alone.
        alpha: step size in [0, 1] pixel units; None is epsilon / 6.
        restarts: random starts, best loss kept per sample, ≥ 1.
        momentum: decay of accumulated gradients in [0, 1]; 0 is plain PGD.
        schedule: step size over the run.
        random_start: begin at a random point of the ball.
        norm: norm of the ball; alpha has its unit.
        stop_when_broken: a sample leaves at the first image that breaks it as `path` wants it
            (``full``, ``compressed`` or ``both`` wrong; with `preserve_weight` compressed wrong and
            full right), answered by the target itself, and the others go on as a smaller batch. It
            keeps that image, and is not run in later restarts. Not with a `target`.

    Raises:
        AttackError: `preserve_weight` with another path than ``compressed``; `stop_when_broken`
            with a target, or against a defence that draws; a right answer that is not among its
            options; see also `attacks.descent.descend`.

    *Differs from the paper in …*: the loss is that of a sequence, every iterate is judged as the
    8-bit image that will be saved, and the best iterate is kept instead of the last. The
    compressed path, ``both``, preservation and early exit are ours.
    """

    name: ClassVar[str] = "pgd"
    takes_penalty: ClassVar[bool] = True
    knowledge: ClassVar[Knowledge] = Knowledge.WHITE_BOX
    later: ClassVar[tuple[str, ...]] = ("stop_when_broken",)

    path: Literal["full", "compressed", "both"] = "full"
    full_weight: Annotated[float, Ge(0)] = 1.0
    target: str | None = None
    preserve_weight: Annotated[float, Ge(0)] = 0.0
    steps: Annotated[int, Ge(0)] = 40
    alpha: Annotated[float, Gt(0)] | None = None
    restarts: Annotated[int, Ge(1)] = 1
    momentum: Annotated[float, Interval(ge=0, le=1)] = 0.0
    schedule: Literal["constant", "cosine", "halving"] = "constant"
    random_start: bool = True
    norm: Literal["linf", "l2"] = "linf"
    stop_when_broken: bool = False

    def __post_init__(self) -> None:
        """Check the options, then that they agree."""
        super().__post_init__()
        self._aim.check(self.name)
        if self.stop_when_broken and self.target is not None:
            raise AttackError(
                f"attack {self.name}: stop_when_broken with target {self.target!r}; a sample that "
                "is answered wrong is not yet answered as wanted. Leave one of the two out"
            )

    @property
    def _aim(self) -> Aim:
        return Aim(
            path=self.path, full_weight=self.full_weight, preserve_weight=self.preserve_weight
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
        """Radius, norm, step size, steps, restarts; questions that ask whether one is broken."""
        budget = Budget(epsilon, self.norm, self.alpha, self.steps, self.restarts)
        if not self.stop_when_broken:
            return budget
        return replace(budget, queries=questions(self._aim, budget))

    def propose(self, view: WhiteBoxView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Descend on the likelihood of the answer."""
        targets, notes = choose_targets(view, batch, self.target, self.path)
        loss = AnswerLoss(view, batch, self._aim, targets, watched=self.stop_when_broken)
        objective = EarlyExit.on(loss) if self.stop_when_broken else loss
        how = Descent(
            momentum=self.momentum, schedule=self.schedule, random_start=self.random_start
        )
        found = descend(objective, batch, budget, rng, how=how)
        return replace(found, notes=(*notes, *loss.notes))
