"""Transfer CAA: a border made on other models that leads an unknown compressor astray."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Interval
from torch import Tensor

from attacks.base import Attack, Proposal
from attacks.budget import Budget
from attacks.errors import AttackError
from attacks.seeds import SeedBank
from attacks.transfer import borders
from attacks.transfer.expectation import (
    Expectation,
    Member,
    Views,
    Weights,
    in_words,
    scorers_of,
)
from attacks.transfer.loop import Rules, optimise
from targets.base import Batch, Knowledge, Surrogate, SurrogateView

GENERIC = "What is in the picture?"
"""Asked of the surrogates where the user's question is not known."""


@dataclass(frozen=True, kw_only=True)
class TransferCAA(Attack):
    """Perturb only a border, on surrogate models, so that an unknown compressor keeps the border.

    Paper: the transfer setting of "Compression-Aware Attack" (arXiv 2601.12042): neither weights
    nor compression configuration are known and nothing is asked of the target. **The whole
    algorithm is a reconstruction**: only its two devices are known, *border-based perturbation*
    and *self-universal templates*. With P the tokens a surrogate f sees the frame in, R those of
    the picture, s log-scores at layer l (attention of the last prompt token, or of CLS)::

        min_u  E_{f, l, r, A} [ BPR(P over R) + w_q·L_query + w_e·L_erase + w_p·L_pres ]
               − w_su·cos(v, v_local)

    A draws a random resize and shift (DI) and local crops of the picture; v are the border's token
    features, on the whole picture and on a crop (self-universality, Wei et al., arXiv 2209.03716).
    The perturbation is a template u tiled over the frame at a random phase each step, so that it
    works wherever a patch grid falls. Gradients of the surrogates are divided by their mean size
    before they are averaged; momentum, then a sign step. MI, NI, DI, TI, SI, VMI, SSA and CWA are
    options; each is one function in `attacks.transfer` with its paper.

    Args:
        surrogates: labels of the scenario's surrogates; empty for all but the target itself.
        questions: ``known`` asks the surrogates the user's question, which the attacker then has
            to know; ``generic`` asks a general one, so that only the picture is known.
        frame: ``inside`` perturbs the outermost pixels of the picture; ``added`` shrinks the
            picture into a mid-grey frame of the same outer size and perturbs the frame alone. The
            budget is then measured from that framed picture: report the two apart.
        border: width of the frame as a share of the shorter side, in (0, 0.5).
        template: side of the tiled template in pixels, ≥ 1; None moves every pixel by itself.
        layers: scoring layers inside the language model, as FastV counts them, ≥ 1; read as shares
            of 32 layers where a surrogate is too shallow.
        scores: ``llm`` attention inside the language model, ``cls`` attention of CLS in the tower.
        over: which tokens of the picture the border has to outrank: all (``interior``), or those
            that a compressor of random retention keeps (``kept``).
        retention: range of that retention, in (0, 1].
        expectation: ``sampled`` takes one score of each surrogate a step, in turn; ``full`` all.
        crops: local crops a step, ≥ 0.
        crop_scale: least share of the picture's area in a crop, in (0, 1].
        similarity_weight: w_su, ≥ 0.
        tau: score gap that counts as settled, > 0.
        query_weight: w_q, ≥ 0; costs a clean pass a step.
        erase_weight: w_e, ≥ 0; costs a clean pass a step.
        preserve_weight: w_p, ≥ 0, of CAA's L_pres on the surrogates: their answer with all tokens
            should stay. Runs them whole and supposes that the attacker knows the correct answer,
            so it needs the ``known`` question.
        steps: gradient steps T, ≥ 0; 0 is the random start alone.
        alpha: step size in [0, 1] pixel units; None is epsilon / 16.
        schedule: step size over the run.
        random_start: begin at a random point of the masked ball.
        judge_every: a finished picture is judged on all surrogates at every n-th step, ≥ 1, and
            the best is kept.
        momentum: mu of MI in [0, 1].
        nesterov: NI.
        diversity: p of DI in [0, 1]; 0 is off.
        diversity_rate: most that DI enlarges the canvas, > 1.
        smoothing: side of TI's kernel in pixels, odd; 1 is off.
        smoothing_sigma: its deviation in pixels, > 0.
        scales: copies of SI, ≥ 1; 1 is off.
        neighbours: neighbours of VMI, ≥ 0; 0 is off.
        neighbourhood: beta of VMI in units of epsilon, > 0.
        spectra: copies of SSA, ≥ 0; 0 is off.
        spectrum_rho: rho of SSA in [0, 1]; its noise has a deviation of epsilon.
        ensemble: ``mean`` of the normalised gradients, or ``cwa``, whose steps take the place of NI
            and VMI: with it these have no effect, which is noted.
        inner: inner step of CWA, > 0.

    Raises:
        AttackError: for an option outside its range, an unknown surrogate, or a loss that is not
            finite.

    *Differs from the paper in …*: surrogates, loss, weights, width, template and schedule are not
    public, all are ours, preservation included; the best judged 8-bit picture is kept instead of
    the last; scores take turns instead of being drawn, which has the same mean. BPR does not depend
    on the retention unless `over` is ``kept``.
    """

    name: ClassVar[str] = "transfer_caa"
    knowledge: ClassVar[Knowledge] = Knowledge.SURROGATE
    control: ClassVar[tuple[str, ...]] = ("border", "frame")

    surrogates: tuple[str, ...] = ()
    questions: Literal["known", "generic"] = "known"
    frame: Literal["inside", "added"] = "inside"
    border: Annotated[float, Interval(gt=0, lt=0.5)] = 0.125
    template: Annotated[int, Ge(1)] | None = 56
    layers: tuple[int, ...] = (2, 8, 16)
    scores: tuple[Literal["llm", "cls"], ...] = ("llm", "cls")
    over: Literal["interior", "kept"] = "interior"
    retention: tuple[float, ...] = (0.1, 0.5)
    expectation: Literal["sampled", "full"] = "sampled"
    crops: Annotated[int, Ge(0)] = 1
    crop_scale: Annotated[float, Interval(gt=0, le=1)] = 0.1
    similarity_weight: Annotated[float, Ge(0)] = 0.001
    tau: Annotated[float, Gt(0)] = 1.0
    query_weight: Annotated[float, Ge(0)] = 1.0
    erase_weight: Annotated[float, Ge(0)] = 1.0
    preserve_weight: Annotated[float, Ge(0)] = 0.0
    steps: Annotated[int, Ge(0)] = 300
    alpha: Annotated[float, Gt(0)] | None = None
    schedule: Literal["constant", "cosine", "halving"] = "constant"
    random_start: bool = True
    judge_every: Annotated[int, Ge(1)] = 10
    momentum: Annotated[float, Interval(ge=0, le=1)] = 1.0
    nesterov: bool = False
    diversity: Annotated[float, Interval(ge=0, le=1)] = 0.5
    diversity_rate: Annotated[float, Gt(1)] = 1.1
    smoothing: Annotated[int, Ge(1)] = 1
    smoothing_sigma: Annotated[float, Gt(0)] = 3.0
    scales: Annotated[int, Ge(1)] = 1
    neighbours: Annotated[int, Ge(0)] = 0
    neighbourhood: Annotated[float, Gt(0)] = 1.5
    spectra: Annotated[int, Ge(0)] = 0
    spectrum_rho: Annotated[float, Interval(ge=0, le=1)] = 0.5
    ensemble: Literal["mean", "cwa"] = "mean"
    inner: Annotated[float, Gt(0)] = 250.0

    def __post_init__(self) -> None:
        """Check what an annotation cannot say."""
        super().__post_init__()
        counts = bool(self.layers) and all(type(one) is int and one >= 1 for one in self.layers)
        for option, fine, allowed in (
            ("layers", counts, "one or more whole numbers ≥ 1"),
            (
                "scores",
                bool(self.scores) and set(self.scores) <= {"llm", "cls"},
                "llm, cls or both",
            ),
            ("surrogates", all(isinstance(one, str) for one in self.surrogates), "labels"),
            ("retention", _is_range(self.retention), "two numbers, 0 < low ≤ high ≤ 1"),
            ("smoothing", self.smoothing % 2 == 1, "an odd number of pixels"),
            (
                "preserve_weight",
                self.preserve_weight == 0 or self.questions == "known",
                "0 where the question is generic, because there is no answer to preserve",
            ),
        ):
            if not fine:
                value = getattr(self, option)
                raise AttackError(f"attack {self.name}: {option} is {value!r}; allowed: {allowed}")

    @property
    def gradients_per_step(self) -> int:
        """Most of them on each surrogate: every score, copy, view and neighbour takes one."""
        every = len(self.layers) * ("llm" in self.scores) + ("cls" in self.scores)
        scores = every if self.expectation == "full" else 1
        copies = self.scales * max(1, self.spectra)
        around = 2 if self.ensemble == "cwa" else 1 + self.neighbours
        return scores * copies * (1 + self.crops) * around

    def budget(self, epsilon: float) -> Budget:
        """Linf radius, step size and steps."""
        alpha = epsilon / 16 if self.alpha is None else self.alpha
        return Budget(epsilon, "linf", alpha, self.steps)

    def canvas(self, images: Tensor) -> Tensor:
        """The clean pictures, or these in a grey frame."""
        return borders.framed(images, self.border) if self.frame == "added" else images

    def propose(self, view: SurrogateView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        """Descend on the expectation over the surrogates, inside the frame."""
        members = tuple(
            Member(one, scorers_of(one, self.layers, self.scores)) for one in self._chosen(view)
        )
        mask = borders.frame(batch.images, self.border)
        size = (batch.images.shape[-2], batch.images.shape[-1])
        asked = batch
        if self.questions == "generic":
            asked = replace(batch, questions=(GENERIC,) * len(batch.ids))
        problem = Expectation(
            members,
            asked,
            mask,
            borders.inside_of(size, self.border) if self.frame == "added" else (0, 0, *size),
            weights=self._weights(),
            views=self._views(budget),
            sampled=self.expectation == "sampled",
        )
        found = optimise(problem, batch, budget, rng, self._rules(), mask)
        notes = f"made on {', '.join(in_words(members))}; target and compression unknown"
        return replace(found, notes=(notes, *self._ignored()))

    def _ignored(self) -> tuple[str, ...]:
        """Options that the ensemble rule leaves no place for."""
        given = {"nesterov": self.nesterov, "neighbours": self.neighbours > 0}
        names = [name for name, on in given.items() if on and self.ensemble == "cwa"]
        if not names:
            return ()
        return (f"{' and '.join(names)} had no effect: the steps of ensemble cwa take their place",)

    def _chosen(self, view: SurrogateView) -> tuple[Surrogate, ...]:
        names = [one.name for one in view.surrogates]
        missing = [name for name in self.surrogates if name not in names]
        if missing or not names:
            raise AttackError(
                f"attack {self.name}: surrogates {missing} are not among those given: {names}"
            )
        return tuple(
            one for one in view.surrogates if not self.surrogates or one.name in self.surrogates
        )

    def _weights(self) -> Weights:
        return Weights(
            tau=self.tau,
            over=self.over,
            retention=(self.retention[0], self.retention[1]),
            query=self.query_weight,
            erase=self.erase_weight,
            preserve=self.preserve_weight,
            similarity=self.similarity_weight,
        )

    def _views(self, budget: Budget) -> Views:
        return Views(
            crops=self.crops,
            crop_scale=self.crop_scale,
            diversity=self.diversity,
            diversity_rate=self.diversity_rate,
            scales=self.scales,
            spectra=self.spectra,
            spectrum_sigma=budget.epsilon,
            spectrum_rho=self.spectrum_rho,
        )

    def _rules(self) -> Rules:
        return Rules(
            momentum=self.momentum,
            nesterov=self.nesterov,
            smoothing=self.smoothing,
            smoothing_sigma=self.smoothing_sigma,
            neighbours=self.neighbours,
            neighbourhood=self.neighbourhood,
            ensemble=self.ensemble,
            inner=self.inner,
            schedule=self.schedule,
            random_start=self.random_start,
            judge_every=self.judge_every,
            template=self.template,
        )


def _is_range(values: tuple[float, ...]) -> bool:
    return len(values) == 2 and 0 < values[0] <= values[1] <= 1
