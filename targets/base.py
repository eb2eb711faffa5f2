"""The words every part of redteam shares: samples in a batch, knowledge, and the views of a target.

Shape letters, here and everywhere: ``B`` batch, ``C H W`` image, ``V`` visual tokens, ``K`` kept
tokens, ``T`` text tokens, ``A`` answer tokens, ``N`` heads, ``E`` width of one head, ``D`` width.
Images are float32 RGB in [0, 1], ``[B, 3, H, W]``, unless a name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

Path = Literal["full", "compressed"]


class Knowledge(StrEnum):
    """What an attacker may know; an attack declares one and receives only the matching view."""

    NONE = "none"
    """The image alone: its size and the token grid. Random noise lives here."""
    ENCODER = "encoder"
    """Weights and gradients of the vision tower; no text, no LLM, no compressor."""
    COMPRESSED = "compressed"
    """Encoder, compressor, and the LLM up to where the compressor ranks; no answers."""
    WHITE_BOX = "white_box"
    """Everything, answers and gradients through the whole model included."""
    SURROGATE = "surrogate"
    """Other models only; nothing of the target."""
    QUERY = "query"
    """Text answers of the deployed target to images, counted."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples an attack works on together. All tuples have length B.

    Attributes:
        ids: sample ids, unique in a run.
        images: clean images, float32 ``[B, 3, H, W]`` in [0, 1], exact multiples of 1/255.
        questions: the user's text for each image, without any chat template.
        answers: the correct answer of each sample, as the model would spell it.
    """

    ids: tuple[str, ...]
    images: Tensor
    questions: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ranking:
    """How a compressor ranks the visual tokens of a batch; every tensor is live (never detached).

    Attributes:
        score: ``[B, V]``, larger is more important; the compressor's own scale.
        log_score: ``[B, V]``, ``log(score + 1e-12)`` for scores that are probabilities (attention),
            else the standardised score; what ranking losses should use.
        query: ``[B, N, E]`` the query whose attention makes the score (last prompt token, or CLS),
            after rotary embedding; None when the score is not attention.
        keys: ``[B, N, V, E]`` keys of the visual tokens at the scoring layer, after rotary
            embedding; None when the score is not attention.
        features: ``[B, V, D]`` what the visual tokens carry into the language model at the ranking
            point (projector output, or hidden state at the scoring layer).
        kept: bool ``[B, V]``, the hard selection.
    """

    score: Tensor
    log_score: Tensor
    query: Tensor | None
    keys: Tensor | None
    features: Tensor
    kept: Tensor


@dataclass(frozen=True, slots=True)
class VisionOutput:
    """What a vision tower gives, all live.

    Attributes:
        features: ``[B, V, D]`` patch features that enter the projector (no CLS).
        score: ``[B, V]`` head-mean attention of CLS to the patches at the feature layer; mean
            attention received where the tower has no CLS.
    """

    features: Tensor
    score: Tensor


@runtime_checkable
class ImageView(Protocol):
    """Knowledge.NONE: geometry only."""

    knowledge: Knowledge

    def token_mask_to_pixels(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Pixels covered by tokens: bool ``[B, V]`` → float ``[B, 1, H, W]`` of 0 and 1."""
        ...


@runtime_checkable
class EncoderView(ImageView, Protocol):
    """Knowledge.ENCODER: the vision tower with gradients."""

    def encode(self, images: Tensor) -> VisionOutput:
        """Run the vision tower on ``[B, 3, H, W]`` images in [0, 1]."""
        ...


@runtime_checkable
class CompressedView(EncoderView, Protocol):
    """Knowledge.COMPRESSED: also the compressor and what it ranks with."""

    def rank(self, images: Tensor, questions: tuple[str, ...]) -> Ranking:
        """Rank the visual tokens; runs no module past the ranking point."""
        ...


@runtime_checkable
class WhiteBoxView(CompressedView, Protocol):
    """Knowledge.WHITE_BOX: the whole model; `rank` and the compressed path need a compressor."""

    def answer_nll(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        answers: tuple[str, ...],
        *,
        path: Path = "full",
        straight_through: bool = False,
    ) -> Tensor:
        """Mean negative log-likelihood of the answer's tokens, ``[B]``; end token included.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].
            questions: B prompts.
            answers: B answers, teacher-forced.
            path: with all visual tokens, or through the compressor.
            straight_through: on the compressed path, forward the hard selection but let gradient
                reach the scores through a sigmoid relaxation of the top-k.
        """
        ...

    def answer_logprobs(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        answers: tuple[str, ...],
        *,
        path: Path = "full",
    ) -> tuple[Tensor, Tensor]:
        """Teacher-forced log-probabilities ``[B, A, vocabulary]``, their bool mask ``[B, A]``."""
        ...

    def full_and_rank(
        self, images: Tensor, questions: tuple[str, ...], answers: tuple[str, ...]
    ) -> tuple[Tensor, Tensor, Ranking]:
        """`answer_logprobs` on the full path and `rank`, sharing one forward pass."""
        ...
