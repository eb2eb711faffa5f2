"""The view an attack really gets: no wider than it declared, with every pass counted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from attacks.errors import AttackError
from targets.base import CALLS, Knowledge, PathMargins, Surrogate, WhiteBoxView, includes
from targets.errors import KnowledgeError

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
        self._view = view
        self._meter = meter
        if knowledge is Knowledge.SURROGATE:
            self.surrogates: tuple[Surrogate, ...] = tuple(map(self._metered, view.surrogates))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in CALLS:
            # Names no knowledge grants are refused by the view itself, in its own words.
            found: Callable[..., Any] = getattr(self._view, name)
            return found
        needed = CALLS[name]
        if not includes(self.knowledge, needed):
            raise KnowledgeError(
                f"view.{name} needs knowledge {needed.value!r}; this attack declared "
                f"{self.knowledge.value!r}. Declare more, and the report will say so."
            )
        call: Callable[..., Any] = getattr(self._view, name)
        if name in _FREE:
            return call

        if name in _TWICE:
            return functools.partial(self._both, call)

        @functools.wraps(call)
        def metered(images: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            return call(self._count(name, images), *args, **kwargs)

        return metered

    def _metered(self, surrogate: Surrogate) -> Surrogate:
        view = MeteredView(surrogate.view, surrogate.view.knowledge, self._meter)
        return replace(surrogate, view=cast(WhiteBoxView, view))

    def _count(self, call: str, images: Tensor) -> Tensor:
        """Count a pass and hand on an alias whose gradient counts the backward pass."""
        if call in _QUERIES:
            self._meter.queries += len(images)
            return images
        self._meter.forwards += len(images)
        return self._watched(images)

    def _both(
        self,
        call: Callable[..., PathMargins],
        images: Tensor,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> PathMargins:
        """A call that looks at both paths; gradients are counted where they enter each of them."""
        self._meter.forwards += 2 * len(images)
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
        self._meter.backwards += len(gradient)
