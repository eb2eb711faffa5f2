"""Score smoothing: keep what the compressor finds important under random noise as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from defenses.base import AdaptiveRoute
from defenses.selection import View, ViewConsensus, rank_quantiles, soft_quantiles
from targets.compression.base import Scores, Seen
from targets.compression.scoring import log_probability, standardised
from targets.preprocessing import Layout


@dataclass(frozen=True, kw_only=True)
class ScoreSmoothing(ViewConsensus):
    """Choose tokens by their mean score over noisy copies of the picture.

    [inferred] after SmoothGrad (arXiv 1706.03825) and randomised smoothing (arXiv 1902.02918); no
    publication describes it for visual tokens: ``s̄_i = 1/n · Σ_j g_i(x + sigma · z_j)`` with z
    standard normal and g the score, its rank quantile, or ``1[r_i ≤ K]``. Features are those of
    the picture without noise. Costs n more passes of the vision tower.

    Args:
        sigma: deviation of the noise in [0, 1] pixel units, ≥ 0; 0 is no defence.
        copies: n, ≥ 1.
        statistic: g: ``score`` itself, ``quantile`` of its rank, or ``indicator`` of being among
            the K best, of which equal ones are told apart by their mean quantile.

    Raises:
        DefenseError: when it is to protect a compressor that does not choose by an attention, at
            one point, a number fixed in advance.

    *Differs from the paper in …*: there is none; noisy copies are clipped to valid colours. Ranks
    have no gradient, so backward soft ranks stand for them.
    """

    name: ClassVar[str] = "score_smoothing"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.EOT
    stochastic: ClassVar[bool] = True

    sigma: Annotated[float, Ge(0)] = 0.05
    copies: Annotated[int, Ge(1)] = 8
    statistic: Literal["score", "quantile", "indicator"] = "quantile"

    @property
    def looks(self) -> int:
        """The noisy copies."""
        return 0 if self.sigma == 0 else self.copies

    def look_again(
        self, images: Tensor, layout: Layout, generators: Sequence[torch.Generator]
    ) -> Sequence[View]:
        """The noisy copies; none without noise."""
        del layout
        if self.sigma == 0:
            return ()
        return [
            View((images + self.sigma * _noise(images, generators)).clamp(0, 1), _in_place)
            for _ in range(self.copies)
        ]

    def reduce(self, own: Tensor, others: Sequence[Tensor]) -> Tensor:
        """Mean over the noisy copies."""
        del own
        return torch.stack(list(others)).mean(0)

    def combine(self, own: Scores, others: Sequence[Scores], seen: Seen) -> Scores:
        """The mean of the statistic over the noisy copies."""
        self.check_choice(own)
        if not others or self.statistic == "quantile":
            return super().combine(own, others, seen)
        if self.statistic == "score":
            score = self.reduce(own.score, [one.score for one in others])
            return Scores(score, log_probability(score), own.attends)
        quantiles = [rank_quantiles(one.score, seen.valid) for one in others]
        last = (seen.valid.sum(1, keepdim=True) - 1).clamp_min(1)
        bar = 1 - (seen.counts[:, None] - 1) / last  # the quantile of rank K
        among = [(one >= bar - 0.5 / last).float() for one in quantiles]
        hard = torch.stack(among).sum(0) + torch.stack(quantiles).mean(0) / 2
        soft = [soft_quantiles(one.log_score, seen.valid) for one in others]
        near = torch.stack([torch.sigmoid((one - bar) / _EDGE) for one in soft]).sum(0)
        score = hard.masked_fill(~seen.valid, 0) + (near - near.detach())
        return Scores(score, standardised(near, seen.valid), own.attends)


_EDGE = 0.1
"""Width of the relaxed indicator, in quantiles."""


def _in_place(values: Tensor) -> Tensor:
    return values


def _noise(images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    rows = [torch.randn(images.shape[1:], generator=one) for one in generators]
    return torch.stack(rows).to(images)
