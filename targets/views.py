"""What an attack gets of a target: one class per knowledge, and nothing behind it.

A view holds functions, not the model: weights, processor and everything its threat model denies
cannot be reached through its attributes. Reaching for more raises `KnowledgeError`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NoReturn

from torch import Tensor

from targets.base import ImageView, Knowledge, Path, Ranking, VisionOutput
from targets.compression.base import Compressor
from targets.errors import KnowledgeError
from targets.passes import Passes

_NEEDS: Final = {
    "encode": Knowledge.ENCODER,
    "rank": Knowledge.COMPRESSED,
    "answer_nll": Knowledge.WHITE_BOX,
    "answer_logprobs": Knowledge.WHITE_BOX,
    "full_and_rank": Knowledge.WHITE_BOX,
}

Questions = tuple[str, ...]
Pixels = Callable[[Tensor, tuple[int, int]], Tensor]
Encode = Callable[[Tensor], VisionOutput]
Rank = Callable[[Tensor, Questions], Ranking]
Logprobs = Callable[[Tensor, Questions, Questions, Path], tuple[Tensor, Tensor]]
Nll = Callable[[Tensor, Questions, Questions, Path, bool], Tensor]
FullAndRank = Callable[[Tensor, Questions, Questions], tuple[Tensor, Tensor, Ranking]]


class DeniedAttributeError(KnowledgeError, AttributeError):
    """A name a view does not have; an `AttributeError` too, so that `hasattr` says no."""


class GeometryView:
    """Knowledge.NONE: the image and the token grid. See `targets.base.ImageView`."""

    __slots__ = ("_pixels",)
    knowledge = Knowledge.NONE

    def __init__(self, pixels: Pixels) -> None:
        self._pixels = pixels

    def token_mask_to_pixels(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Pixels covered by tokens: bool ``[B, V]`` → float ``[B, 1, H, W]`` of 0 and 1."""
        return self._pixels(tokens, size)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        needed = _NEEDS.get(name)
        if needed is None:
            raise DeniedAttributeError(
                f"view.{name} is not granted: the attack's knowledge is {self.knowledge.value!r}, "
                "and no knowledge grants it"
            )
        raise DeniedAttributeError(
            f"view.{name} needs knowledge {needed.value!r}; the attack's is "
            f"{self.knowledge.value!r}. An attack that needs more has to declare it, and the "
            "report will say so"
        )


class VisionView(GeometryView):
    """Knowledge.ENCODER: also the vision tower. See `targets.base.EncoderView`."""

    __slots__ = ("_encode",)
    knowledge = Knowledge.ENCODER

    def __init__(self, pixels: Pixels, encode: Encode) -> None:
        super().__init__(pixels)
        self._encode = encode

    def encode(self, images: Tensor) -> VisionOutput:
        """Run the vision tower on ``[B, 3, H, W]`` images in [0, 1]."""
        return self._encode(images)


class RankingView(VisionView):
    """Knowledge.COMPRESSED: also the compressor's ranking. See `targets.base.CompressedView`."""

    __slots__ = ("_rank",)
    knowledge = Knowledge.COMPRESSED

    def __init__(self, pixels: Pixels, encode: Encode, rank: Rank) -> None:
        super().__init__(pixels, encode)
        self._rank = rank

    def rank(self, images: Tensor, questions: tuple[str, ...]) -> Ranking:
        """Rank the visual tokens; runs no module past the ranking point."""
        return self._rank(images, questions)


class FullView(RankingView):
    """Knowledge.WHITE_BOX: everything. See `targets.base.WhiteBoxView`."""

    __slots__ = ("_both", "_logprobs", "_nll")
    knowledge = Knowledge.WHITE_BOX

    def __init__(
        self,
        pixels: Pixels,
        encode: Encode,
        rank: Rank,
        logprobs: Logprobs,
        nll: Nll,
        both: FullAndRank,
    ) -> None:
        super().__init__(pixels, encode, rank)
        self._logprobs, self._nll, self._both = logprobs, nll, both

    def answer_nll(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        answers: tuple[str, ...],
        *,
        path: Path = "full",
        straight_through: bool = False,
    ) -> Tensor:
        """Mean negative log-likelihood of the answer's tokens (end token included), ``[B]``.

        With `straight_through` the compressed path runs hard; backward, a kept token's attention
        column carries the gradient of ``log sigmoid((s − θ) / 1)``, with s its log-score and θ the
        live midpoint between the last kept and the first dropped score. Dropped tokens are really
        gone, so they get gradient through θ only.
        """
        return self._nll(images, questions, answers, path, straight_through)

    def answer_logprobs(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        answers: tuple[str, ...],
        *,
        path: Path = "full",
    ) -> tuple[Tensor, Tensor]:
        """Teacher-forced log-probabilities ``[B, A, vocabulary]`` and their mask ``[B, A]``."""
        return self._logprobs(images, questions, answers, path)

    def full_and_rank(
        self, images: Tensor, questions: tuple[str, ...], answers: tuple[str, ...]
    ) -> tuple[Tensor, Tensor, Ranking]:
        """`answer_logprobs` on the full path and `rank`, sharing one forward pass."""
        return self._both(images, questions, answers)


def make_view(passes: Passes, knowledge: Knowledge, compressor: Compressor | None) -> ImageView:
    """The view for a knowledge; see `targets.lvlm.LVLM.view`."""

    def pixels(tokens: Tensor, size: tuple[int, int]) -> Tensor:
        return passes.layout(size).pixels(tokens.float(), size)

    def encode(images: Tensor) -> VisionOutput:
        return passes.encode(images)

    def known(what: str) -> Compressor:
        if compressor is None:
            raise KnowledgeError(
                f"{what} needs to know the compressor, and this view was given without one: the "
                "attack says that it does not know the compression"
            )
        return compressor

    def rank(images: Tensor, questions: Questions) -> Ranking:
        return passes.rank(images, questions, known("view.rank"))

    if knowledge is Knowledge.NONE:
        return GeometryView(pixels)
    if knowledge is Knowledge.ENCODER:
        return VisionView(pixels, encode)
    if knowledge is Knowledge.COMPRESSED:
        known("knowledge 'compressed'")
        return RankingView(pixels, encode, rank)
    if knowledge is not Knowledge.WHITE_BOX:
        raise KnowledgeError(
            f"knowledge {knowledge.value!r} grants no view of the target itself; views exist for "
            "none, encoder, compressed and white_box"
        )

    def on(path: Path, what: str) -> Compressor | None:
        if path not in ("full", "compressed"):
            raise KnowledgeError(f"path is {path!r}; it is 'full' or 'compressed'")
        return known(f"{what} on the compressed path") if path == "compressed" else None

    def logprobs(
        images: Tensor, questions: Questions, answers: Questions, path: Path
    ) -> tuple[Tensor, Tensor]:
        found, talk = passes.answer_logprobs(
            images, questions, answers, on(path, "view.answer_logprobs")
        )
        return found, talk.real

    def nll(
        images: Tensor, questions: Questions, answers: Questions, path: Path, soft: bool
    ) -> Tensor:
        using = on(path, "view.answer_nll")
        return passes.nll(images, questions, answers, using, straight_through=soft)

    def both(
        images: Tensor, questions: Questions, answers: Questions
    ) -> tuple[Tensor, Tensor, Ranking]:
        using = known("view.full_and_rank")
        found, talk, ranking = passes.full_and_rank(images, questions, answers, using)
        return found, talk.real, ranking

    return FullView(pixels, encode, rank, logprobs, nll, both)
