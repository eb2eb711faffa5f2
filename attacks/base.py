"""The base of all attacks: a tiny method to implement, and a final call that cannot cheat.

An author writes `propose`. What counts is done here: the proposal is projected onto the budget
around the clean image, rounded to 8 bits inside it, measured, and checked.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor

from attacks.budget import Budget, from_levels, norms, quantise, to_levels
from attacks.checks import reduced_precision, run_checks
from attacks.errors import AttackError
from attacks.metering import Meter, MeteredView
from attacks.options import check_options
from attacks.seeds import SeedBank
from targets.base import TOLD, Batch, ImageView, Knowledge, Withheld, includes
from targets.precision import FULL, REDUCED, attacking

if TYPE_CHECKING:
    from targets.compression.base import Compressor

TRACE_POINTS = 64
"""Length to which a loss trace is thinned; checks see it whole."""
_COMPRESSION_AWARE = frozenset(
    {Knowledge.COMPRESSED, Knowledge.WHITE_BOX, Knowledge.QUERY, Knowledge.SCORES}
)


@dataclass(frozen=True, slots=True)
class OwnLoss:
    """What the loss of an attack says of one image; minimised.

    Attributes:
        kept: of the image that was kept; None where none was judged.
        best: the least on the way to it; None likewise.
        believed: whether the attack takes the image for one that breaks the compressed answer;
            None where it cannot tell.
    """

    kept: float | None = None
    best: float | None = None
    believed: bool | None = None


@dataclass(frozen=True, slots=True)
class Proposal:
    """What `propose` may return instead of bare images.

    Attributes:
        images: ``[B, 3, H, W]``; projected and rounded by the base class.
        loss: ``[steps + 1, B]``, minimised, NaN where a step was not judged; None if nothing was
            optimised.
        kept: ``[B]`` loss of `images`. None where an author does not say: then it is taken to be
            the last that was judged, because that is what a loop returns which keeps no best.
        gradient: ``[steps, B]`` largest absolute pixel gradient of each step.
        mask: ``[B, 1, H, W]`` of 0 and 1; pixels with 0 are restored to the clean image exactly.
        notes: remarks for the report, e.g. a component that could not be used.
        made_by: of an attack made of others, what made each sample's image; empty for the rest.
        checks: of an attack made of others, the self-checks of what made each sample's image, in
            place of those of `loss` and `gradient`.
        own: likewise, what the loss of what made each sample's image says of it.
        believed: of an attack that asked the target: bool ``[B]``, whether the image broke the
            compressed answer. None: what `Attack.believes` makes of the losses.
        forwards: passes of one picture through a model, per sample, that went through no view.
        backwards: gradients taken through these.
        done: bool ``[B]``, samples that left before the last step because they had reached what
            the attack wants (`attacks.descent.Ending`); None: none did. Checks of `loss` and
            `gradient`, which look for signs that an attack failed, leave them out.
        exact: ``[2, B]`` loss of `images` in the reduced precision they were made in and in full
            precision, which becomes the last point of the trace; None where nothing was reduced.
    """

    images: Tensor
    loss: Tensor | None = None
    gradient: Tensor | None = None
    mask: Tensor | None = None
    notes: tuple[str, ...] = ()
    made_by: tuple[str, ...] = ()
    checks: tuple[tuple[str, ...], ...] | None = None
    forwards: int = 0
    backwards: int = 0
    done: Tensor | None = None
    kept: Tensor | None = None
    own: tuple[OwnLoss, ...] | None = None
    believed: Tensor | None = None
    exact: Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttackResult:
    """Attacked images as they will be saved, and how they came about.

    Attributes:
        images: ``[B, 3, H, W]``, exact multiples of 1/255 in [0, 1], inside the budget.
        loss: per sample its loss trace, at most 64 points, first and last included. Of an attack
            in reduced precision the last is that of the image returned, in full precision.
        linf: float64 ``[B]``, largest absolute change, measured after rounding.
        l2: float64 ``[B]``, Euclidean length of the change over pixels and channels.
        checks: per sample the messages of `attacks.checks` that fired.
        forwards: passes of one image through a model, per sample; queries aside.
        backwards: gradients taken, per sample.
        notes: remarks on the whole call.
        queries: questions to the deployed target, per sample.
        base: ``[B, 3, H, W]`` what the budget is measured from (`Attack.canvas` of the clean
            images), exact multiples of 1/255.
        made_by: see `Proposal`.
        own: per sample what the attack's loss says of the image.
    """

    images: Tensor
    loss: list[list[float]]
    linf: Tensor
    l2: Tensor
    checks: tuple[tuple[str, ...], ...]
    forwards: int
    backwards: int
    notes: tuple[str, ...]
    queries: int
    base: Tensor
    made_by: tuple[str, ...]
    own: tuple[OwnLoss, ...]


class Attack(ABC):
    """Base of all attacks. Subclasses are ``@dataclass(frozen=True, kw_only=True)``.

    Their fields are their options and their `repr` is their provenance. They name the technique
    (`name`) and the most they may know (`knowledge`), and implement `propose`.

    Raises:
        AttackError: on construction, for an option outside its declared bounds.
    """

    name: ClassVar[str]
    knowledge: ClassVar[Knowledge]
    sometimes_idle: ClassVar[bool] = False
    """Whether there are compressors it cannot do anything about; `idle` then says which."""
    takes_penalty: ClassVar[bool] = False
    """Whether it descends with `attacks.descent.evaluate`, which adds `Batch.penalty`, so that it
    can be made to evade a detector as well (`attacks.evade`)."""
    raises_alarm: ClassVar[bool] = False
    """Whether against a detector it wants its alarm (`attacks.raise_alarm`)."""
    undecoded: ClassVar[bool] = False
    """Whether it looks at the model's own distributions, which no decoding method changes."""
    later: ClassVar[tuple[str, ...]] = ()
    """Options that came after runs had been recorded. At their defaults they are no part of what
    ids and seeds are made of, so that what was made before keeps its name."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in cls.__dict__:
            raise TypeError(f"{cls.__name__} may not override __call__; implement propose instead")

    def __post_init__(self) -> None:
        """Check every option against its annotation; subclasses that extend this call it first."""
        check_options(self, self.name)

    @property
    def needs(self) -> Knowledge:
        """What this configuration needs to know; never more than `knowledge`."""
        return self.knowledge

    @property
    def knows_compression(self) -> bool:
        """Whether its images depend on the compressor; if not, one image serves all of them.

        An attack that only asks the deployed target does not know its compressor, but its images
        depend on it all the same.
        """
        return self.needs in _COMPRESSION_AWARE

    @property
    def stops_early(self) -> bool:
        """Whether a sample is left alone once the target answers it wrong.

        Against a defence that draws at random such an attack is not run adaptively.
        """
        return False

    @property
    def gradients_per_step(self) -> int:
        """How many gradients a step takes: several where its loss looks at several paths."""
        return 1

    def gradients(self, budget: Budget) -> int:
        """Most gradients it takes for one sample within a budget."""
        return budget.steps * budget.restarts * self.gradients_per_step

    def against(self, defense: str, options: Mapping[str, object]) -> Attack | None:
        """This attack in the form its authors give it against a defence.

        Args:
            defense: name of the defence.
            options: its options.

        Returns:
            An attack that needs no defended view; None to go through the defence as it is.
        """
        del defense, options
        return None

    def idle(self, compressor: Compressor) -> str | None:
        """Why it cannot do anything about a compressor; None if it can. See `sometimes_idle`."""
        del compressor
        return None

    def budget(self, epsilon: float) -> Budget:
        """The budget at a radius; attacks with steps, alpha, restarts or a norm pass them on."""
        return Budget(epsilon)

    def canvas(self, images: Tensor) -> Tensor:
        """The pictures the budget is measured from: the clean ones, unless a frame is added.

        Args:
            images: clean, ``[B, 3, H, W]`` in [0, 1].

        Returns:
            Pictures of the same shape; `propose` sees them as the batch's images.
        """
        return images

    def believes(self, batch: Batch, losses: Sequence[float | None]) -> list[bool | None]:
        """Whether each image breaks the compressed answer, as far as the attack's loss can tell.

        Attacks whose loss has a known zero (a margin) say so; a likelihood or a ranking has none.

        Args:
            batch: the samples as the attack was told of them.
            losses: of the images that were kept; None where none was judged.

        Returns:
            None for a sample of which the loss does not tell.
        """
        del batch
        return [None] * len(losses)

    def standing(self, *, random: bool) -> Attack | None:
        """This attack without a step: all it does is judge its start, so it tells its loss there.

        Args:
            random: at a random point of the linf ball; else at the clean image.

        Returns:
            None for an attack without the options `steps` and `random_start`.
        """
        own: Any = self  # a dataclass, as every attack is
        names = {field.name for field in fields(own)}
        if not {"steps", "random_start"} <= names:
            return None
        given: dict[str, Any] = {"restarts": 1, "targets": 0, "norm": "linf"}
        changes = {key: value for key, value in given.items() if key in names}
        standing: Attack = replace(own, steps=0, random_start=random, **changes)
        return standing

    @abstractmethod
    def propose(
        self,
        view: Any,  # noqa: ANN401 - each attack narrows it to the view it declares
        batch: Batch,
        budget: Budget,
        rng: SeedBank,
    ) -> Tensor | Proposal:
        """Make attacked images; this is all an author writes.

        Args:
            view: the view that matches `needs`; anything beyond it raises `KnowledgeError`.
            batch: the samples, images in [0, 1]. Questions are withheld from an attack that knows
                no more than the encoder, answers from one that knows no more than the ranking;
                looking at them raises `KnowledgeError`.
            budget: radius, norm, steps; staying inside is good for the attack, not a duty.
            rng: the only allowed source of randomness, one stream per sample.

        Returns:
            Images ``[B, 3, H, W]``, or a `Proposal`.
        """

    @final
    def __call__(
        self, view: ImageView, batch: Batch, epsilon: float, seeds: Sequence[int]
    ) -> AttackResult:
        """Attack a batch within a budget.

        Args:
            view: a view of the target that offers at least `needs`.
            batch: B samples; images float32 ``[B, 3, H, W]`` in [0, 1], multiples of 1/255.
            epsilon: radius in [0, 1] pixel units; 0 gives the clean images back.
            seeds: one per sample; a sample's result depends on its seed, not on its neighbours.

        Raises:
            AttackError: bad input, or a loss, gradient or image that is not finite; its
                `sample_ids` name the samples at fault.
            KnowledgeError: the attack reached outside its view.
        """
        budget = self.budget(epsilon)
        clean = _check_batch(batch, seeds)
        base = from_levels(to_levels(self.canvas(clean)))
        own = replace(_told(batch, self.needs), images=base.clone())
        meter = Meter()
        metered = MeteredView(view, self.needs, meter)
        if budget.is_empty:
            why = () if epsilon == 0 else (f"epsilon {epsilon:.3g} is below one 8-bit level",)
            return _result(base, base.clone(), Proposal(base, notes=why), meter)
        with torch.inference_mode(False), torch.enable_grad(), attacking(metered):
            proposed = self.propose(metered, own, budget, SeedBank(seeds, clean.device))
        proposal = proposed if isinstance(proposed, Proposal) else Proposal(proposed)
        if metered.precision != FULL and proposal.checks is None and proposal.exact is None:
            proposal = _unjudged(proposal, meter)
        with torch.no_grad():
            result = _result(base, _admit(batch, base, proposal, budget), proposal, meter)
            notes = (*result.notes, *_vanished(budget, proposal, result))
            result = replace(result, notes=notes, own=self._own(own, proposal, result.own))
        _verify(batch, budget, result)
        return result

    def _own(
        self, batch: Batch, proposal: Proposal, found: tuple[OwnLoss, ...]
    ) -> tuple[OwnLoss, ...]:
        """What the losses say, with what the attack makes of them."""
        if proposal.own is not None:
            return found
        if proposal.believed is not None:
            told: list[bool | None] = [bool(one) for one in proposal.believed.tolist()]
        else:
            told = self.believes(batch, [one.kept for one in found])
        return tuple(replace(one, believed=so) for one, so in zip(found, told, strict=True))


def _told(batch: Batch, knowledge: Knowledge) -> Batch:
    """The samples with what an attacker of this knowledge is not told withheld."""
    hidden: dict[str, Any] = {
        name: Withheld(
            len(batch.ids),
            f"batch.{name} is not told to an attack of knowledge {knowledge.value!r}; least is "
            f"{least[0].value!r}. Declare more, and the report will say so.",
        )
        for name, least in TOLD.items()
        if not any(includes(knowledge, one) for one in least)
    }
    return replace(batch, **hidden)


def _check_batch(batch: Batch, seeds: Sequence[int]) -> Tensor:
    """Refuse what no attack could mean; give the clean images as exact multiples of 1/255."""
    images, count = batch.images, len(batch.ids)
    if images.dtype != torch.float32 or images.ndim != 4 or images.shape[1] != 3:
        raise AttackError(
            f"images are {images.dtype} {list(images.shape)}; they must be float32 [B, 3, H, W]"
        )
    lengths = {
        "images": len(images),
        "questions": len(batch.questions),
        "answers": len(batch.answers),
        "seeds": len(seeds),
    }
    for what, length in lengths.items():
        if length != count:
            raise AttackError(f"the batch has {count} ids but {length} {what}; one each is needed")
    flat = images.detach().flatten(1)
    _blame(batch, ~flat.isfinite().all(1), "images hold NaN or infinity; allowed is [0, 1]")
    low, high = flat.amin(1), flat.amax(1)
    _blame(
        batch,
        (low < 0) | (high > 1),
        f"images range over [{low.min():.4g}, {high.max():.4g}]; allowed is [0, 1], so divide "
        "8-bit values by 255 and do not normalise",
    )
    exact = from_levels(to_levels(images.detach()))
    off = (exact - images.detach()).abs().flatten(1).amax(1)
    _blame(
        batch,
        off > 1e-6,
        f"images are up to {off.max():.3g} away from a multiple of 1/255; load them from 8 bits",
    )
    return exact


def _admit(batch: Batch, clean: Tensor, proposal: Proposal, budget: Budget) -> Tensor:
    """The proposal as it will be saved: masked, in the ball, 8 bits."""
    images = proposal.images.detach()
    if images.shape != clean.shape:
        raise AttackError(
            f"propose returned images of {list(images.shape)}; expected {list(clean.shape)}"
        )
    bad = ~images.flatten(1).isfinite().all(1)
    _blame(batch, bad, "propose returned images with NaN or infinity")
    images = images.to(clean)
    if proposal.mask is not None:
        images = torch.where(proposal.mask.to(clean.device) > 0, images, clean)
    return quantise(clean, images, budget)


def _blame(batch: Batch, bad: Tensor, message: str) -> None:
    """Raise an error that names the samples where `bad` ([B]) holds."""
    if not bad.any():
        return
    ids = tuple(name for name, wrong in zip(batch.ids, bad.tolist(), strict=True) if wrong)
    raise AttackError(f"{message} (samples {', '.join(ids)})", sample_ids=ids)


def _result(base: Tensor, images: Tensor, proposal: Proposal, meter: Meter) -> AttackResult:
    linf, l2 = norms((to_levels(images) - to_levels(base)).double() / 255)
    count = len(base)
    losses = _columns(proposal.loss, count)
    done = [False] * count if proposal.done is None else proposal.done.tolist()
    own = proposal.own
    if own is None:
        kept = _kept(proposal.kept, count)
        # What a sample was done with beats any lower loss on the way to it.
        own = tuple(
            OwnLoss(one, one) if won else _own(loss, one)
            for loss, one, won in zip(losses, kept, done, strict=True)
        )
    checks = proposal.checks
    if checks is None:
        parts = zip(losses, _columns(proposal.gradient, count), own, done, strict=True)
        checks = tuple(
            () if won else run_checks(loss, slope, one.kept) for loss, slope, one, won in parts
        )
    losses, checks = _judged_exactly(proposal, losses, checks)
    return AttackResult(
        images=images,
        loss=[_thin([value for value in column if not math.isnan(value)]) for column in losses],
        linf=linf,
        l2=l2,
        checks=checks,
        forwards=math.ceil(meter.forwards / max(count, 1)) + proposal.forwards,
        backwards=math.ceil(meter.backwards / max(count, 1)) + proposal.backwards,
        notes=proposal.notes,
        queries=math.ceil(meter.queries / max(count, 1)),
        base=base,
        made_by=proposal.made_by,
        own=own,
    )


def _unjudged(proposal: Proposal, meter: Meter) -> Proposal:
    """A note where an image was made in reduced precision and no loss of it is known."""
    if not meter.backwards:
        return proposal
    note = (
        f"gradients were taken in {REDUCED}, and this attack keeps no loss of its own to judge the "
        "image by in float32"
    )
    return replace(proposal, notes=(*proposal.notes, note))


def _judged_exactly(
    proposal: Proposal, losses: list[list[float]], checks: Sequence[tuple[str, ...]]
) -> tuple[list[list[float]], tuple[tuple[str, ...], ...]]:
    """Traces with the loss in full precision at their end, and the check of it."""
    if proposal.exact is None:
        return losses, tuple(checks)
    pairs: list[list[float]] = proposal.exact.double().cpu().t().tolist()
    told = []
    for trace, found, (reduced, exact) in zip(losses, checks, pairs, strict=True):
        message = reduced_precision(trace, reduced, exact)
        told.append(found if message is None else (*found, message))
    ended = [[*trace, exact] for trace, (_, exact) in zip(losses, pairs, strict=True)]
    return ended, tuple(told)


def _vanished(budget: Budget, proposal: Proposal, result: AttackResult) -> tuple[str, ...]:
    """A note where rounding to 8 bits left nothing of a change, as it may in l2."""
    if budget.norm == "linf":
        return ()  # one level or more is left of it
    proposed = (proposal.images.detach().to(result.base) - result.base).abs().flatten(1).amax(1)
    lost = int(((proposed > 0) & (result.linf == 0)).sum())
    if not lost:
        return ()
    return (
        f"of {lost} of {len(proposed)} images rounding to 8 bits left no change: spread over all "
        "values, the budget is less than half a level each; take a larger epsilon",
    )


def _verify(batch: Batch, budget: Budget, result: AttackResult) -> None:
    """The last word on the budget: measured on the result, whatever made it."""
    measured = result.linf if budget.norm == "linf" else result.l2
    _blame(
        batch,
        measured > budget.epsilon,
        f"the {budget.norm} norm is {float(measured.max()):.6g}, above epsilon "
        f"{budget.epsilon:.6g}; this is a fault of attacks.budget, please report it",
    )


def _columns(trace: Tensor | None, count: int) -> list[list[float]]:
    """A ``[steps, B]`` trace as one list per sample."""
    if trace is None:
        return [[] for _ in range(count)]
    columns: list[list[float]] = trace.detach().double().cpu().t().tolist()
    return columns


def _kept(losses: Tensor | None, count: int) -> list[float | None]:
    found: list[float | None] = [None] * count
    return found if losses is None else losses.detach().double().cpu().tolist()


def _own(losses: Sequence[float], kept: float | None) -> OwnLoss:
    """Of one sample's trace and the loss of its image, the last judged if nobody says."""
    seen = [value for value in losses if not math.isnan(value)]
    if not seen:
        return OwnLoss(kept, kept)
    kept = seen[-1] if kept is None else kept
    return OwnLoss(kept, min(*seen, kept))


def _thin(values: list[float]) -> list[float]:
    """At most `TRACE_POINTS` values, evenly spaced, ends included."""
    if len(values) <= TRACE_POINTS:
        return values
    last = len(values) - 1
    return [values[round(i * last / (TRACE_POINTS - 1))] for i in range(TRACE_POINTS)]
