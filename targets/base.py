"""The words every part of redteam shares: samples in a batch, knowledge, and the views of a target.

Shape letters, here and everywhere: ``B`` batch, ``C H W`` image, ``V`` visual tokens, ``K`` kept
tokens, ``T`` text tokens, ``A`` answer tokens, ``N`` heads, ``E`` width of one head, ``D`` width.
Images are float32 RGB in [0, 1], ``[B, 3, H, W]``, unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    Literal,
    NoReturn,
    Protocol,
    TypeVar,
    runtime_checkable,
)

from targets.errors import KnowledgeError

if TYPE_CHECKING:
    from torch import Tensor

    from targets.compression.base import Compressor

Path = Literal["full", "compressed"]
_Value = TypeVar("_Value")


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
    SCORES = "scores"
    """Also how likely the deployed target finds each answer option, counted; no gradients."""


CALLS: Final = {
    "token_mask_to_pixels": Knowledge.NONE,
    "tower_depth": Knowledge.ENCODER,
    "encode": Knowledge.ENCODER,
    "layers": Knowledge.ENCODER,
    "values": Knowledge.ENCODER,
    "rank": Knowledge.COMPRESSED,
    "answer_nll": Knowledge.WHITE_BOX,
    "answer_logprobs": Knowledge.WHITE_BOX,
    "full_and_rank": Knowledge.WHITE_BOX,
    "path_margins": Knowledge.WHITE_BOX,
    "option_logprobs": Knowledge.WHITE_BOX,
    "option_passes": Knowledge.WHITE_BOX,
    "project": Knowledge.WHITE_BOX,
    "concepts": Knowledge.WHITE_BOX,
    "continuation": Knowledge.WHITE_BOX,
    "generation": Knowledge.WHITE_BOX,
    "ask": Knowledge.QUERY,
    "option_scores": Knowledge.SCORES,
}
"""Every call a view of the target can have, and the least knowledge that grants it."""

_GRANTED: Final = {
    Knowledge.NONE: (Knowledge.NONE,),
    Knowledge.ENCODER: (Knowledge.NONE, Knowledge.ENCODER),
    Knowledge.COMPRESSED: (Knowledge.NONE, Knowledge.ENCODER, Knowledge.COMPRESSED),
    Knowledge.QUERY: (Knowledge.NONE, Knowledge.QUERY),
    Knowledge.SCORES: (Knowledge.NONE, Knowledge.QUERY, Knowledge.SCORES),
    Knowledge.WHITE_BOX: tuple(one for one in Knowledge if one is not Knowledge.SURROGATE),
    Knowledge.SURROGATE: (Knowledge.SURROGATE,),
}


TOLD: Final = {
    "questions": (Knowledge.COMPRESSED, Knowledge.SURROGATE, Knowledge.QUERY),
    "answers": (Knowledge.WHITE_BOX, Knowledge.SURROGATE, Knowledge.QUERY),
    "options": (Knowledge.WHITE_BOX, Knowledge.SURROGATE, Knowledge.QUERY),
    "judges": (Knowledge.WHITE_BOX, Knowledge.SURROGATE, Knowledge.QUERY),
}
"""What is said of a sample besides its picture, and the least knowledge with which it is told."""


def includes(view: Knowledge, need: Knowledge) -> bool:
    """Whether a view of one knowledge offers all that another needs."""
    return need in _GRANTED[view]


class Withheld(tuple[Any, ...]):
    """Something of each sample that the attacker does not know: a length, and nothing to see.

    Args:
        count: of samples.
        message: of the `KnowledgeError` that looking at one raises.
    """

    message: str

    def __new__(cls, count: int, message: str) -> Withheld:
        """Nothing, `count` times."""
        found = super().__new__(cls, (None,) * count)
        found.message = message
        return found

    def __getitem__(self, index: object) -> NoReturn:
        raise KnowledgeError(self.message)

    def __iter__(self) -> NoReturn:
        raise KnowledgeError(self.message)

    def __contains__(self, value: object) -> NoReturn:
        raise KnowledgeError(self.message)


class Penalty(Protocol):
    """A term of an attack's loss that is not its own: how much else an image gives away, live."""

    def __call__(self, images: Tensor) -> Tensor:
        """``[B]`` of images ``[B, 3, H, W]``, ≥ 0."""
        ...

    def rows(self, indices: Sequence[int]) -> Penalty:
        """Of some of the samples."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples an attack works on together. All tuples have length B.

    Attributes:
        ids: sample ids, unique in a run.
        images: clean images, float32 ``[B, 3, H, W]`` in [0, 1], exact multiples of 1/255.
        questions: the user's text for each image, without any chat template.
        answers: the correct answer of each sample, as the model would spell it.
        options: the closed set of answers to each question, the correct one included; an empty
            tuple for an open question. None: all are open.
        judges: whether a text is a right answer, one for each sample. None: a text is right if it
            is the correct answer but for case and surrounding space.
        penalty: added to the loss an attack descends on; None adds nothing.
    """

    ids: tuple[str, ...]
    images: Tensor
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    options: tuple[tuple[str, ...], ...] | None = None
    judges: tuple[Callable[[str], bool], ...] | None = None
    penalty: Penalty | None = None

    def right(self, texts: Sequence[str]) -> list[bool]:
        """Whether each of B answers is right."""
        if self.judges is not None:
            return [judge(text) for judge, text in zip(self.judges, texts, strict=True)]
        pairs = zip(texts, self.answers, strict=True)
        return [text.strip().lower() == answer.strip().lower() for text, answer in pairs]

    def rows(self, indices: Sequence[int]) -> Batch:
        """Some of the samples, in this order."""
        options, judges = self.options, self.judges
        return Batch(
            ids=_rows(self.ids, indices),
            images=self.images[list(indices)],
            questions=_rows(self.questions, indices),
            answers=_rows(self.answers, indices),
            options=None if options is None else _rows(options, indices),
            judges=None if judges is None else _rows(judges, indices),
            penalty=None if self.penalty is None else self.penalty.rows(indices),
        )


def _rows(values: tuple[_Value, ...], indices: Sequence[int]) -> tuple[_Value, ...]:
    if isinstance(values, Withheld):
        return Withheld(len(indices), values.message)
    return tuple(values[index] for index in indices)


@dataclass(frozen=True, slots=True)
class Ranking:
    """How a compressor ranks the visual tokens of a batch; every tensor is live (never detached).

    Attributes:
        score: ``[B, V]``, larger is more important; the compressor's own scale.
        log_score: ``[B, V]``, ``log(score + 1e-12)`` for scores that are probabilities (attention),
            else the standardised score, or its standardised logarithm where tokens are chosen one
            after another by distances or gains; what ranking losses should use.
        query: ``[B, N, E]`` the query whose attention makes the score (last prompt token, or CLS),
            after rotary embedding; None when the score is not attention.
        keys: ``[B, N, V, E]`` keys of the visual tokens at the scoring layer, after rotary
            embedding; None when the score is not attention.
        features: ``[B, V, D]`` what the visual tokens carry into the language model at the ranking
            point (projector output, or hidden state at the scoring layer).
        kept: bool ``[B, V]``, the hard selection.
        soft_count: ``[B]`` differentiable relaxation of how many tokens are kept; None where that
            does not depend on the picture.
    """

    score: Tensor
    log_score: Tensor
    query: Tensor | None
    keys: Tensor | None
    features: Tensor
    kept: Tensor
    soft_count: Tensor | None = None


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


@dataclass(frozen=True, slots=True)
class TowerLayer:
    """What one layer of a vision tower shows of the visual tokens, live; no CLS.

    Attributes:
        hidden: ``[B, V, D]`` output of the layer, mean over the patches of a token.
        score: ``[B, V]`` head-mean attention of CLS to the tokens in this layer; mean attention
            received where the tower has no CLS.
    """

    hidden: Tensor
    score: Tensor


@dataclass(frozen=True, slots=True)
class Continuation:
    """Tokens a model said after B prompts; detached.

    Attributes:
        ids: long ``[B, A]``, padded at the right.
        real: bool ``[B, A]``, False for padding; the end token, where it came, is real, and what
            follows a placeholder for pictures is not.
    """

    ids: Tensor
    real: Tensor


@dataclass(frozen=True, slots=True)
class PathMargins:
    """How firmly a model gives certain answers with all visual tokens and compressed; live.

    A margin is the log-probability of an answer's token minus that of the likeliest other token, of
    the answer's tokens (end token included) the smallest. Above 0, greedy decoding gives exactly
    this answer.

    Attributes:
        full: ``[B]``, with all visual tokens.
        compressed: ``[B]``, through the compressor.
    """

    full: Tensor
    compressed: Tensor


@dataclass(frozen=True, slots=True)
class Generation:
    """The model's state at each token of a `Continuation`; live.

    Attributes:
        logprobs: ``[B, A, vocabulary]`` of the token said there, given all before it.
        end: ``[B, A]`` log-probability that the answer ends there instead.
        hidden: ``[B, A, D]`` last hidden state, from which `logprobs` is made.
        real: bool ``[B, A]``, see `Continuation`.
    """

    logprobs: Tensor
    end: Tensor
    hidden: Tensor
    real: Tensor


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

    def tower_depth(self) -> int:
        """How many layers the vision tower has."""
        ...

    def encode(self, images: Tensor) -> VisionOutput:
        """Run the vision tower on ``[B, 3, H, W]`` images in [0, 1]."""
        ...

    def layers(
        self, images: Tensor, numbers: Sequence[int], *, normalised: bool = False
    ) -> tuple[TowerLayer, ...]:
        """Layers of the vision tower, from one pass that ends behind the deepest of them.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].
            numbers: layers of the tower counted as in a list: 0 the first, −1 the last.
            normalised: apply the tower's final normalisation to `hidden`, where it has one.
        """
        ...

    def values(
        self,
        images: Tensor,
        numbers: Sequence[int],
        *,
        normalised: bool = False,
        smoothing: int = 0,
        keys: int = -1,
    ) -> tuple[Tensor, ...]:
        """Value features of layers of the vision tower, ``[B, V, r · D]`` each, from one pass.

        They are attention's values behind its output projection: what a token gives when it is
        attended to alone. Those of the r patches of a token stand one after the other, as features
        do on their way into the projector.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].
            numbers: layers counted as in `layers`.
            normalised: apply the tower's final normalisation, where it has one.
            smoothing: how often every head replaces its values by their mean, weighted with
                ``softmax(k kᵀ)``, before they are projected.
            keys: the layer whose keys k are.

        Raises:
            TargetError: for a family that does not say where its tower makes values.
        """
        ...


@runtime_checkable
class CompressedView(EncoderView, Protocol):
    """Knowledge.COMPRESSED: also the compressor and what it ranks with."""

    def rank(
        self, images: Tensor, questions: tuple[str, ...], *, under: Compressor | None = None
    ) -> Ranking:
        """Rank the visual tokens; runs no module past the ranking point.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].
            questions: B prompts.
            under: a compressor the attacker imagines; None is the one in use, if it is known.
        """
        ...


@runtime_checkable
class WhiteBoxView(CompressedView, Protocol):
    """Knowledge.WHITE_BOX: the whole model.

    `rank` and the compressed path need a compressor: the one in use where it is known, or one the
    attacker imagines (`under`). Also has what `ScoreView` has.
    """

    def answer_nll(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        answers: tuple[str, ...],
        *,
        path: Path = "full",
        straight_through: bool = False,
        under: Compressor | None = None,
    ) -> Tensor:
        """Mean negative log-likelihood of the answer's tokens, ``[B]``; end token included.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].
            questions: B prompts.
            answers: B answers, teacher-forced.
            path: with all visual tokens, or through the compressor.
            straight_through: on the compressed path, forward the hard selection but let gradient
                reach the scores through a sigmoid relaxation of the top-k.
            under: a compressor the attacker imagines on the compressed path.
        """
        ...

    def answer_logprobs(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        answers: tuple[str, ...],
        *,
        path: Path = "full",
        under: Compressor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Teacher-forced log-probabilities ``[B, A, vocabulary]``, their bool mask ``[B, A]``."""
        ...

    def full_and_rank(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        answers: tuple[str, ...],
        *,
        under: Compressor | None = None,
    ) -> tuple[Tensor, Tensor, Ranking]:
        """`answer_logprobs` on the full path and `rank`, sharing one forward pass."""
        ...

    def path_margins(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        answers: tuple[str, ...],
        *,
        under: Compressor | None = None,
        full_gradient: bool = True,
    ) -> PathMargins:
        """Margins of the answers on both paths; one vision tower, two passes behind it.

        The compressed path is straight-through, see `answer_nll`.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].
            questions: B prompts.
            answers: B answers, teacher-forced.
            under: a compressor the attacker imagines on the compressed path.
            full_gradient: whether the margin of the full path is live.
        """
        ...

    def option_logprobs(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        options: tuple[tuple[str, ...], ...],
        *,
        path: Path = "full",
        straight_through: bool = False,
    ) -> Tensor:
        """Log-probability of each answer option, live, ``[B, O]``.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].
            questions: B prompts.
            options: of each sample; all samples have the same number O.
            path: with all visual tokens, or through the compressor.
            straight_through: see `answer_nll`.

        Returns:
            Of the first answer token where that tells the options of a sample apart (one pass if
            so for all), else of the whole option, end token included (O passes). A
            single option is taken whole.
        """
        ...

    def option_passes(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        options: tuple[tuple[str, ...], ...],
        *,
        path: Path = "full",
    ) -> int:
        """How many passes `option_logprobs` takes of these arguments; runs no model."""
        ...

    def project(self, features: Tensor) -> Tensor:
        """Token features ``[B, V, r · D]`` through the projector to the width of the LLM."""
        ...

    def concepts(self, texts: Sequence[str]) -> Tensor:
        """Mean of the LLM's input embeddings of each text's tokens, each of unit length first.

        Args:
            texts: n words or phrases, as they stand in an answer.

        Returns:
            Detached, ``[n, D]``.
        """
        ...

    def continuation(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        *,
        length: int,
        path: Path = "full",
        under: Compressor | None = None,
    ) -> Continuation:
        """What the model says by itself, greedily.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].
            questions: B prompts.
            length: most tokens, end token included, ≥ 1.
            path: with all visual tokens, or through the compressor.
            under: a compressor the attacker imagines on the compressed path.
        """
        ...

    def generation(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        said: Continuation,
        *,
        path: Path = "full",
        straight_through: bool = False,
        under: Compressor | None = None,
    ) -> Generation:
        """How the model comes to say something, teacher-forced, live.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].
            questions: B prompts.
            said: a continuation of each, of these or of other images.
            path: with all visual tokens, or through the compressor.
            straight_through: see `answer_nll`.
            under: a compressor the attacker imagines on the compressed path.
        """
        ...

    def ask(
        self, images: Tensor, questions: tuple[str, ...], *, path: Path = "compressed"
    ) -> tuple[str, ...]:
        """B greedy answers; see `QueryView`. A white box may ask either path."""
        ...


@runtime_checkable
class QueryView(Protocol):
    """Knowledge.QUERY: the deployed target as its users have it. Every image asked is counted."""

    knowledge: Knowledge

    def ask(self, images: Tensor, questions: tuple[str, ...]) -> tuple[str, ...]:
        """B greedy text answers of the deployed, compressed target.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1]; rounded to 8 bits on the way, as a file would be.
            questions: B prompts.
        """
        ...


@runtime_checkable
class ScoreView(QueryView, Protocol):
    """Knowledge.SCORES: also how likely the deployed target finds the answer options."""

    def option_scores(
        self, images: Tensor, questions: tuple[str, ...], options: tuple[tuple[str, ...], ...]
    ) -> Tensor:
        """Log-probability of each option, detached, ``[B, O]``; see `WhiteBoxView`."""
        ...


@dataclass(frozen=True, slots=True)
class Surrogate:
    """Another model that the attacker has in full.

    Attributes:
        name: for reports.
        depth: number of layers of its language model.
        image_size: height and width it is made for; any other is resized by its preprocessing.
        view: everything it computes; compressors have to be imagined (`under`).
    """

    name: str
    depth: int
    image_size: tuple[int, int]
    view: WhiteBoxView


@runtime_checkable
class SurrogateView(Protocol):
    """Knowledge.SURROGATE: other models, and nothing of the target."""

    knowledge: Knowledge
    surrogates: tuple[Surrogate, ...]
