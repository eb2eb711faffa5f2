"""Verbose images: make the model talk longer, which costs time and energy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt
from torch import Tensor

from attacks.base import Attack, Proposal
from attacks.budget import Budget
from attacks.descent import Descent, descend
from attacks.seeds import SeedBank
from attacks.verbosity import Weights, balance, certainty, ending, sameness
from targets.base import Batch, Continuation, Knowledge, WhiteBoxView

_ALPHA = 39 / 320
"""Published step size as a share of epsilon: 0.0039 of 0.032."""


@dataclass(frozen=True, kw_only=True)
class Verbose(Attack):
    """Delay the end of the answer, make every next token uncertain, and the answer diverse.

    Paper: Gao et al., "Inducing High Energy-Latency of Large Vision-Language Models with Verbose
    Images" (ICLR 2024, arXiv 2401.11170). Along the model's own greedy answer, with p_j the
    distribution of token j and h_j the hidden state it is made from::

        L = L_unc + λ₁ L_eos + λ₂ L_div
        L_unc = mean_j KL(p_j ‖ uniform)    L_eos = mean_j p_j(end)    L_div = −‖[h_1; h_2; …]‖_*

    ‖·‖_* is the nuclear norm. λ₁ and λ₂ follow `attacks.verbosity.balance`: ratios of the losses,
    fading with the step, smoothed. What competes for the best iterate is the length of the answer
    itself, the end's mean probability deciding between equal ones: the loss trace is
    ``L_eos − tokens said``, which can be compared between steps while L cannot.

    Args:
        path: ``full`` prolongs answers of the model with all visual tokens and does not know the
            compressor; ``compressed`` those given through it, with a straight-through gradient of
            the selection.
        length: tokens of an answer looked at, at most, ≥ 1. Answers are not judged beyond it, so
            it should be no less than what the deployed model may say (`answers.max_new_tokens`).
        refresh: steps after which the model is asked afresh what it says, ≥ 1 (published: 1); only
            those steps can become the result.
        steps: gradient steps T, ≥ 0 (published: 1000).
        alpha: step size in [0, 1] pixel units; None is 39/320 of epsilon (published: 0.0039 of
            0.032).
        restarts: random starts, longest answer kept per sample, ≥ 1.

    Raises:
        AttackError: see `attacks.descent.descend`.

    *Differs from the paper in …*: epsilon is in pixel units, while the paper's 0.032 is in CLIP's
    normalised units and about 2.2/255 here; answers are greedy instead of sampled; L_unc is a mean
    of KL(p ‖ uniform), as in the paper's formula (its code sums KL(uniform ‖ p)); L_div takes the
    last hidden states of the answer (its code takes absolute values of all layers', prompt
    included). The weights make up for such differences of scale.
    """

    name: ClassVar[str] = "verbose"
    knowledge: ClassVar[Knowledge] = Knowledge.WHITE_BOX
    undecoded: ClassVar[bool] = True

    path: Literal["full", "compressed"] = "full"
    length: Annotated[int, Ge(1)] = 64
    refresh: Annotated[int, Ge(1)] = 10
    steps: Annotated[int, Ge(0)] = 200
    alpha: Annotated[float, Gt(0)] | None = None
    restarts: Annotated[int, Ge(1)] = 1

    @property
    def knows_compression(self) -> bool:
        """Only on the compressed path."""
        return self.path == "compressed"

    def budget(self, epsilon: float) -> Budget:
        """Linf radius, step size, steps and restarts."""
        alpha = _ALPHA * epsilon if self.alpha is None else self.alpha
        return Budget(epsilon, "linf", alpha, self.steps, self.restarts)

    def propose(self, view: WhiteBoxView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Descend on L along the model's own answers."""
        objective = _Objective(self, view, batch)
        return descend(objective, batch, budget, rng, how=Descent(judge_every=self.refresh))


class _Objective:
    """The gradient of L, with the value ``L_eos − tokens said``, ``[B]`` per call."""

    def __init__(self, attack: Verbose, view: WhiteBoxView, batch: Batch) -> None:
        self.attack, self.view, self.batch = attack, view, batch
        self.weights: Weights | None = None
        self.said: Continuation | None = None

    def __call__(self, images: Tensor, step: int) -> Tensor:
        attack, questions = self.attack, self.batch.questions
        if step == 0:
            self.weights = None  # of another restart
        if self.said is None or step % attack.refresh == 0 or step == attack.steps:
            self.said = self.view.continuation(
                images.detach(), questions, length=attack.length, path=attack.path
            )
        state = self.view.generation(
            images,
            questions,
            self.said,
            path=attack.path,
            straight_through=attack.path == "compressed",
        )
        certain, end, same = (
            certainty(state.logprobs, state.real),
            ending(state.end, state.real),
            sameness(state.hidden, state.real),
        )
        self.weights = balance(certain, end, same, step, self.weights)
        loss = certain + self.weights.ending * end + self.weights.sameness * same
        value = end - self.said.real.sum(1)
        return loss + (value - loss).detach()
