"""Rank volatility: does the compressor keep the same tokens of slightly other pictures?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from defenses.base import AdaptiveRoute, DefenseError
from defenses.detector import Cost, Detector, Observation, State, Traffic
from defenses.score_smoothing import ScoreSmoothing
from defenses.selection import ViewConsensus, rank_quantiles, soft_quantiles
from defenses.translation_consensus import TranslationConsensus
from targets.compression.base import Compressor
from targets.compression.scoring import standardised, top_k_mask

SOFTNESS = 0.1
"""Width of the relaxed membership in the top K, in deviations of the standardised log-score."""


@dataclass(frozen=True, kw_only=True)
class RankVolatility(Detector):
    """How far the tokens kept of a picture and of views of it disagree.

    [inferred] after translation-consensus selection (CIRA, section 6), whose authors find that
    attack-promoted tokens are in the top K of one view only::

        V = 1 − mean over pairs a < b of J(S_a, S_b)          jaccard, in [0, 1]
        V = (1 − mean over pairs a < b of ρ(s_a, s_b)) / 2     spearman, in [0, 1]

    S_v are the K best tokens in view v, moved back to where the picture has them, K what the
    compressor keeps; the picture itself is a view.

    Args:
        views: ``translation``, the three shifts of translation-consensus selection; ``noise``,
            copies with Gaussian noise.
        copies: noisy copies, ≥ 1; only for ``noise``.
        sigma: deviation of the noise in [0, 1] pixel units, > 0; only for ``noise``.
        measure: what is compared, see above.

    Raises:
        DefenseError: when it is to watch a compressor that does not choose by an attention, at one
            point, a number fixed in advance.
        CompressionError: translation, for pictures of several tiles.

    *Differs from the paper in …*: there is none.
    """

    name: ClassVar[str] = "rank_volatility"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.BPDA

    views: Literal["translation", "noise"] = "translation"
    copies: Annotated[int, Ge(1)] = 4
    sigma: Annotated[float, Gt(0)] = 0.05
    measure: Literal["jaccard", "spearman"] = "jaccard"

    @property
    def route(self) -> AdaptiveRoute:
        """Noise needs the mean over draws as well."""
        return AdaptiveRoute.EOT if self.draws else self.adaptive

    @property
    def draws(self) -> bool:
        """Only noise is drawn."""
        return self.views == "noise"

    @property
    def _consensus(self) -> ViewConsensus:
        if self.views == "noise":
            return ScoreSmoothing(sigma=self.sigma, copies=self.copies)
        return TranslationConsensus()

    def refuses(self, compressor: Compressor) -> str | None:
        """What the defences it takes its views from refuse, and what keeps all tokens."""
        return self._consensus.refuses(compressor)

    def observe(self, traffic: Traffic) -> Observation:
        """Disagreement of the kept sets, from one batch of rankings behind the picture's own."""
        if traffic.compressor is None:
            raise DefenseError(f"detector {self.name} watches a ranking; name a compressor")
        passes, count = traffic.model.passes, len(traffic.images)
        layout = passes.layout((traffic.images.shape[-2], traffic.images.shape[-1]))
        views = self._consensus.look_again(traffic.images, layout, traffic.generators())
        pictures = torch.cat([traffic.images, *(view.images for view in views)])
        times = len(pictures) // count
        seeds = None if traffic.draws is None else traffic.draws * times
        ranking = passes.rank(pictures, traffic.questions * times, traffic.compressor, seeds)
        own, *scores = ranking.score.chunk(times)
        own_log, *logs = ranking.log_score.chunk(times)
        aligned = [own, *(view.align(one) for view, one in zip(views, scores, strict=True))]
        live = [own_log, *(view.align(one) for view, one in zip(views, logs, strict=True))]
        kept = ranking.kept[:count].sum(1)
        if self.measure == "spearman":
            return {"volatility": rank_disagreement(aligned, live)}
        return {"volatility": set_disagreement(aligned, live, kept)}

    def judge(self, seen: Observation, state: State) -> Tensor:
        """The disagreement as it is."""
        del state
        return seen["volatility"]

    @property
    def passes(self) -> int:
        """The picture and its views."""
        return 1 + self._consensus.looks

    def cost(self, full: float) -> Cost:
        """Passes of the tower; where a compressor ranks in the model, its first layers are more."""
        del full
        return Cost(language=0.0, tower=float(self._consensus.looks))


def set_disagreement(scores: Sequence[Tensor], logs: Sequence[Tensor], kept: Tensor) -> Tensor:
    """``1 − mean pairwise Jaccard`` of the K best by each score, ``[B]`` in [0, 1].

    Backward a sigmoid of the distance to the bar between K and K + 1 stands for each membership,
    and ``Σ min / Σ max`` for the Jaccard index.

    Args:
        scores: ``[B, V]`` of each view, aligned; at least two.
        logs: their log-scores, live.
        kept: long ``[B]``, K.
    """
    hard = [top_k_mask(one, kept).double() for one in scores]
    soft = [_membership(one, kept) for one in logs]
    found = 1 - _mean_pair(hard, _jaccard)
    live = 1 - _mean_pair(soft, _jaccard)
    return found + (live - live.detach())


def rank_disagreement(scores: Sequence[Tensor], logs: Sequence[Tensor]) -> Tensor:
    """``(1 − mean pairwise Spearman ρ) / 2`` of scores, ``[B]`` in [0, 1].

    Equal scores take their places in order, as everywhere here. Backward soft ranks stand for the
    ranks.

    Args:
        scores: ``[B, V]`` of each view, aligned; at least two.
        logs: their log-scores, live.
    """
    every = torch.ones_like(scores[0], dtype=torch.bool)
    hard = [rank_quantiles(one, every).double() for one in scores]
    soft = [soft_quantiles(one, every).double() for one in logs]
    found = (1 - _mean_pair(hard, _correlation)) / 2
    live = (1 - _mean_pair(soft, _correlation)) / 2
    return found + (live - live.detach())


def _membership(log_score: Tensor, kept: Tensor) -> Tensor:
    z = standardised(log_score.double())
    ordered = z.sort(1, descending=True).values
    last = (kept - 1).clamp_min(0)[:, None]
    after = kept.clamp_max(z.shape[1] - 1)[:, None]
    bar = (ordered.gather(1, last) + ordered.gather(1, after)) / 2
    return torch.sigmoid((z - bar) / SOFTNESS)


def _mean_pair(values: Sequence[Tensor], measure: object) -> Tensor:
    pairs = list(itertools.combinations(values, 2))
    return torch.stack([measure(a, b) for a, b in pairs]).mean(0)  # type: ignore[operator]


def _jaccard(first: Tensor, second: Tensor) -> Tensor:
    return torch.minimum(first, second).sum(1) / torch.maximum(first, second).sum(1).clamp_min(1e-9)


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    a, b = (one - one.mean(1, keepdim=True) for one in (first, second))
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1) + 1e-18).sqrt()
