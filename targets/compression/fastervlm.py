"""FasterVLM: keep the patches CLS attends to most, before the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Interval
from torch import Tensor

from targets.compression.base import Compressor, Scores, Seen, Selection, Stage
from targets.compression.scoring import log_probability, top_k_mask
from targets.compression.tiles import Tiles
from targets.errors import CompressionError


@dataclass(frozen=True, kw_only=True)
class FasterVLM(Compressor):
    """Keep the visual tokens with the most attention of CLS where the features are made.

    Paper: Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning:
    Make VLM Inference Faster" (arXiv 2412.01818v1). The score is the head-mean attention of CLS to
    each patch at the layer whose output are the features; the projector sees all tokens, the
    language model the best, in spatial order. Published settings keep 288, 144, 58 or 29 of 576.

    A picture of several tiles is done tile by tile, the budget shared out by their sizes (the
    official code keeps equally many of each), and row separators go, as in the official packing.

    Args:
        retention: kept ÷ all visual tokens, in (0, 1].
        keep_tokens: visual tokens kept of each image, ≥ 1, instead of retention.
        positions: the official code makes position ids contiguous.

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: a tower without CLS is scored by the mean attention received
    [inferred]; tiles whose padding was cut off get a share by what is left of them.
    """

    name: ClassVar[str] = "fastervlm"

    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    positions: Literal["keep", "reindex"] = "reindex"

    @property
    def stage(self) -> Stage:
        """Before the projector."""
        return Stage.VISION

    @property
    def attends(self) -> bool:
        """Its score is an attention."""
        return True

    @property
    def drops_separators(self) -> bool:
        """The official code packs tiles without them."""
        return True

    def score(self, seen: Seen) -> Scores:
        """Head-mean attention of CLS, ``[I, V]``."""
        return cls_scores(seen, self.name)

    def select(self, scores: Scores, seen: Seen) -> Selection:
        """The best of each tile."""
        return self.complete(best_of_tiles(scores.score, seen), seen)


def cls_scores(seen: Seen, name: str) -> Scores:
    """Head-mean attention of CLS as scores.

    Raises:
        CompressionError: without attention.
    """
    if seen.attention is None:
        raise CompressionError(f"{name} needs the attention of the vision tower")
    score = seen.attention.mean(1).masked_fill(~seen.valid, 0)
    return Scores(score, log_probability(score), attends=True)


def best_of_tiles(score: Tensor, seen: Seen) -> Tensor:
    """Top of each tile, `Seen.counts` shared out by their sizes: bool ``[I, V]``."""
    tiles = Tiles.of(seen.lattice, seen.valid)
    kept = top_k_mask(tiles.split(score), tiles.share(seen.counts), tiles.present)
    return tiles.join(kept)
