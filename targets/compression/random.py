"""Random selection: what remains when the ranking knows nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval

from targets.compression.base import Compressor, Scores, Seen, Stage
from targets.compression.scoring import standardised


@dataclass(frozen=True, kw_only=True)
class Random(Compressor):
    """Keep visual tokens drawn uniformly for each sample; the baseline every ranking has to beat.

    The score is a uniform random number per token, from a generator seeded for each image; it does
    not depend on the image and carries no gradient.

    Args:
        layer: language-model layer at whose input tokens are dropped, 0-based; None drops them
            before the language model. At FastV's own layer it shows how much of the image has
            been read before the cut.
        retention: kept ÷ all visual tokens, in (0, 1].
        keep_tokens: visual tokens kept of each image, ≥ 1, instead of retention.
        positions: whether kept tokens keep their position ids.
        seed: added to the seed of every sample.

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: a baseline without a paper. Where nobody gives seeds (an
    attacker ranking images) each sample has seed 0, so the same tokens.
    """

    name: ClassVar[str] = "random"

    layer: Annotated[int, Ge(0)] | None = None
    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    positions: Literal["keep", "reindex"] = "keep"
    seed: int = 0

    @property
    def stage(self) -> Stage:
        """Before the language model, or inside it if a layer is given."""
        return Stage.INPUT if self.layer is None else Stage.LAYER

    @property
    def prunes_at(self) -> int | None:
        """The layer option."""
        return self.layer

    @property
    def draws(self) -> bool:
        """It does nothing else."""
        return True

    def score(self, seen: Seen) -> Scores:
        """Uniform random numbers in [0, 1), ``[I, V]``."""
        width = seen.features.shape[1]
        rows = []
        # As many numbers as the image has tokens, whatever the others in the batch have.
        for seed, tokens in zip(seen.seeds, seen.totals.tolist(), strict=True):
            generator = torch.Generator().manual_seed((seed + self.seed) % 2**63)
            drawn = torch.rand(tokens, generator=generator)
            rows.append(torch.nn.functional.pad(drawn, (0, width - tokens)))
        score = torch.stack(rows).to(seen.features.device)
        return Scores(score, standardised(score, seen.valid))
