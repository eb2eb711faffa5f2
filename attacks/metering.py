"""The view an attack really gets: no wider than it declared, with every pass counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attacks.errors import AttackError
from targets.base import ImageView, Knowledge, Path, Ranking, VisionOutput
from targets.errors import KnowledgeError

_LADDER = (Knowledge.NONE, Knowledge.ENCODER, Knowledge.COMPRESSED, Knowledge.WHITE_BOX)


@dataclass(slots=True)
class Meter:
    """Images passed through a view, forwards and backwards."""

    forwards: int = 0
    backwards: int = 0


def includes(view: Knowledge, need: Knowledge) -> bool:
    """Whether a view of one knowledge offers all that another needs."""
    if view in _LADDER and need in _LADDER:
        return _LADDER.index(view) >= _LADDER.index(need)
    return view == need


class MeteredView:
    """Wraps a view: refuses what the attack did not declare and counts images in each direction.

    A backward pass is counted where it really happens, by a hook on the images that enter the
    view, so an attack that calls autograd itself is counted like one that uses `attacks.descent`.

    Args:
        view: the target's view.
        knowledge: what the attack declared; everything above it raises `KnowledgeError`.
        meter: receives the counts.

    Raises:
        AttackError: the view offers less than the attack needs.
    """

    def __init__(self, view: ImageView, knowledge: Knowledge, meter: Meter) -> None:
        if not includes(view.knowledge, knowledge):
            raise AttackError(
                f"the attack needs a view of knowledge {knowledge.value!r} and was given one of "
                f"{view.knowledge.value!r}; ask the target for target.view({knowledge.value!r}, …)"
            )
        self.knowledge = knowledge
        self._view: Any = view
        self._meter = meter

    def token_mask_to_pixels(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """See `targets.base.ImageView`."""
        result: Tensor = self._view.token_mask_to_pixels(tokens, size)
        return result

    def encode(self, images: Tensor) -> VisionOutput:
        """See `targets.base.EncoderView`."""
        self._require("encode", Knowledge.ENCODER)
        result: VisionOutput = self._view.encode(self._count(images))
        return result

    def rank(self, images: Tensor, questions: tuple[str, ...]) -> Ranking:
        """See `targets.base.CompressedView`."""
        self._require("rank", Knowledge.COMPRESSED)
        result: Ranking = self._view.rank(self._count(images), questions)
        return result

    def answer_nll(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        answers: tuple[str, ...],
        *,
        path: Path = "full",
        straight_through: bool = False,
    ) -> Tensor:
        """See `targets.base.WhiteBoxView`."""
        self._require("answer_nll", Knowledge.WHITE_BOX)
        result: Tensor = self._view.answer_nll(
            self._count(images), questions, answers, path=path, straight_through=straight_through
        )
        return result

    def answer_logprobs(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        answers: tuple[str, ...],
        *,
        path: Path = "full",
    ) -> tuple[Tensor, Tensor]:
        """See `targets.base.WhiteBoxView`."""
        self._require("answer_logprobs", Knowledge.WHITE_BOX)
        result: tuple[Tensor, Tensor] = self._view.answer_logprobs(
            self._count(images), questions, answers, path=path
        )
        return result

    def full_and_rank(
        self, images: Tensor, questions: tuple[str, ...], answers: tuple[str, ...]
    ) -> tuple[Tensor, Tensor, Ranking]:
        """See `targets.base.WhiteBoxView`."""
        self._require("full_and_rank", Knowledge.WHITE_BOX)
        result: tuple[Tensor, Tensor, Ranking] = self._view.full_and_rank(
            self._count(images), questions, answers
        )
        return result

    def _require(self, call: str, knowledge: Knowledge) -> None:
        if not includes(self.knowledge, knowledge):
            raise KnowledgeError(
                f"view.{call} needs knowledge {knowledge.value!r}; this attack declared "
                f"{self.knowledge.value!r}. Declare more, and the report will say so."
            )

    def _count(self, images: Tensor) -> Tensor:
        """Count a forward pass and hand on an alias whose gradient counts the backward pass."""
        self._meter.forwards += len(images)
        if not images.requires_grad:
            return images
        alias = images.view_as(images)  # a hook on `images` itself would fire for every pass
        alias.register_hook(self._count_backward)  # type: ignore[no-untyped-call]
        return alias

    def _count_backward(self, gradient: Tensor) -> None:
        self._meter.backwards += len(gradient)
