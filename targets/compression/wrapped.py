"""A compressor around another one: everything is the other's, until a subclass says otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from targets.compression.base import (
    Compressor,
    Cut,
    Merged,
    Preview,
    Scores,
    Seen,
    Selection,
    Stage,
)

if TYPE_CHECKING:
    from targets.families.base import Family


@dataclass(frozen=True, kw_only=True)
class Wrapped(Compressor):
    """Base of compressors that change how another one ranks or chooses, and nothing else.

    Args:
        base: the compressor inside; budget, place and merging are its own.
    """

    name: ClassVar[str] = "wrapped"  # of an instance: that of the one inside

    base: Compressor
    retention: float | None = None
    keep_tokens: int | None = None

    def __post_init__(self) -> None:
        """Take over the budget of the one inside, which has been checked."""
        object.__setattr__(self, "retention", self.base.retention)
        object.__setattr__(self, "keep_tokens", self.base.keep_tokens)
        object.__setattr__(self, "name", self.base.name)  # messages are about the one inside

    @property
    def stage(self) -> Stage:
        """Of the one inside."""
        return self.base.stage

    @property
    def prunes_at(self) -> int | None:
        """Of the one inside."""
        return self.base.prunes_at

    @property
    def looks_at(self) -> int | None:
        """Of the one inside."""
        return self.base.looks_at

    @property
    def attends(self) -> bool:
        """If the one inside does."""
        return self.base.attends

    @property
    def draws(self) -> bool:
        """If the one inside does."""
        return self.base.draws

    @property
    def sees_tower(self) -> bool:
        """If the one inside does."""
        return self.base.sees_tower

    @property
    def reindexes(self) -> bool:
        """If the one inside does."""
        return self.base.reindexes

    @property
    def merges(self) -> bool:
        """If the one inside does."""
        return self.base.merges

    @property
    def drops_separators(self) -> bool:
        """If the one inside does."""
        return self.base.drops_separators

    @property
    def count_varies(self) -> bool:
        """If that of the one inside does."""
        return self.base.count_varies

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """Of the one inside."""
        return self.base.cuts(layers)

    def tower_layers(self, layers: int, feature_layer: int) -> tuple[int, ...]:
        """Of the one inside."""
        return self.base.tower_layers(layers, feature_layer)

    def refuses(self, family: Family) -> str | None:
        """What the one inside refuses."""
        return self.base.refuses(family)

    def watches(self, layers: int) -> tuple[int, ...]:
        """Of the one inside."""
        return self.base.watches(layers)

    def watch(self, layer: int, module: str, before: Tensor, after: Tensor, seen: Seen) -> None:
        """As the one inside."""
        self.base.watch(layer, module, before, after, seen)

    def shrink(self, images: Tensor) -> Tensor:
        """As the one inside."""
        return self.base.shrink(images)

    def foresee(self, preview: Preview, images: Tensor, seeds: Sequence[int]) -> Compressor:
        """Itself, around the one inside made ready."""
        ready = self.base.foresee(preview, images, seeds)
        return self if ready is self.base else replace(self, base=ready)

    def restored(self, scores: Scores, selection: Selection, seen: Seen) -> Tensor | None:
        """As the one inside."""
        return self.base.restored(scores, selection, seen)

    def install(self, family: Family, memory: dict[str, Any]) -> Sequence[Any]:
        """As the one inside."""
        return self.base.install(family, memory)

    def emerge(self, features: Tensor, memory: dict[str, Any]) -> Merged:
        """As the one inside."""
        return self.base.emerge(features, memory)

    def unmerge(self, features: Tensor, memory: dict[str, Any]) -> Tensor:
        """As the one inside."""
        return self.base.unmerge(features, memory)

    def budget(self, tokens: int) -> int:
        """Of the one inside."""
        return self.base.budget(tokens)

    def count(self, cut: Cut, tokens: int, layers: int) -> int:
        """Of the one inside."""
        return self.base.count(cut, tokens, layers)

    def soft_count(self, scores: Scores, seen: Seen) -> Tensor | None:
        """Of the one inside."""
        return self.base.soft_count(scores, seen)

    def score(self, seen: Seen) -> Scores:
        """As the one inside."""
        return self.base.score(seen)

    def look(self, seen: Seen) -> None:
        """As the one inside."""
        self.base.look(seen)

    def select(self, scores: Scores, seen: Seen) -> Selection:
        """As the one inside."""
        return self.base.select(scores, seen)

    def complete(self, kept: Tensor, seen: Seen) -> Selection:
        """As the one inside."""
        return self.base.complete(kept, seen)

    def merge(self, selection: Selection, seen: Seen) -> Merged | None:
        """As the one inside."""
        return self.base.merge(selection, seen)
