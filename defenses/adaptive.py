"""What an attack that knows the defence gets: the target's calls with the defence inside them.

It stands in the graph as it stands in the deployment, so an attack needs nothing new to adapt: an
input defence is in front of every call that takes pictures, a selection defence in every
compressor. Where the defence is random each call is the mean over several draws (expectation over
transformation, Athalye et al., arXiv 1707.07397), fresh ones in each call.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor

from defenses.base import Defense, DefenseError, InputDefense
from defenses.selection import SelectionDefense, ViewConsensus, drawn
from targets.base import CALLS, ImageView, Knowledge, Ranking, includes
from targets.compression.base import Compressor
from targets.compression.scoring import top_k_mask
from targets.preprocessing import Layout
from targets.views import View

_PLAIN: Final = frozenset(
    {"token_mask_to_pixels", "tower_depth", "project", "concepts", "option_passes"}
)
"""Calls that look at no pictures."""
_ONCE: Final = frozenset({"ask", "option_scores", "continuation"})
"""Calls that answer as the deployed target does: one draw, and nothing to take a mean of."""
_BY_TOWER: Final = frozenset({"encode", "layers"})
"""Calls that show what the vision tower finds important."""

MakeView = Callable[[Compressor | None], ImageView]


class DefendedView(View):
    """A view of the target with a defence in it; made by `defended`.

    Attributes:
        passes: passes of one picture through a model in each call.
    """

    def __init__(
        self, knowledge: Knowledge, calls: dict[str, Callable[..., Any]], passes: int
    ) -> None:
        super().__init__(knowledge, calls)
        self.passes = passes


def passes_of(defense: Defense, draws: int) -> int:
    """Passes of one picture for each pass of an attack that adapts to a defence.

    Args:
        defense: in the graph.
        draws: of its randomness in each call, ≥ 1; without effect where it has none.
    """
    looks = defense.looks if isinstance(defense, SelectionDefense) else 0
    return (1 + looks) * (draws if defense.draws else 1)


def defended(
    make: MakeView,
    knowledge: Knowledge,
    defense: Defense,
    *,
    compressor: Compressor | None,
    layout: Callable[[tuple[int, int]], Layout],
    draws: int = 20,
) -> ImageView:
    """The view of an attack that knows the defence.

    A sample's values depend on how many calls were made before, never on its neighbours: all rows
    of a call meet the same draws.

    Args:
        make: the target's view with a compressor, or with none.
        knowledge: of the attacker.
        defense: an input or a selection defence that an attack can go through.
        compressor: the one in use; None if the attacker does not know it.
        layout: the visual tokens of a picture of a height and width.
        draws: of the defence's randomness in each call, ≥ 1.

    Raises:
        DefenseError: for a defence of another kind, one without a route, or one that has no meaning
            for the compressor.
    """
    if not defense.verifiable:
        raise DefenseError(f"defence {defense.name} names no route for an adaptive attack")
    through: _Through
    if isinstance(defense, InputDefense):
        through = _Input(make, defense, compressor, draws)
    elif isinstance(defense, SelectionDefense):
        through = _Selection(make, defense, compressor, draws, layout)
    else:
        raise DefenseError(
            f"defence {defense.name} is of kind {defense.kind.value}; an adaptive attack goes "
            "through defences of kinds input and selection"
        )
    calls = {
        name: through.call(name) for name, needed in CALLS.items() if includes(knowledge, needed)
    }
    return cast(ImageView, DefendedView(knowledge, calls, passes_of(defense, draws)))


class _Through(ABC):
    """Calls of a view, each the mean over draws of a defence."""

    def __init__(
        self, make: MakeView, defense: Defense, compressor: Compressor | None, draws: int
    ) -> None:
        self._make, self._compressor = make, compressor
        self._random, self._draws = defense.draws, draws
        self._called = 0

    def call(self, name: str) -> Callable[..., Any]:
        if name in _PLAIN:
            return cast(Callable[..., Any], getattr(self._make(self._compressor), name))

        def through(images: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            self._called += 1
            count = self._draws if self._random and name not in _ONCE else 1
            salts = [drawn("adaptive", self._called, one) for one in range(count)]
            return mean_of([self._once(name, salt, images, *args, **kwargs) for salt in salts])

        return through

    @abstractmethod
    def _once(self, name: str, salt: int, images: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """One call under one draw of the defence."""


class _Input(_Through):
    """Pictures pass through the defence before any call."""

    def __init__(
        self, make: MakeView, defense: InputDefense, compressor: Compressor | None, draws: int
    ) -> None:
        super().__init__(make, defense, compressor, draws)
        self._defense, self._view = defense, make(compressor)

    def _once(self, name: str, salt: int, images: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        shown = self._defense(images, [salt] * len(images))
        return getattr(self._view, name)(shown, *args, **kwargs)


class _Selection(_Through):
    """Every compressor, the one in use or one imagined, is protected."""

    def __init__(
        self,
        make: MakeView,
        defense: SelectionDefense,
        compressor: Compressor | None,
        draws: int,
        layout: Callable[[tuple[int, int]], Layout],
    ) -> None:
        super().__init__(make, defense, compressor, draws)
        self._defense, self._layout = defense, layout
        self._protected(compressor, 0)  # what does not go together is refused here

    def _protected(self, compressor: Compressor | None, salt: int) -> Compressor | None:
        return None if compressor is None else self._defense.protect(compressor, salt)

    def _once(self, name: str, salt: int, images: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        view = self._make(self._protected(self._compressor, salt))
        if kwargs.get("under") is not None:
            kwargs = {**kwargs, "under": self._protected(kwargs["under"], salt)}
        if name in _BY_TOWER and isinstance(self._defense, ViewConsensus):
            return self._consensus(getattr(view, name), salt, images, *args, **kwargs)
        return getattr(view, name)(images, *args, **kwargs)

    def _consensus(
        self,
        call: Callable[..., Any],
        salt: int,
        images: Tensor,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """What the tower finds important over the defence's views; features of the picture itself.

        The scores are reduced as they are, not by ranks, so that every attack on scores can use
        them. [inferred]
        """
        defense = cast(ViewConsensus, self._defense)
        layout = self._layout((images.shape[-2], images.shape[-1]))
        generators = [torch.Generator().manual_seed(salt) for _ in images]
        views = defense.look_again(images, layout, generators)
        found = call(torch.cat([images, *(view.images for view in views)]), *args, **kwargs)
        count = len(images)

        def reduced(output: Any) -> Any:  # noqa: ANN401 - TowerLayer or VisionOutput
            own, *others = output.score.chunk(1 + len(views))
            aligned = [view.align(one) for view, one in zip(views, others, strict=True)]
            rest = {
                one.name: getattr(output, one.name)[:count] for one in dataclasses.fields(output)
            }
            score = defense.reduce(own, aligned) if views else own
            return type(output)(**{**rest, "score": score})

        return tuple(map(reduced, found)) if isinstance(found, tuple) else reduced(found)


def mean_of(results: Sequence[Any]) -> Any:  # noqa: ANN401 - whatever a call gives
    """The mean over draws of what a call gives, part by part; of what has no mean, the first.

    A ranking keeps the tokens that are kept most often, of equally often ones the best by the mean
    score, as many as in the first draw.
    """
    first = results[0]
    if len(results) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.stack(list(results)).mean(0) if first.is_floating_point() else first
    if isinstance(first, tuple):
        return tuple(mean_of(parts) for parts in zip(*results, strict=True))
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [one.name for one in dataclasses.fields(first)]
        parts = {name: mean_of([getattr(one, name) for one in results]) for name in names}
        if isinstance(first, Ranking):
            parts["kept"] = _most_kept([one.kept for one in results], parts["score"])
        return type(first)(**parts)
    return first


def _most_kept(kept: Sequence[Tensor], score: Tensor) -> Tensor:
    often = torch.stack(list(kept)).sum(0).double()
    place = score.detach().argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return top_k_mask(often + place / (2 * score.shape[1]), kept[0].sum(1))
