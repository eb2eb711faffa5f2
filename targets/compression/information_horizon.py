"""Diversity before the language model, chance behind the layer where tokens stop to matter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Interval

from targets.compression.base import Compressor, Cut, Scores, Seen, Stage, numbered
from targets.compression.budgets import scaled_layers
from targets.compression.divprune import DivPrune
from targets.compression.random import Random

_OFFICIAL, _DEPTH = (20,), 32
"""Where LLaVA-1.5-7B's horizon lies on most benchmarks."""


@dataclass(frozen=True, kw_only=True)
class InformationHorizon(Compressor):
    """Keep a diverse set before the language model; drop at random once tokens no longer matter.

    Paper: "All You Need Are Random Visual Tokens? Demystifying Token Pruning in VLLMs" (CVPR 2026,
    arXiv 2512.07580). Behind a layer, the horizon, a token's information (the answer's probability
    with only that token, less that with none) vanishes for all tokens, and no method beats chance.
    So the first cut is `DivPrune` on the projected tokens, the second a uniform draw at the input
    of layer K. `targets.evidence.find_horizon` (``redteam measure --horizon``) finds K.

    Args:
        layer: K, 0-based, ≥ 1; None is layer 20 of 32, in proportion to the model's depth.
        retention: kept ÷ all visual tokens after both cuts, in (0, 1].
        keep_tokens: visual tokens kept of each image, ≥ 1, instead of retention.
        early_retention: kept ÷ all after the first cut, in (0, 1], but never fewer than in the
            end; None lets both cuts drop the same share of what they find.
        positions: ``keep`` the position ids, or ``reindex`` them.
        seed: added to each sample's seed for the draw.

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: a reconstruction; there is no public code. The layers and shares
    of the two cuts are unknown and ours are [inferred]; the paper also uses DART for the first
    cut. The score of the second cut is a random number, so only the first gives a gradient.
    """

    name: ClassVar[str] = "information_horizon"

    layer: Annotated[int, Ge(1)] | None = None
    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    early_retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    positions: Literal["keep", "reindex"] = "keep"
    seed: int = 0

    @property
    def stage(self) -> Stage:
        """The first cut is before the language model."""
        return Stage.INPUT

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """Before the model, and at the horizon."""
        horizon = self.layer
        if horizon is None:
            horizon = scaled_layers(_OFFICIAL, _DEPTH, layers)[0]
        return numbered((Cut(Stage.INPUT), Cut(Stage.LAYER, horizon)))

    def count(self, cut: Cut, tokens: int, layers: int) -> int:
        """Tokens after a cut; the first leaves the geometric mean of all and the final count."""
        del layers
        final = self.budget(tokens)
        if cut.number:
            return final
        if self.early_retention is not None:
            return max(final, round(self.early_retention * tokens))
        return max(final, round(math.sqrt(final * tokens)))

    def score(self, seen: Seen) -> Scores:
        """Distance when chosen at the first cut, random numbers at the second, ``[I, V]``."""
        if seen.cut.number:
            return Random(retention=1.0, seed=self.seed).score(seen)
        return DivPrune(retention=1.0).score(seen)
