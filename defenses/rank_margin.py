"""Rank margin: where the ranking of the tokens is not stable, answer with all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from defenses.base import AdaptiveRoute, DefenseError
from defenses.fallback import FallbackDefense
from defenses.selection import SelectionDefense, drawn
from defenses.translation_consensus import TranslationConsensus
from targets.base import CompressedView, Knowledge
from targets.compression.base import Compressor
from targets.compression.scoring import TINY, precise, top_k_mask
from targets.compression.wrapped import Wrapped

if TYPE_CHECKING:
    from targets.lvlm import LVLM

_BATCH = 32
"""Pictures ranked at a time when a threshold is calibrated."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """How a batch is ranked.

    Attributes:
        own: ``[B, V]`` the compressor's score of each picture.
        others: of its views, aligned; empty where the signal needs none.
        kept: long ``[B]`` tokens the compressor keeps as they are, K.
    """

    own: Tensor
    others: tuple[Tensor, ...]
    kept: Tensor


@dataclass(frozen=True, kw_only=True)
class RankMargin(FallbackDefense):
    """Compress only where the ranking is stable; else fall back to more tokens, or to all.

    [inferred]: no publication describes it. A picture falls back if ``signal < threshold``, the
    signal in [0, 1], 1 the most stable, of the compressor's scores s on the picture and, moved
    back, on the shifted ones of `TranslationConsensus`:

    - ``jaccard``: mean over pairs of views of ``|S ∩ S'| / |S ∪ S'|``, S the K best tokens;
    - ``gap``: ``g / (1 + g)`` with ``g = (s_(K) − s_(K+1)) / std(s)``, on the picture alone;
    - ``kendall``: ``(τ + 1) / 2``, τ the mean rank correlation of the picture with each other view.

    It costs the passes of the views, and a whole uncompressed answer where it falls back: whoever
    can make pictures that fall back (`attacks.force_fallback`) takes the speed away. Report mean
    *and* p95 of the seconds.

    Args:
        signal: what stability is.
        threshold: in [0, 1]. At 0 no picture falls back, at 1 every one does. The default is the
            5 % quantile of ``jaccard`` on clean data (docs/defenses.md says which); other models,
            budgets and signals need their own: `calibrated`.
        fallback: straight to ``full``, all tokens; or ``double_then_full``: 2K tokens if the signal
            of the 2K best reaches the threshold, else all.
        shift: pixels of the shifts, ≥ 1; None is half a token.
        views: ``public`` shifts, or ``random`` ones drawn anew for every query.
        number: views in all, ≥ 2, the picture itself being one; only for ``random``.

    Raises:
        DefenseError: ``kendall`` with ``double_then_full``: it does not depend on K.
        CompressionError: for pictures of several tiles, unless the signal is ``gap``.

    *Differs from the paper in …*: there is none. S are the K best by the score the compressor
    shows, which is its kept set where it takes the best, and not where it also looks for
    diversity. An adaptive attack goes through `stand_in`, the consensus of the same views, because
    the decision to fall back is a step without a gradient: what changes the ranking alike in all
    views keeps them in agreement and is not noticed.
    """

    name: ClassVar[str] = "rank_margin"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.BPDA

    signal: Literal["jaccard", "gap", "kendall"] = "jaccard"
    threshold: Annotated[float, Interval(ge=0, le=1)] = 0.3
    fallback: Literal["full", "double_then_full"] = "full"
    shift: Annotated[int, Ge(1)] | None = None
    views: Literal["public", "random"] = "public"
    number: Annotated[int, Ge(2)] = 4

    def __post_init__(self) -> None:
        """Check what the options say together, and the threshold, which code sets as well."""
        if not 0 <= self.threshold <= 1:
            raise DefenseError(
                f"defence {self.name}: threshold is {self.threshold!r}; allowed is [0, 1]: 0 never "
                "falls back, 1 always"
            )
        if self.signal == "kendall" and self.fallback == "double_then_full":
            raise DefenseError(
                f"defence {self.name}: signal 'kendall' is of all tokens and the same at 2K, so "
                "fallback 'double_then_full' would never stop there; use fallback 'full', or "
                "signal 'jaccard' or 'gap'"
            )

    @property
    def route(self) -> AdaptiveRoute:
        """Random views need the mean over draws."""
        return AdaptiveRoute.EOT if self.draws else self.adaptive

    @property
    def draws(self) -> bool:
        """Only if views are used and their shifts are drawn."""
        return self.views == "random" and self.signal != "gap"

    @property
    def looks(self) -> int:
        """How many other pictures are ranked for each."""
        return 0 if self.signal == "gap" else self._consensus().looks

    def refuses(self, compressor: Compressor) -> str | None:
        """What does not choose by an attention, at one point, a number fixed in advance."""
        return self._consensus().refuses(compressor)

    def stand_in(self) -> SelectionDefense | None:
        """What an adaptive attack has in its graph: the consensus of the views that are compared.

        None for ``gap``, which looks at the picture alone: an attack that moves tokens far beyond
        the boundary is not noticed.
        """
        return None if self.signal == "gap" else self._consensus()

    def choose(
        self,
        model: LVLM,
        images: Tensor,
        questions: Sequence[str],
        compressor: Compressor,
        seeds: Sequence[int],
    ) -> list[Compressor | None]:
        """The compressor where the ranking is stable; 2K tokens, or None for all, elsewhere."""
        self._check(compressor)
        if self.threshold in (0, 1):  # decided without looking
            return [compressor if self.threshold == 0 else None for _ in questions]
        found = self.ranked(model, images, questions, compressor, seeds)
        stable = (self._signal(found, found.kept) >= self.threshold).tolist()
        doubled = None if self.fallback == "full" else larger(compressor, found.own.shape[1])
        if doubled is None:
            return [compressor if one else None for one in stable]
        more = (2 * found.kept).clamp_max(found.own.shape[1])
        enough = (self._signal(found, more) >= self.threshold).tolist()
        return [
            compressor if one else doubled if two else None
            for one, two in zip(stable, enough, strict=True)
        ]

    def stability(
        self,
        model: LVLM,
        images: Tensor,
        questions: Sequence[str],
        compressor: Compressor,
        seeds: Sequence[int],
    ) -> Tensor:
        """The signal of each picture, ``[B]`` in [0, 1]; arguments as of `choose`."""
        self._check(compressor)
        found = self.ranked(model, images, questions, compressor, seeds)
        return self._signal(found, found.kept)

    @torch.no_grad()
    def ranked(
        self,
        model: LVLM,
        images: Tensor,
        questions: Sequence[str],
        compressor: Compressor,
        seeds: Sequence[int],
    ) -> Ranked:
        """The compressor's scores of the pictures, and in one batch of their views."""
        view = cast(CompressedView, model.view(Knowledge.COMPRESSED, compressor))
        asked = tuple(questions)
        own = view.rank(images, asked)
        kept = own.kept.sum(1)
        if self.signal == "gap":
            return Ranked(precise(own.score), (), kept)
        generators = [torch.Generator().manual_seed(drawn(self.name, seed)) for seed in seeds]
        layout = model.layout((images.shape[-2], images.shape[-1]))
        views = self._consensus().look_again(images, layout, generators)
        ranking = view.rank(torch.cat([one.images for one in views]), asked * len(views))
        parts = zip(views, precise(ranking.score).chunk(len(views)), strict=True)
        return Ranked(precise(own.score), tuple(one.align(score) for one, score in parts), kept)

    def _signal(self, found: Ranked, count: Tensor) -> Tensor:
        if self.signal == "gap":
            return boundary_gap(found.own, count)
        if self.signal == "kendall":
            return rank_agreement(found.own, found.others)
        return overlap((found.own, *found.others), count)

    def _consensus(self) -> TranslationConsensus:
        return TranslationConsensus(shift=self.shift, views=self.views, number=self.number)

    def _check(self, compressor: Compressor) -> None:
        reason = self.refuses(compressor)
        if reason is not None:
            raise DefenseError(
                f"defence {self.name} does not go with compressor {compressor.name}: {reason}"
            )


def overlap(scores: Sequence[Tensor], count: Tensor) -> Tensor:
    """Mean Jaccard index of the `count` best tokens over all pairs of scores, ``[B]``.

    Args:
        scores: two or more ``[B, V]``.
        count: long ``[B]``, 1 ≤ count ≤ V.
    """
    best = [top_k_mask(score, count) for score in scores]
    pairs = [
        (one & two).sum(1) / (one | two).sum(1) for one, two in itertools.combinations(best, 2)
    ]
    return torch.stack(pairs).mean(0)


def boundary_gap(score: Tensor, count: Tensor) -> Tensor:
    """``g / (1 + g)`` with ``g = (s_(K) − s_(K+1)) / std(s)``, ``[B]`` in [0, 1].

    1 where nothing is dropped, 0 where the boundary is a tie, so also where all scores are equal.

    Args:
        score: ``[B, V]``.
        count: long ``[B]``, K.
    """
    last = score.shape[1]
    falling = score.sort(dim=1, descending=True).values
    at = torch.stack([count - 1, count.clamp_max(last - 1)], 1)
    edge = falling.gather(1, at)
    gap = (edge[:, 0] - edge[:, 1]) / (score.var(1, correction=0) + TINY).sqrt()
    return (gap / (1 + gap)).masked_fill(count >= last, 1)


def rank_agreement(own: Tensor, others: Sequence[Tensor]) -> Tensor:
    """``(τ + 1) / 2``, τ Kendall's rank correlation with each other score, mean; ``[B]``.

    Ties count as neither order. 1 of a single token.

    Args:
        own: ``[B, V]``.
        others: one or more ``[B, V]``.
    """
    tokens = own.shape[1]
    if tokens == 1:
        return torch.ones_like(own[:, 0])

    def order(score: Tensor) -> Tensor:  # of one picture, so that memory is V², not B · V²
        return (score[:, None] - score[None]).sign()

    rows = []
    for index, row in enumerate(own):
        mine = order(row)
        total = sum(float((mine * order(other[index])).sum()) for other in others)
        rows.append(total / (len(others) * tokens * (tokens - 1)))
    return (own.new_tensor(rows) + 1) / 2


def larger(compressor: Compressor, tokens: int) -> Compressor | None:
    """The compressor with twice the budget; None where that is all tokens.

    Args:
        compressor: with a budget.
        tokens: V of the pictures at hand.
    """
    if isinstance(compressor, Wrapped):
        base = larger(compressor.base, tokens)
        return None if base is None else replace(compressor, base=base)
    if 2 * compressor.budget(tokens) >= tokens:
        return None
    if compressor.retention is not None:
        return replace(compressor, retention=2 * compressor.retention)  # type: ignore[type-var]
    return replace(compressor, keep_tokens=2 * (compressor.keep_tokens or 1))  # type: ignore[type-var]


def threshold_for(stability: Sequence[float], rate: float) -> float:
    """The threshold under which at most a share `rate` of these signals fall back.

    Args:
        stability: signals of clean pictures, one at least, none of which is tested on later.
        rate: in [0, 1).

    Raises:
        DefenseError: for no signals, or a rate out of range.
    """
    if not stability or not 0 <= rate < 1:
        raise DefenseError(
            f"a threshold for a fall-back rate of {rate!r} from {len(stability)} signals; give a "
            "rate in [0, 1) and one signal at least"
        )
    found = sorted(stability)[math.floor(rate * len(stability))]
    # 1 would be "always", and the most stable pictures are not meant.
    return min(max(found, 0.0), math.nextafter(1.0, 0.0))


def calibrated(
    model: LVLM,
    compressor: Compressor,
    images: Tensor,
    questions: Sequence[str],
    rate: float = 0.05,
    margin: RankMargin | None = None,
) -> RankMargin:
    """The defence with a threshold under which a share `rate` of clean pictures falls back.

    Args:
        model: the target.
        compressor: in use.
        images: clean, ``[n, 3, H, W]`` in [0, 1], **of another split than is tested on**; the rate
            on new pictures differs by about ``sqrt(rate (1 − rate) / n)``.
        questions: n texts.
        rate: of falling back, in [0, 1).
        margin: signal, views and the like; its threshold is replaced. None is the default.

    Raises:
        DefenseError: for a compressor it has no meaning for, or no pictures.
    """
    margin = margin or RankMargin()
    found: list[float] = []
    for start in range(0, len(images), _BATCH):
        some, asked = images[start : start + _BATCH], questions[start : start + _BATCH]
        found += margin.stability(model, some, asked, compressor, [0] * len(asked)).tolist()
    return replace(margin, threshold=threshold_for(found, rate))
