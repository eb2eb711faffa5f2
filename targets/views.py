"""What an attack gets of a target: the calls its knowledge grants, and nothing behind them.

A view holds functions, not the model: weights, processor and everything its threat model denies
cannot be reached through its attributes. Reaching for more raises `KnowledgeError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from targets.base import (
    CALLS,
    Continuation,
    Generation,
    ImageView,
    Knowledge,
    Path,
    PathMargins,
    Ranking,
    Surrogate,
    TowerLayer,
    VisionOutput,
    includes,
)
from targets.compression.base import Compressor
from targets.decoding.base import Decoding
from targets.errors import KnowledgeError
from targets.passes import Passes

Questions = tuple[str, ...]
Ask = Callable[[Tensor, Questions, bool], tuple[str, ...]]
"""Greedy answers to images, with or without the compressor."""


class DeniedAttributeError(KnowledgeError, AttributeError):
    """A name a view does not have; an `AttributeError` too, so that `hasattr` says no."""


class View:
    """Some of the calls of `targets.base.CALLS`; see the protocols there.

    Args:
        knowledge: of the attacker.
        calls: by name; those the knowledge does not grant are left out.
    """

    def __init__(self, knowledge: Knowledge, calls: Mapping[str, Callable[..., Any]]) -> None:
        self.knowledge = knowledge
        for name, call in calls.items():
            if includes(knowledge, CALLS[name]):
                self.__dict__[name] = Sealed(call)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise DeniedAttributeError(denial(name, self.knowledge))


class Sealed:
    """A call that shows nothing of what is behind it.

    A bound method has ``__self__``, a function ``__closure__`` and a wrapper ``__wrapped__``; all
    of them lead to the model. Against reflection on purpose, or `gc`, no code in the same process
    is safe; this is against reaching further by attributes.

    Args:
        call: what is called.
    """

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - of any call
        """What the call gives."""
        call: Callable[..., Any] = object.__getattribute__(self, "_call")
        return call(*args, **kwargs)

    def __getattribute__(self, name: str) -> Any:  # noqa: ANN401 - of any name
        if name in _OF_ANY_OBJECT:
            return object.__getattribute__(self, name)
        raise DeniedAttributeError(f"{name} of a call of a view is not granted: it can be called")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise DeniedAttributeError(f"{name} of a call of a view cannot be set: it can be called")


_OF_ANY_OBJECT = frozenset({"__class__", "__doc__", "__module__"})


class OtherModels:
    """Knowledge.SURROGATE: see `targets.base.SurrogateView`.

    Args:
        surrogates: the attacker's models, at least one.
    """

    knowledge = Knowledge.SURROGATE

    def __init__(self, surrogates: Sequence[Surrogate]) -> None:
        if not surrogates:
            raise KnowledgeError("an attacker who works on surrogates needs at least one")
        self.surrogates = tuple(surrogates)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise DeniedAttributeError(denial(name, self.knowledge))


def denial(name: str, knowledge: Knowledge) -> str:
    """Why a view of this knowledge has no call of this name."""
    needed = CALLS.get(name)
    if needed is None:
        return (
            f"view.{name} is not granted: the attack's knowledge is {knowledge.value!r}, and no "
            "knowledge grants it, not even 'white_box'"
        )
    return (
        f"view.{name} needs knowledge {needed.value!r}; the attack's is {knowledge.value!r}. An "
        "attack that needs more has to declare it, and the report will say so"
    )


def make_view(
    passes: Passes,
    knowledge: Knowledge,
    compressor: Compressor | None,
    ask: Ask,
    decoding: Decoding | None = None,
    draw: int = 0,
) -> ImageView:
    """The view for a knowledge; see `targets.lvlm.LVLM.view`."""
    if knowledge is Knowledge.SURROGATE:
        raise KnowledgeError(
            "knowledge 'surrogate' grants no view of the target itself; give other models' views "
            "to targets.views.OtherModels"
        )
    calls = _Calls(passes, knowledge, compressor, ask, decoding, draw)
    if knowledge in (Knowledge.COMPRESSED, Knowledge.QUERY, Knowledge.SCORES):
        calls.known(f"knowledge {knowledge.value!r}")
    granted = {name: getattr(calls, name) for name in CALLS}
    return cast(ImageView, View(knowledge, granted))


class _Calls:
    """Every call of `targets.base.CALLS` on one target."""

    def __init__(
        self,
        passes: Passes,
        knowledge: Knowledge,
        compressor: Compressor | None,
        ask: Ask,
        decoding: Decoding | None,
        draw: int,
    ) -> None:
        self._passes, self._knowledge = passes, knowledge
        self._compressor, self._ask = compressor, ask
        self._decoding, self._draw = decoding, draw

    def decoded(self, images: Tensor) -> dict[str, Any]:
        """How answers are scored: by the method they are decoded by, if it is not the model's."""
        if self._decoding is None:
            return {}
        return {"decoding": self._decoding, "draws": (self._draw,) * len(images)}

    def known(self, what: str, under: Compressor | None = None) -> Compressor:
        """The compressor imagined, or the one in use."""
        found = self._compressor if under is None else under
        if found is None:
            raise KnowledgeError(
                f"{what} needs to know the compressor, and this view was given without one: the "
                "attack says that it does not know the compression"
            )
        return found

    def on(self, path: Path, what: str, under: Compressor | None = None) -> Compressor | None:
        """The compressor of a path."""
        if path not in ("full", "compressed"):
            raise KnowledgeError(f"path is {path!r}; it is 'full' or 'compressed'")
        return self.known(f"{what} on the compressed path", under) if path == "compressed" else None

    def token_mask_to_pixels(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        return self._passes.layout(size).pixels(tokens.float(), size)

    def tower_depth(self) -> int:
        return self._passes.family.tower_depth

    def encode(self, images: Tensor) -> VisionOutput:
        return self._passes.encode(images)

    def layers(
        self, images: Tensor, numbers: Sequence[int], *, normalised: bool = False
    ) -> tuple[TowerLayer, ...]:
        return self._passes.tower_layers(images, numbers, normalised=normalised)

    def values(
        self,
        images: Tensor,
        numbers: Sequence[int],
        *,
        normalised: bool = False,
        smoothing: int = 0,
        keys: int = -1,
    ) -> tuple[Tensor, ...]:
        return self._passes.tower_values(
            images, numbers, normalised=normalised, smoothing=smoothing, keys=keys
        )

    def project(self, features: Tensor) -> Tensor:
        return self._passes.project(features)

    def concepts(self, texts: Sequence[str]) -> Tensor:
        return self._passes.concepts(texts)

    def continuation(
        self,
        images: Tensor,
        questions: Questions,
        *,
        length: int,
        path: Path = "full",
        under: Compressor | None = None,
    ) -> Continuation:
        using = self.on(path, "view.continuation", under)
        return self._passes.continuation(images, questions, length, using, **self.decoded(images))

    def generation(
        self,
        images: Tensor,
        questions: Questions,
        said: Continuation,
        *,
        path: Path = "full",
        straight_through: bool = False,
        under: Compressor | None = None,
    ) -> Generation:
        if self._decoding is not None:
            raise KnowledgeError(
                "view.generation shows the model's own distributions and hidden states; under "
                f"decoding method {self._decoding.name!r} answers are scored by view.answer_nll"
            )
        using = self.on(path, "view.generation", under)
        return self._passes.generation(
            images, questions, said, using, straight_through=straight_through
        )

    def rank(
        self, images: Tensor, questions: Questions, *, under: Compressor | None = None
    ) -> Ranking:
        return self._passes.rank(images, questions, self.known("view.rank", under))

    def answer_nll(
        self,
        images: Tensor,
        questions: Questions,
        answers: Questions,
        *,
        path: Path = "full",
        straight_through: bool = False,
        under: Compressor | None = None,
    ) -> Tensor:
        # With `straight_through` the compressed path runs hard; backward, a kept token's attention
        # column carries the gradient of log sigmoid((s − θ) / 1), with s its log-score and θ the
        # live midpoint between the last kept and the first dropped score. Dropped tokens are really
        # gone, so they get gradient through θ only.
        using = self.on(path, "view.answer_nll", under)
        return self._passes.nll(
            images,
            questions,
            answers,
            using,
            straight_through=straight_through,
            **self.decoded(images),
        )

    def answer_logprobs(
        self,
        images: Tensor,
        questions: Questions,
        answers: Questions,
        *,
        path: Path = "full",
        under: Compressor | None = None,
    ) -> tuple[Tensor, Tensor]:
        using = self.on(path, "view.answer_logprobs", under)
        found, talk = self._passes.answer_logprobs(
            images, questions, answers, using, **self.decoded(images)
        )
        return found, talk.real

    def full_and_rank(
        self,
        images: Tensor,
        questions: Questions,
        answers: Questions,
        *,
        under: Compressor | None = None,
    ) -> tuple[Tensor, Tensor, Ranking]:
        using = self.known("view.full_and_rank", under)
        found, talk, ranking = self._passes.full_and_rank(
            images, questions, answers, using, **self.decoded(images)
        )
        return found, talk.real, ranking

    def path_margins(
        self,
        images: Tensor,
        questions: Questions,
        answers: Questions,
        *,
        under: Compressor | None = None,
        full_gradient: bool = True,
    ) -> PathMargins:
        using = self.known("view.path_margins", under)
        return self._passes.path_margins(
            images,
            questions,
            answers,
            using,
            full_gradient=full_gradient,
            **self.decoded(images),
        )

    def option_logprobs(
        self,
        images: Tensor,
        questions: Questions,
        options: tuple[Questions, ...],
        *,
        path: Path = "full",
        straight_through: bool = False,
    ) -> Tensor:
        using = self.on(path, "view.option_logprobs")
        return self._passes.option_logprobs(
            images,
            questions,
            options,
            using,
            straight_through=straight_through,
            **self.decoded(images),
        )

    def option_passes(
        self,
        images: Tensor,
        questions: Questions,
        options: tuple[Questions, ...],
        *,
        path: Path = "full",
    ) -> int:
        using = self.on(path, "view.option_passes")
        return self._passes.option_passes(images, questions, options, using)

    def ask(
        self, images: Tensor, questions: Questions, *, path: Path = "compressed"
    ) -> tuple[str, ...]:
        if self._knowledge is not Knowledge.WHITE_BOX and path != "compressed":
            raise KnowledgeError(
                f"view.ask on path {path!r} needs knowledge 'white_box'; with "
                f"{self._knowledge.value!r} only the deployed, compressed target answers"
            )
        using = self.on(path, "view.ask")
        return self._ask(_as_file(images), questions, using is not None)

    def option_scores(
        self, images: Tensor, questions: Questions, options: tuple[Questions, ...]
    ) -> Tensor:
        using = self.on("compressed", "view.option_scores")
        with torch.no_grad():
            return self._passes.option_logprobs(
                _as_file(images), questions, options, using, **self.decoded(images)
            )


def _as_file(images: Tensor) -> Tensor:
    """Pictures as they arrive at a service: 8 bits, in [0, 1]."""
    return (images.detach().clamp(0, 1) * 255).round() / 255
