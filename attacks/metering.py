"""The view an attack really gets: no wider than it declared, with every pass counted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from attacks.errors import AttackError
from targets.base import CALLS, Knowledge, Surrogate, WhiteBoxView, includes
from targets.errors import KnowledgeError

_QUERIES = frozenset({"ask", "option_scores"})
_TWICE = frozenset({"path_margins"})
"""Calls that run the language model twice, and count as two passes."""
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
        # A defence inside the view may look several times at each picture.
        self._passes: int = getattr(view, "passes", 1)
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
        passes = (2 if call in _TWICE else 1) * self._passes
        self._meter.forwards += passes * len(images)
        if not images.requires_grad:
            return images
        alias = images.view_as(images)  # a hook on `images` itself would fire for every pass
        hook = functools.partial(self._count_backward, passes)
        alias.register_hook(hook)  # type: ignore[no-untyped-call]
        return alias

    def _count_backward(self, passes: int, gradient: Tensor) -> None:
        self._meter.backwards += passes * len(gradient)
