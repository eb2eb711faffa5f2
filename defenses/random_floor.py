"""Random floor: part of the budget goes to tokens drawn at random, whatever they score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from defenses.base import AdaptiveRoute
from defenses.selection import SelectionDefense
from targets.compression.base import Scores, Seen
from targets.compression.scoring import top_k_mask


@dataclass(frozen=True, kw_only=True)
class RandomFloor(SelectionDefense):
    """Keep ``TopK_{(1 − rho)·K}(s) ∪ Uniform_{rho·K}(rest)``.

    [inferred] a random retention floor; with rho = 0.1 it is the balanced token restoration of SAP
    ("Safety-Aware Pruning", arXiv 2610.09703), which draws from the dropped tokens only. The seed
    has to be secret. Costs nothing. Of m evidence tokens among the N′ that are not in the top, at
    least one is drawn with probability `survival`; a tenth of a small K cannot save small objects.

    Args:
        rho: share of K drawn, in [0, 1]; 0 is no defence, 1 keeps K at random.

    Raises:
        DefenseError: when it is to protect what does not choose a number fixed in advance at one
            point.

    *Differs from the paper in …*: the draw is from all tokens outside the top (1 − rho)·K, those
    that the compressor would have kept among them.
    """

    name: ClassVar[str] = "random_floor"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.EOT
    stochastic: ClassVar[bool] = True
    from_dropped: ClassVar[bool] = False
    """Whether it draws from what the compressor drops, and not from all but the top."""

    rho: Annotated[float, Interval(ge=0, le=1)] = 0.1

    @torch.no_grad()
    def keep(
        self, kept: Tensor, scores: Scores, seen: Seen, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """The best of the kept, and as many drawn as are missing."""
        total = kept.sum(1)
        drawn = (total.double() * self.rho).round().long()
        dropped = seen.valid & ~kept
        if self.from_dropped:
            drawn = torch.minimum(drawn, dropped.sum(1))
        if not bool(drawn.any()):
            return kept
        top = top_k_mask(scores.score, total - drawn, kept)
        width = kept.shape[1]
        noise = torch.stack([torch.rand(width, generator=one) for one in generators])
        rest = dropped if self.from_dropped else seen.valid & ~top
        return top | top_k_mask(noise.to(kept.device), drawn, rest)


def survival(evidence: int, rest: int, drawn: int) -> float:
    """Chance that at least one of `evidence` tokens among `rest` is among `drawn`.

    ``1 − C(rest − evidence, drawn) / C(rest, drawn)``.

    Args:
        evidence: m, 0 ≤ m ≤ rest.
        rest: N′, tokens the draw is from.
        drawn: how many are drawn, 0 ≤ drawn ≤ rest.
    """
    return 1 - comb(rest - evidence, drawn) / comb(rest, drawn)
