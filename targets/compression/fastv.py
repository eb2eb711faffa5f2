"""FastV: drop visual tokens the last prompt token does not look at early in the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Interval

from targets.compression.base import Compressor, Scores, Seen, Stage
from targets.compression.scoring import log_probability
from targets.errors import CompressionError


@dataclass(frozen=True, kw_only=True)
class FastV(Compressor):
    """Keep the visual tokens that get most of the last prompt token's attention at layer K − 1.

    Paper: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2" (ECCV 2024, arXiv 2403.06764).
    The score is the head-mean attention of layer K − 1, row of the last prompt token; tokens are
    dropped once, at the input of layer K, and are absent from layers ≥ K and their caches.

    Args:
        layer: K, 0-based, ≥ 1; layers 0 … K−1 see all tokens.
        retention: kept ÷ all visual tokens, in (0, 1] (the paper's R is the *dropped* share).
        keep_tokens: visual tokens kept of each image, ≥ 1, instead of retention.
        positions: the official code keeps position ids.

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: the text speaks of attention received from all tokens; this is
    the last row, as in the official code. The attention is recomputed from queries and keys, which
    needs no eager attention. The budget holds for each image of a prompt.
    """

    name: ClassVar[str] = "fastv"

    layer: Annotated[int, Ge(1)] = 2
    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    positions: Literal["keep", "reindex"] = "keep"

    def __post_init__(self) -> None:
        """Check the budget and the layer."""
        super().__post_init__()
        if self.layer < 1:
            raise CompressionError(
                f"compressor fastv: layer is {self.layer}; it ranks by the attention of the layer "
                "before, so the first possible is 1"
            )

    @property
    def stage(self) -> Stage:
        """Inside the language model."""
        return Stage.LAYER

    @property
    def prunes_at(self) -> int:
        """K."""
        return self.layer

    @property
    def looks_at(self) -> int:
        """K − 1."""
        return self.layer - 1

    @property
    def attends(self) -> bool:
        """Its score is an attention."""
        return True

    def score(self, seen: Seen) -> Scores:
        """Head-mean attention of the last prompt token, ``[I, V]``."""
        if seen.attention is None:
            raise CompressionError("fastv needs the attention of the last prompt token")
        score = seen.attention.mean(1)
        return Scores(score, log_probability(score), attends=True)
