"""Uniform selection: every so-many-th token, whatever the image shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

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
    K = 1 the middle token is kept, not the first. V is the number of tokens an image has at the
    cut; a picture of several tiles is one row of tokens, in the order the model reads them.
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
        spaced = evenly_spaced(seen.counts, seen.valid)
        score = spaced.float()
        return Scores(score, standardised(score, seen.valid))


@torch.no_grad()
def evenly_spaced(counts: Tensor, valid: Tensor) -> Tensor:
    """``counts [I]`` of the valid places ``[I, V]``, evenly spaced in their order: bool."""
    if valid.numel() == 0:
        return torch.zeros_like(valid)
    most = torch.arange(int(counts.amax()), device=valid.device)
    number = valid.sum(1, keepdim=True)
    places = (2 * most + 1) * number // (2 * counts[:, None].clamp_min(1))
    wanted = most < counts[:, None]
    places = places.clamp_max(valid.shape[1] - 1)
    marked = torch.zeros(valid.shape, dtype=torch.long, device=valid.device)
    marked = marked.scatter_add(1, places, wanted.long())
    rank = (valid.long().cumsum(1) - 1).clamp_min(0)
    return (marked.gather(1, rank) > 0) & valid
