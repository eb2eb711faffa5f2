"""The view an attack really gets: no wider than it declared, with every pass counted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn, cast

from torch import Tensor

from attacks.errors import AttackError
from targets.base import CALLS, Knowledge, PathMargins, Surrogate, WhiteBoxView, includes
from targets.precision import FULL
from targets.views import DeniedAttributeError, Sealed, denial

_QUERIES = frozenset({"ask", "option_scores"})
_TWICE = frozenset({"path_margins"})
"""Calls that run the language model twice: two passes, and a gradient for each path it enters."""
_FREE = frozenset({"token_mask_to_pixels", "tower_depth", "project", "concepts", "option_passes"})


@dataclass(slots=True)
class Meter:
    """Images passed through views.

    Attributes:
        forwards: through a model, gradients or not; queries aside.
        backwards: gradients taken.
        queries: asked of the deployed target.
    """

    forwards: int = 0
    backwards: int = 0
    queries: int = 0


class MeteredView:
    """Wraps a view: refuses what the attack did not declare and counts images in each direction.

    It has the calls of `targets.base.CALLS` that the declared knowledge grants. A backward pass is
    counted where it really happens, by a hook on the images that enter the view, so an attack that
    calls autograd itself is counted like one that uses `attacks.descent`. Surrogates are metered
    alike. `random` says whether a defence inside the view draws, `precision` in what the
    passes of an attack run.

    Args:
        view: the target's view.
        knowledge: what the attack declared; everything above it raises `KnowledgeError`.
        meter: receives the counts.

    Raises:
        AttackError: the view offers less than the attack needs.
    """

    def __init__(
        self,
        view: Any,  # noqa: ANN401 - any view
        knowledge: Knowledge,
        meter: Meter,
    ) -> None:
        if not includes(view.knowledge, knowledge):
            raise AttackError(
                f"the attack needs a view of knowledge {knowledge.value!r} and was given one of "
                f"{view.knowledge.value!r}; ask the target for target.view({knowledge.value!r}, …)"
            )
        self.knowledge = knowledge
        self.random = bool(getattr(view, "random", False))
        self.precision = str(getattr(view, "precision", FULL))
        # A defence inside the view may look several times at each picture.
        counter = _Counter(meter, getattr(view, "passes_in", _once))
        for name, needed in CALLS.items():
            if includes(knowledge, needed) and hasattr(view, name):
                self.__dict__[name] = Sealed(counter.counted(name, view))
        if knowledge is Knowledge.SURROGATE:
            self.surrogates: tuple[Surrogate, ...] = tuple(map(counter.metered, view.surrogates))

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise DeniedAttributeError(denial(name, self.knowledge))


@dataclass(frozen=True, slots=True)
class _Counter:
    """Counts what goes through the calls of a view.

    Attributes:
        meter: receives the counts.
        looks: passes of a picture in a call of a name with these keywords.
    """

    meter: Meter
    looks: Callable[[str, Mapping[str, Any]], int]

    def counted(self, name: str, view: Any) -> Callable[..., Any]:  # noqa: ANN401 - any view
        """A call of a view that counts its images first."""
        call: Callable[..., Any] = getattr(view, name)
        if name in _FREE:
            return call
        if name in _TWICE:
            return functools.partial(self._both, name, call)

        passes = _Passes(view) if name == "option_logprobs" else None

        def metered(images: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - of any call
            times = 1 if passes is None else passes.of(images, *args, **kwargs)
            times *= self.looks(name, kwargs)
            return call(self._count(name, images, times), *args, **kwargs)

        return metered

    def metered(self, surrogate: Surrogate) -> Surrogate:
        """A surrogate whose calls are counted."""
        view = MeteredView(surrogate.view, surrogate.view.knowledge, self.meter)
        return replace(surrogate, view=cast(WhiteBoxView, view))

    def _count(self, call: str, images: Tensor, passes: int) -> Tensor:
        """Count a pass and hand on an alias whose gradient counts the backward pass."""
        if call in _QUERIES:
            self.meter.queries += len(images)
            return images
        self.meter.forwards += passes * len(images)
        return self._watched(images, passes)

    def _both(
        self,
        name: str,
        call: Callable[..., PathMargins],
        images: Tensor,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> PathMargins:
        """A call that looks at both paths; gradients are counted where they enter each of them."""
        looks = self.looks(name, kwargs)
        self.meter.forwards += 2 * looks * len(images)
        found = call(images, *args, **kwargs)
        return PathMargins(self._watched(found.full, looks), self._watched(found.compressed, looks))

    def _watched(self, values: Tensor, passes: int) -> Tensor:
        """An alias whose gradient, ``[B, …]``, counts so many backward passes of B images."""
        if not values.requires_grad:
            return values
        alias = values.view_as(values)  # a hook on `values` itself would fire for every pass
        hook = functools.partial(self._count_backward, passes)
        alias.register_hook(hook)  # type: ignore[no-untyped-call]
        return alias

    def _count_backward(self, passes: int, gradient: Tensor) -> None:
        self.meter.backwards += passes * len(gradient)


def _once(name: str, given: Mapping[str, Any]) -> int:
    """Passes in a call of a view without a defence in it."""
    del name, given
    return 1


class _Passes:
    """How many passes a view's `option_logprobs` takes; remembered, since every step asks it."""

    def __init__(self, view: Any) -> None:  # noqa: ANN401 - any view
        self._ask = view.option_passes
        self._known: dict[tuple[object, ...], int] = {}

    def of(
        self,
        images: Tensor,
        questions: tuple[str, ...],
        options: tuple[tuple[str, ...], ...],
        *,
        path: str = "full",
        straight_through: bool = False,
    ) -> int:
        """The number for these arguments of `option_logprobs`."""
        del straight_through
        key = (tuple(images.shape), questions, options, path)
        if key not in self._known:
            self._known[key] = self._ask(images.detach(), questions, options, path=path)
        return self._known[key]
