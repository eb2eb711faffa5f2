"""The base of compressors that drop tokens at several layers of the language model."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Interval

from targets.compression.base import Compressor, Cut, Stage, numbered
from targets.compression.budgets import checked_layers, final_for_average, scaled_layers
from targets.errors import CompressionError


@dataclass(frozen=True, kw_only=True)
class Staged(Compressor):
    """A compressor with a cut at each of several layers.

    Args:
        layers: 0-based language-model layers at whose inputs tokens are dropped; None takes the
            official ones, moved in proportion to the model's depth.
        retention: kept ÷ all visual tokens, in (0, 1].
        keep_tokens: visual tokens kept of each image, ≥ 1, instead of retention.
        budget_is: whether the budget is what is left after the last stage, the mean over the
            language model's layers, or whatever the authors call by that number.
    """

    official_layers: ClassVar[tuple[int, ...]]
    official_depth: ClassVar[int] = 32

    layers: tuple[int, ...] | None = None
    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    budget_is: Literal["final", "average", "official"] = "final"

    def __post_init__(self) -> None:
        """Check the budget and the layers."""
        super().__post_init__()
        if self.layers is not None:
            checked_layers(self.name, self.layers)

    @property
    def stage(self) -> Stage:
        """Inside the language model."""
        return Stage.LAYER

    @abstractmethod
    def stages(self, tokens: int, final: int, number: int) -> tuple[int, ...]:
        """Counts after each of `number` stages for an image of `tokens`, ending in `final`."""

    def drops_at(self, layers: int) -> tuple[int, ...]:
        """Layers at whose inputs tokens are dropped, in a model of `layers`.

        Raises:
            CompressionError: if the model is too shallow.
        """
        if self.layers is None:
            return scaled_layers(self.official_layers, self.official_depth, layers)
        if self.layers[-1] >= layers:
            raise CompressionError(
                f"compressor {self.name}: layer {self.layers[-1]} does not exist; the language "
                f"model has layers 0 to {layers - 1}"
            )
        return self.layers

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One at each layer, ranked by that layer's own attention."""
        return numbered(
            [Cut(Stage.LAYER, layer, None, self.attends) for layer in self.drops_at(layers)]
        )

    def official_stages(self, tokens: int, wanted: int, layers: int) -> tuple[int, ...]:
        """Counts after each stage where the authors say `wanted`; by default they mean the last."""
        return self.stages(tokens, wanted, len(self.starts(layers)))

    def starts(self, layers: int) -> tuple[int, ...]:
        """First language-model layer that sees fewer tokens, for each stage."""
        return self.drops_at(layers)

    def stage_counts(self, tokens: int, layers: int) -> tuple[int, ...]:
        """Tokens left of an image of `tokens` after each stage, in a model of `layers`.

        Raises:
            CompressionError: if an average cannot be reached.
        """
        starts, final = self.starts(layers), self.budget(tokens)
        if final == tokens:
            return (tokens,) * len(starts)
        if self.budget_is == "official":
            return self.official_stages(tokens, final, layers)
        if self.budget_is == "average":
            final = final_for_average(
                self.name,
                lambda one: self.stages(tokens, one, len(starts)),
                starts,
                layers,
                tokens,
                final,
            )
        return self.stages(tokens, final, len(starts))

    def stage_of(self, cut: Cut, layers: int) -> int:
        """Which stage a cut is, from 0."""
        return self.starts(layers).index(cut.layer or 0)

    def count(self, cut: Cut, tokens: int, layers: int) -> int:
        """Tokens left after one of its cuts."""
        if not cut.drops:
            return tokens
        return self.stage_counts(tokens, layers)[self.stage_of(cut, layers)]
