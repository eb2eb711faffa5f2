"""Defences that change no answer and say how much an input looks attacked.

A detector is two functions: what it sees of a request (`observe`, live, so that an attack may
descend on it), and how suspicious that is (`judge`, given what it learnt from clean calibration
samples). Thresholds are no part of it: they are set from its scores on other clean samples, in
`reports.detection`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

import torch
from torch import Tensor

from defenses.base import Defense, DefenseError, DefenseKind
from defenses.decoding import check_ranges
from targets.passes import RELAX

if TYPE_CHECKING:
    from targets.compression.base import Compressor
    from targets.lvlm import LVLM

State = Mapping[str, Tensor]
"""What a detector has learnt, by name; empty for one that learns nothing."""
Observation = Mapping[str, Tensor]
"""What a detector sees of B requests: float tensors ``[B, …]`` by name, live."""
SPREAD = 1e-6
"""Least deviation anything is divided by."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """B requests as they arrive at a deployment; pictures of one size.

    Attributes:
        model: the target.
        compressor: what it answers through; None for all visual tokens.
        images: ``[B, 3, H, W]`` in [0, 1].
        questions: B texts.
        seeds: one per sample, the detector's only source of randomness.
        draws: one per sample, for a compressor that draws; None is 0 for all.
        relax: whether a gradient reaches the compressor's choice through a relaxation of it.
    """

    model: LVLM
    compressor: Compressor | None
    images: Tensor
    questions: tuple[str, ...]
    seeds: tuple[int, ...]
    draws: tuple[int, ...] | None = None
    relax: bool = False

    def __post_init__(self) -> None:
        """Check that there is one of each for every picture.

        Raises:
            DefenseError: if not.
        """
        counts = {"questions": len(self.questions), "seeds": len(self.seeds)}
        if self.draws is not None:
            counts["draws"] = len(self.draws)
        for what, count in counts.items():
            if count != len(self.images):
                raise DefenseError(f"{len(self.images)} images but {count} {what}; one each")

    def showing(self, images: Tensor) -> Traffic:
        """The same requests with other pictures."""
        return replace(self, images=images)

    def generators(self) -> list[torch.Generator]:
        """One CPU generator per sample."""
        return [torch.Generator().manual_seed(seed) for seed in self.seeds]


@dataclass(frozen=True, slots=True)
class Cost:
    """What watching a request costs on top of answering it.

    Attributes:
        language: further prefills of the language model, in units of a compressed one
            (multiply-accumulates, `targets.costs.FORMULA`).
        tower: further passes of a picture through the vision tower.
    """

    language: float
    tower: float


class Detector(Defense):
    """Base of all detectors. Subclasses are ``@dataclass(frozen=True, kw_only=True)``.

    They implement `observe`, `judge` and `cost`, and `fit` where they learn.

    Attributes:
        learns: whether `fit` needs clean samples; these then set no threshold.
        contrasts: whether it needs attacked and noisy versions of these samples too. They are made
            by the attack that option `reference` names, at the budget `reference_epsilon`.

    Raises:
        DefenseError: on construction, for an option outside its range.
    """

    kind: ClassVar[DefenseKind] = DefenseKind.DETECTOR
    learns: ClassVar[bool] = False
    contrasts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check every option against its range."""
        check_ranges(self)

    def refuses(self, compressor: Compressor) -> str | None:
        """Why it cannot watch a compressor, in plain words; None if it can."""
        del compressor
        return None

    @abstractmethod
    def observe(self, traffic: Traffic) -> Observation:
        """What it sees of requests, live with respect to the pictures where that is possible."""

    def fit(self, clean: Observation, noisy: Observation, attacked: Observation) -> State:
        """Learn from observations of calibration samples, ``[n, …]`` each.

        Args:
            clean: of clean pictures.
            noisy: of these with random noise; empty unless it `contrasts`.
            attacked: of these attacked; empty likewise.

        Raises:
            DefenseError: with too few samples.
        """
        del clean, noisy, attacked
        return {}

    @abstractmethod
    def judge(self, seen: Observation, state: State) -> Tensor:
        """How suspicious requests are, ``[B]``: higher is more, any scale.

        Args:
            seen: by `observe`.
            state: by `fit`.
        """

    @property
    def passes(self) -> int:
        """Passes of one picture through a model, or its tower, that a score takes here."""
        return 1

    @property
    def watchful(self) -> Detector:
        """The form an attacker has to reckon with: one that watches every request."""
        return self

    @abstractmethod
    def cost(self, full: float) -> Cost:
        """What it costs.

        Args:
            full: prefill of the language model with all visual tokens, in units of a compressed
                one, ≥ 1.
        """

    @final
    def score(self, traffic: Traffic, state: State) -> Tensor:
        """How suspicious requests are, float32 ``[B]``; higher is more.

        A sample's score depends on itself and its seeds, never on its neighbours.

        Raises:
            DefenseError: for scores of another shape, or that are not finite.
        """
        found = self.judge(self.observe(traffic), state)
        if found.shape != (len(traffic.images),):
            raise DefenseError(
                f"detector {self.name} gave scores of {list(found.shape)} for "
                f"{len(traffic.images)} pictures; one each"
            )
        if not bool(found.detach().isfinite().all()):
            raise DefenseError(
                f"detector {self.name} gave scores that are not finite: "
                f"{found.detach().tolist()}; try float32"
            )
        return found.float()


def first_logprobs(traffic: Traffic, *, compressed: bool = True) -> Tensor:
    """Log-probabilities of the first token of an answer, ``[B, vocabulary]``, live.

    Args:
        traffic: what is asked.
        compressed: through the compressor, if there is one; else with all visual tokens.
    """
    using = traffic.compressor if compressed else None
    logprobs, _ = traffic.model.passes.answer_logprobs(
        traffic.images,
        traffic.questions,
        ("",) * len(traffic.questions),  # what the answer goes on with does not matter
        using,
        seeds=traffic.draws,
        relax=RELAX if traffic.relax and using is not None else None,
    )
    return logprobs[:, 0]


def stacked(parts: Sequence[Observation]) -> dict[str, Tensor]:
    """Observations of several batches as one; empty for none."""
    names = parts[0] if parts else ()
    return {name: torch.cat([part[name].detach().cpu() for part in parts]) for name in names}


def standardise(values: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """z-scores; a spread below `SPREAD` counts as that."""
    return (values - mean.to(values)) / spread.to(values).clamp_min(SPREAD)
