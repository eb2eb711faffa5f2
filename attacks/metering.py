"""The view an attack really gets: no wider than it declared, with every pass counted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn, cast

from torch import Tensor

from attacks.errors import AttackError
from targets.base import CALLS, Knowledge, PathMargins, Surrogate, WhiteBoxView, includes
from targets.views import DeniedAttributeError, Sealed, denial

_QUERIES = frozenset({"ask", "option_scores"})
_TWICE = frozenset({"path_margins"})
"""Calls that run the language model twice: two passes, and a gradient for each path it enters."""
_FREE = frozenset({"token_mask_to_pixels", "tower_depth", "project", "concepts"})


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
    alike.

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
        counter = _Counter(meter)
        for name, needed in CALLS.items():
            if includes(knowledge, needed) and hasattr(view, name):
                self.__dict__[name] = Sealed(counter.counted(name, getattr(view, name)))
        if knowledge is Knowledge.SURROGATE:
            self.surrogates: tuple[Surrogate, ...] = tuple(map(counter.metered, view.surrogates))

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise DeniedAttributeError(denial(name, self.knowledge))


@dataclass(frozen=True, slots=True)
class _Counter:
    """Counts what goes through the calls of a view."""

    meter: Meter

    def counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A call of this name that counts its images first."""
        if name in _FREE:
            return call
        if name in _TWICE:
            return functools.partial(self._both, call)

        def metered(images: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - of any call
            return call(self._count(name, images), *args, **kwargs)

        return metered

    def metered(self, surrogate: Surrogate) -> Surrogate:
        """A surrogate whose calls are counted."""
        view = MeteredView(surrogate.view, surrogate.view.knowledge, self.meter)
        return replace(surrogate, view=cast(WhiteBoxView, view))

    def _count(self, call: str, images: Tensor) -> Tensor:
        """Count a pass and hand on an alias whose gradient counts the backward pass."""
        if call in _QUERIES:
            self.meter.queries += len(images)
            return images
        self.meter.forwards += len(images)
        return self._watched(images)

    def _both(
        self,
        call: Callable[..., PathMargins],
        images: Tensor,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> PathMargins:
        """A call that looks at both paths; gradients are counted where they enter each of them."""
        self.meter.forwards += 2 * len(images)
        found = call(images, *args, **kwargs)
        return PathMargins(self._watched(found.full), self._watched(found.compressed))

    def _watched(self, values: Tensor) -> Tensor:
        """An alias whose gradient, ``[B, …]``, counts a backward pass of B images."""
        if not values.requires_grad:
            return values
        alias = values.view_as(values)  # a hook on `values` itself would fire for every pass
        alias.register_hook(self._count_backward)  # type: ignore[no-untyped-call]
        return alias

    def _count_backward(self, gradient: Tensor) -> None:
        self.meter.backwards += len(gradient)
