"""Several compressors one after the other, each on what the one before has left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from targets.compression.base import Compressor, Cut, Scores, Seen, Stage
from targets.errors import CompressionError

_ORDER: Final = tuple(Stage)


@dataclass(frozen=True, kw_only=True)
class Pipeline(Compressor):
    """Compressors in the order they act: pixels, vision tower, before the model, at layers.

    `retention` of each part is of the uncompressed image's tokens, and a later part never brings
    tokens back.

    Args:
        stages: two or more compressors.

    Raises:
        CompressionError: if they are not in the order they act.
    """

    name: ClassVar[str] = "pipeline"

    stages: tuple[Compressor, ...]
    retention: float | None = None
    keep_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check the order."""
        if not self.stages:
            raise CompressionError("compressor pipeline: stages is empty; give at least one")
        stages = [_ORDER.index(one.stage) for one in self.stages]
        # Methods with several cuts have no one layer; their cuts are interleaved with the others'.
        layers = [one.prunes_at for one in self.stages if one.prunes_at is not None]
        if stages != sorted(stages) or layers != sorted(layers):
            names = [f"{one.name} ({one.stage.value})" for one in self.stages]
            raise CompressionError(
                f"compressor pipeline: stages {', '.join(names)} are not in the order they act; "
                f"that is {', '.join(stage.value for stage in _ORDER)}, layers ascending"
            )

    @property
    def stage(self) -> Stage:
        """Of its first part."""
        return self.stages[0].stage

    @property
    def prunes_at(self) -> int | None:
        """Of its first part."""
        return self.stages[0].prunes_at

    @property
    def draws(self) -> bool:
        """If a stage does."""
        return any(one.draws for one in self.stages)

    @property
    def sees_tower(self) -> bool:
        """If any part does."""
        return any(one.sees_tower for one in self.stages)

    @property
    def merges(self) -> bool:
        """If any part does."""
        return any(one.merges for one in self.stages)

    @property
    def count_varies(self) -> bool:
        """If any part's does."""
        return any(one.count_varies for one in self.stages)

    def tower_layers(self, layers: int, feature_layer: int) -> tuple[int, ...]:
        """Of all parts."""
        found = {n for one in self.stages for n in one.tower_layers(layers, feature_layer)}
        return tuple(sorted(found))

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """Of all parts, each with its owner."""
        return owned(self.stages, layers)

    def budget(self, tokens: int) -> int:
        """The smallest of its parts."""
        return min(one.budget(tokens) for one in self.stages)

    def score(self, seen: Seen) -> Scores:
        """Parts score for themselves."""
        raise CompressionError("a pipeline does not score; its parts do")


def parts_of(compressor: Compressor) -> tuple[Compressor, ...]:
    """The compressors that act: the parts of a pipeline, or the one itself."""
    return compressor.stages if isinstance(compressor, Pipeline) else (compressor,)


def owned(parts: Sequence[Compressor], layers: int) -> tuple[Cut, ...]:
    """Cuts of several compressors in the order they happen, each with its owner.

    Cuts keep the number they have within their owner.
    """
    found = [
        replace(cut, by=cut.by or one, number=number if cut.number == 0 else cut.number)
        for one in parts
        for number, cut in enumerate(one.cuts(layers))
    ]
    return tuple(sorted(found, key=_when))


def _when(cut: Cut) -> tuple[int, int, int]:
    """Of two that rank at one layer, the one that drops there comes first: it changes the input."""
    reads = -1 if cut.reads is None else cut.reads
    return _ORDER.index(cut.stage), reads, reads if cut.layer is None else cut.layer
