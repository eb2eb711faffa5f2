"""What an attack that knows the defence gets: the target's calls with the defence inside them.

It stands in the graph as it stands in the deployment, so an attack needs nothing new to adapt: an
input defence is in front of every call that takes pictures, a selection defence in every
compressor, a decoding method in every answer that is scored, and hardened weights are the model.
Where the defence is random each call is the mean over several draws (expectation over
transformation, Athalye et al., arXiv 1707.07397), fresh ones in each call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol, cast

import torch
from torch import Tensor

from defenses.base import Defense, DefenseError
from defenses.fingerprint import pipeline
from defenses.guard import Guard
from defenses.selection import ViewConsensus, drawn
from defenses.voting import majority
from targets.base import CALLS, ImageView, Knowledge, Ranking, includes
from targets.compression.base import Compressor
from targets.compression.scoring import top_k_mask
from targets.decoding.base import Decoding
from targets.preprocessing import Layout
from targets.views import View

_PLAIN: Final = frozenset(
    {"token_mask_to_pixels", "tower_depth", "project", "concepts", "option_passes"}
)
"""Calls that look at no pictures."""
_ONCE: Final = frozenset({"ask", "option_scores", "continuation"})
"""Calls that answer as the deployed target does: one draw, and nothing to take a mean of."""
_BY_PATH: Final = frozenset({"answer_nll", "answer_logprobs", "option_logprobs", "generation"})
"""Calls that take a path, all tokens unless told otherwise."""
_BY_TOWER: Final = frozenset({"encode", "layers"})
"""Calls that show what the vision tower finds important."""


class MakeView(Protocol):
    """Makes the target's view with a compressor, and with a decoding method and its draw."""

    def __call__(
        self, compressor: Compressor | None, decoding: Decoding | None = None, draw: int = 0
    ) -> ImageView:
        """The view."""
        ...


class DefendedView(View):
    """A view of the target with a defence in it; made by `defended`.

    Attributes:
        passes_in: passes of one picture through a model in a call of a name with these keywords.
        pipeline: hash of what its calls go through, see `defenses.fingerprint`.
        random: whether the defence draws, so that one answer does not settle what it answers.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        calls: dict[str, Callable[..., Any]],
        passes_in: Callable[[str, Mapping[str, Any]], int],
        pipeline: str = "",
        random: bool = False,
    ) -> None:
        super().__init__(knowledge, calls)
        self.passes_in, self.pipeline, self.random = passes_in, pipeline, random


def passes_of(defense: Defense, draws: int) -> int:
    """Passes of one picture for each pass of an attack that adapts to a defence.

    Args:
        defense: in the graph.
        draws: of its randomness in each call, ≥ 1; without effect where it has none.
    """
    guard = Guard.of(defense)
    looks = sum(one.looks for one in guard.attacked_selections)
    branches = 0 if guard.decoding is None else len(guard.decoding.views())
    return (1 + looks) * (1 + branches) * (draws if _random(defense, guard) else 1)


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
        make: views of the target; of the hardened one, where the defence changes weights.
        knowledge: of the attacker.
        defense: one that an attack can go through.
        compressor: the one in use; None if the attacker does not know it.
        layout: the visual tokens of a picture of a height and width.
        draws: of the defence's randomness in each call, ≥ 1.

    Raises:
        DefenseError: for a detector, a defence without a route, or one that has no meaning for the
            compressor.
    """
    if not defense.verifiable:
        raise DefenseError(f"defence {defense.name} names no route for an adaptive attack")
    if Guard.of(defense).detector is not None:
        raise DefenseError(
            f"defence {defense.name} is of kind detector and changes no answer: there is nothing "
            "to go through"
        )
    through = _Through(make, defense, compressor, draws, layout)
    calls = {
        name: through.call(name) for name, needed in CALLS.items() if includes(knowledge, needed)
    }
    every = passes_of(defense, draws)

    def passes_in(name: str, given: Mapping[str, Any]) -> int:
        return through.fewer(name, given) or every

    random = draws_at_random(defense)
    return cast(ImageView, DefendedView(knowledge, calls, passes_in, through.pipeline, random))


def draws_at_random(defense: Defense) -> bool:
    """Whether what an attack goes through differs from call to call."""
    return _random(defense, Guard.of(defense))


def _random(defense: Defense, guard: Guard) -> bool:
    return defense.draws or any(one.draws for one in guard.attacked_selections)


class _Through:
    """Calls of a view, each the mean over draws of a defence.

    The picture passes through the defences of the image, every compressor (the one in use or one
    imagined) is protected, and answers are scored as they are decoded.
    """

    def __init__(
        self,
        make: MakeView,
        defense: Defense,
        compressor: Compressor | None,
        draws: int,
        layout: Callable[[tuple[int, int]], Layout],
    ) -> None:
        self._make, self._compressor, self._layout = make, compressor, layout
        guard = Guard.of(defense)
        self._guard = replace(guard, selections=guard.attacked_selections)
        self._random, self._draws = _random(defense, guard), draws
        drawing = (guard.decoding, *guard.inputs)
        self._everywhere_alike = not any(one is not None and one.draws for one in drawing)
        self._called = 0
        self._protected(compressor, 0)  # what does not go together is refused here
        self.pipeline = pipeline(compressor, self._guard)

    def call(self, name: str) -> Callable[..., Any]:
        """One call of the view, by its name in `targets.base.CALLS`."""
        if name in _PLAIN:
            return cast(Callable[..., Any], getattr(self._view(0), name))

        def through(images: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            self._called += 1
            if name == "ask" and self._guard.votes > 1:
                return self._vote(images, *args, **kwargs)
            once = name in _ONCE or not self._random or self._of_all_tokens(name, kwargs)
            salts = [
                drawn("adaptive", self._called, one) for one in range(1 if once else self._draws)
            ]
            if name == "full_and_rank" and self._everywhere_alike:
                return self._with_ranks(salts, images, *args, **kwargs)
            return mean_of([self._once(name, salt, images, *args, **kwargs) for salt in salts])

        return through

    def fewer(self, name: str, kwargs: Mapping[str, Any]) -> int | None:
        """Passes in a call that looks at neither draws nor views; None for all others."""
        if not self._of_all_tokens(name, kwargs):
            return None
        return 1 if self._guard.decoding is None else 1 + len(self._guard.decoding.views())

    def _of_all_tokens(self, name: str, kwargs: Mapping[str, Any]) -> bool:
        """Whether a call looks at the path with all tokens, where no draw changes anything."""
        return self._everywhere_alike and name in _BY_PATH and kwargs.get("path", "full") == "full"

    def _with_ranks(
        self,
        salts: Sequence[int],
        images: Tensor,
        questions: tuple[str, ...],
        answers: tuple[str, ...],
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor, Ranking]:
        """`full_and_rank`, the path with all tokens run once for all draws of the selection."""
        first, *rest = salts
        found = self._once("full_and_rank", first, images, questions, answers, **kwargs)
        logprobs, real, ranking = found
        others = [self._once("rank", salt, images, questions, **kwargs) for salt in rest]
        return logprobs, real, mean_of([ranking, *others])

    def _vote(self, images: Tensor, *args: Any, **kwargs: Any) -> tuple[str, ...]:  # noqa: ANN401
        """Answers as deployed: the majority over draws."""
        salts = [drawn("adaptive", self._called, one) for one in range(self._guard.votes)]
        said = [self._once("ask", salt, images, *args, **kwargs) for salt in salts]
        return tuple(row[majority(row)] for row in zip(*said, strict=True))

    def _view(self, salt: int) -> ImageView:
        compressor = self._protected(self._compressor, salt)
        if self._guard.decoding is None:
            return self._make(compressor)
        return self._make(compressor, self._guard.decoding, salt)

    def _protected(self, compressor: Compressor | None, salt: int) -> Compressor | None:
        return None if compressor is None else self._guard.protect(compressor, salt)

    def _shown(self, images: Tensor, salt: int) -> Tensor:
        for index, one in enumerate(self._guard.inputs):
            seed = drawn("part", index, salt) if index else salt
            images = one(images, [seed] * len(images))
        return images

    def _once(self, name: str, salt: int, images: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """One call under one draw of the defence."""
        view, images = self._view(salt), self._shown(images, salt)
        if kwargs.get("under") is not None:
            kwargs = {**kwargs, "under": self._protected(kwargs["under"], salt)}
        consensus = [one for one in self._guard.selections if isinstance(one, ViewConsensus)]
        if name in _BY_TOWER and consensus:
            return self._agreed(consensus[0], getattr(view, name), salt, images, *args, **kwargs)
        return getattr(view, name)(images, *args, **kwargs)

    def _agreed(
        self,
        defense: ViewConsensus,
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
