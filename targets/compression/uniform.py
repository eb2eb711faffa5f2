"""Uniform selection: every so-many-th token, whatever the image shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval

from targets.compression.base import Compressor, Scores, Seen, Stage
from targets.compression.scoring import standardised


@dataclass(frozen=True, kw_only=True)
class Uniform(Compressor):
    """Keep K visual tokens evenly spaced in reading order, before the language model.

    Kept are the tokens ``floor((i + 1/2) · V / K)`` for i = 0 … K−1. The score is 1 for them and
    0 for the rest; it carries no gradient.

    Args:
        retention: kept ÷ all visual tokens, in (0, 1].
        keep_tokens: visual tokens kept of each image, ≥ 1, instead of retention.
        positions: whether kept tokens keep their position ids.

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: a baseline without a paper. Steps are centred, so that for
    K = 1 the middle token is kept, not the first.
    """

    name: ClassVar[str] = "uniform"

    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    positions: Literal["keep", "reindex"] = "keep"

    @property
    def stage(self) -> Stage:
        """Before the language model."""
        return Stage.INPUT

    def score(self, seen: Seen) -> Scores:
        """1 for the evenly spaced tokens, else 0, ``[I, V]``."""
        images, tokens = seen.features.shape[:2]
        places = [(2 * i + 1) * tokens // (2 * seen.count) for i in range(seen.count)]
        score = torch.zeros(images, tokens, device=seen.features.device)
        score[:, places] = 1.0
        return Scores(score, standardised(score))
