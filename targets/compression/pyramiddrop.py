"""PyramidDrop: drop visual tokens in stages, more of them the deeper the layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Interval

from targets.compression.base import Scores, Seen
from targets.compression.budgets import checked_shares, fixed_stages, power_stages
from targets.compression.scoring import log_probability
from targets.compression.staged import Staged
from targets.errors import CompressionError


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Staged):
    """Keep a shrinking share of visual tokens at several layers, by the last prompt token's eye.

    Paper: Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid
    Visual Redundancy Reduction" (CVPR 2025, arXiv 2410.17247; later "Conical Visual
    Concentration"). At the input of each pruning layer K the score is the head-mean attention that
    K's own queries and keys give on the hidden states there, row of the last prompt token, softmax
    over all columns. After stage i of S a share λ^i of *all* tokens is left, rounded down; the
    official λ = 0.5 with S = 3 leaves 0.125.

    Args:
        layers: 0-based layers at whose inputs tokens are dropped; None is 8, 16, 24 of 32, moved in
            proportion to the model's depth.
        retention: kept ÷ all visual tokens, in (0, 1]; λ is its S-th root. The official final share
            is 0.125.
        keep_tokens: visual tokens kept of each image, ≥ 1, instead of retention.
        budget_is: ``final`` means what the last stage leaves, ``average`` the mean over all layers
            of the language model.
        shares: share of all tokens left after each stage but the last, instead of powers of λ.
        positions: the official code numbers the tokens anew at each stage.

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: each image of a prompt has a budget of its own [inferred]. The
    last stage leaves ``round``, not ``int``, of the share. Published rows at few tokens ("64")
    prune earlier than layer 8; at which layers is not public [unknown], so give `layers`. Nothing
    is detached.
    """

    name: ClassVar[str] = "pyramiddrop"
    official_layers: ClassVar[tuple[int, ...]] = (8, 16, 24)

    budget_is: Literal["final", "average"] = "final"
    shares: tuple[Annotated[float, Interval(gt=0, le=1)], ...] | None = None
    positions: Literal["keep", "reindex"] = "reindex"

    def __post_init__(self) -> None:
        """Check budget, layers and shares."""
        super().__post_init__()
        stages = len(self.official_layers if self.layers is None else self.layers)
        checked_shares(self.name, self.shares, stages)

    @property
    def attends(self) -> bool:
        """Its score is an attention."""
        return True

    def stages(self, tokens: int, final: int, number: int) -> tuple[int, ...]:
        """Shares that fall by the same factor at each stage, unless given."""
        if self.shares is not None:
            return fixed_stages(self.shares, tokens, final, number)
        return power_stages([0.5 ** (i + 1) for i in range(number)], tokens, final)

    def score(self, seen: Seen) -> Scores:
        """Head-mean attention of the last prompt token, ``[I, V]``."""
        if seen.attention is None:
            raise CompressionError("pyramiddrop needs the attention of the last prompt token")
        score = seen.attention.mean(1).masked_fill(~seen.valid, 0)
        return Scores(score, log_probability(score), attends=True)
