"""Grid selection: every so-many-th row and column of tokens, whatever the image shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Interval

from targets.compression.base import Compressor, Scores, Seen, Stage
from targets.compression.scoring import standardised
from targets.compression.thinning import Thinning


@dataclass(frozen=True, kw_only=True)
class Grid(Compressor):
    """Keep visual tokens on a coarser grid, before the language model.

    Of H × W tokens those in rows ``floor((i + 1/2) · H / h)`` and columns
    ``floor((j + 1/2) · W / w)`` are kept, h × w being the largest grid that fits into the budget
    and distorts the picture least; where h · w is less than the budget, fewer are kept. Tiles are
    done one by one, the budget shared out by their sizes. The score is 1 for kept tokens and 0 for
    the rest; it carries no gradient.

    Args:
        retention: kept ÷ all visual tokens, in (0, 1], at most.
        keep_tokens: visual tokens kept of each image, ≥ 1, at most, instead of retention.
        positions: whether kept tokens keep their position ids.

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: a baseline without a paper.
    """

    name: ClassVar[str] = "grid"

    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    positions: Literal["keep", "reindex"] = "keep"

    @property
    def stage(self) -> Stage:
        """Before the language model."""
        return Stage.INPUT

    def score(self, seen: Seen) -> Scores:
        """1 for tokens on the coarser grid, else 0, ``[I, V]``."""
        plan = Thinning.of(seen)
        chosen = plan.tiles.join(plan.centres())
        score = chosen.float()
        return Scores(score, standardised(score, seen.valid), chosen=chosen)
