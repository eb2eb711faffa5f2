"""VASparse: attend sparsely to what matters for the picture, and contrast without a second pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from defenses.base import AdaptiveRoute, DefenseError
from defenses.decoding import DecodingDefense, contrasted, cut, plausible
from defenses.vasparse_attention import OldestMean, SparseAttention, SparseOptions
from targets.compression.scoring import TINY
from targets.decoding import AttentionRule, Step


@dataclass(frozen=True, kw_only=True)
class VASparse(DecodingDefense):
    """Visual-aware token sparsification, sparse visual contrastive decoding, and a sink penalty.

    Paper: Zhuang et al., "VASparse: Towards Efficient Visual Hallucination Mitigation via
    Visual-Aware Token Sparsification" (CVPR 2025, arXiv 2501.06553). For every token said:

    1. In each layer and head the present token attends to the S columns with the largest
       ``δ_i = a_i² + λ P_i``, which minimise Eq. 3 (Theorem 1, Eq. 4); P is the softmax over tokens
       of the attention each pays to visual tokens (Eq. 5). Dropped columns are merged.
    2. Attention logits become ``(1 + β) A − β W ∘ A``, W the softmax of the attention each column
       received (Eq. 7).
    3. A token scores ``(1 + α) l_θ − α l_φ`` (Eq. 6) if ``p_θ ≥ b · max p_θ``, where l_φ is the
       head on masked visual embeddings, without any decoder layer.
    4. Beams: 3 for 64 new tokens, 2 for 512. Compare with `BeamSearch`, not with greedy decoding.

    It was made against hallucination and never evaluated under attack. It acts behind the prefill:
    visual tokens that a compressor has dropped do not come back, so it is expected to help little
    against an attack on the ranking [inferred], stacked on whatever compressor. Switches off,
    it is plain decoding bit for bit.

    Args:
        variant: ``paper``; or ``repo_compat``, what the released code does instead of it (static
            reading of VASparse-github at 4929816, which does not run as published): no selection
            and no sink penalty; in layer 0 the oldest tenth of the generated tokens, counted in
            whole `interval`s, is one mean token; a token scores ``log p − log p_0 − α l_φ`` if
            ``p ≥ b · max p``, with l_φ the head on the last token's embedding and p_0 its softmax.
        select: whether to do the first part (``repo_compat``: the merging).
        svcd: whether to do the third.
        sink: whether to do the second.
        keep: S in (0, 1], a share of the columns there are.
        saliency: λ ≥ 0.
        alpha: α ≥ 0.
        beta: β ≥ 0.
        cutoff: b in [0, 1].
        score_space: of a in δ: ``prob`` is attention itself; ``logit`` the unscaled q · K_i of the
            formula, whose square also ranks strongly negative ones high.
        merge: dropped columns of a head: ``none`` lets them go, ``mean`` makes one token of them,
            ``dpcknn_sum`` sums up clusters of keys and values, as published.
        apply_on: the sink penalty on attention logits, or on attention itself (ablation).
        phi_input: what l_φ looks at: the ``last_token``'s embedding; the mean of the visual
            embeddings that the mask left (``masked_visual_mean``); or each of them by itself, with
            their probabilities averaged (``masked_visual_pos``).
        mask_rate: share of the visual tokens masked for l_φ, in [0, 1), rounded; one stays.
        stop_layer: depth whose state of the last token is the ``last_token`` input.
        interval: see `variant`.
        beams: width of the search.
        length_penalty: see `DecodingDefense`.

    Raises:
        DefenseError: for an option outside its range, or a `stop_layer` with masked visual tokens.

    Costs no second pass: the attention of one query in each layer, and the head once more.
    ``dpcknn_sum`` clusters in every head and layer for every token and is slow. Adaptive attack:
    teacher-forced through Eq. 6, straight-through the top-S and through the soft W and P; EOT over
    the mask where `phi_input` draws one. With ``last_token`` l_φ does not depend on the picture.

    *Differs from the paper in …* [inferred where not said otherwise]: which layer's attention P is
    made from is not public [unknown], each layer uses its own here; so is the number of clusters
    [unknown], as in SparseVLM. ``none`` is the default of `merge`: a sum of keys multiplies the
    attention logit. W is the head mean and both use unmasked attention, the present token's
    included. A merged token is no sink. Which position l_φ is read at is not public [unknown],
    hence `phi_input`. Masks are drawn once for each sample and stay for the whole answer.
    Keys of dropped columns stay in the cache: the next token selects anew.
    """

    name: ClassVar[str] = "vasparse"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.EOT
    stochastic: ClassVar[bool] = True

    variant: Literal["paper", "repo_compat"] = "paper"
    select: bool = True
    svcd: bool = True
    sink: bool = True
    keep: Annotated[float, Interval(gt=0, le=1)] = 0.9
    saliency: Annotated[float, Ge(0)] = 0.1
    alpha: Annotated[float, Ge(0)] = 0.1
    beta: Annotated[float, Ge(0)] = 0.1
    cutoff: Annotated[float, Interval(ge=0, le=1)] = 0.1
    score_space: Literal["prob", "logit"] = "prob"
    merge: Literal["none", "mean", "dpcknn_sum"] = "none"
    apply_on: Literal["logit", "prob"] = "logit"
    phi_input: Literal["last_token", "masked_visual_mean", "masked_visual_pos"] = "last_token"
    mask_rate: Annotated[float, Interval(ge=0, lt=1)] = 0.5
    stop_layer: Annotated[int, Ge(0)] = 0
    interval: Annotated[int, Ge(1)] = 16
    beams: Annotated[int, Ge(1)] = 3

    def __post_init__(self) -> None:
        """Check the options, then that they agree."""
        super().__post_init__()
        if self.stop_layer and self._masks:
            raise DefenseError(
                f"defence {self.name}: stop_layer is {self.stop_layer} with phi_input "
                f"{self.phi_input!r}; masked visual tokens go to the head without any layer, so "
                "leave stop_layer at 0 or take last_token"
            )

    @property
    def _masks(self) -> bool:
        return self.variant == "paper" and self.phi_input != "last_token"

    @property
    def _contrasts(self) -> bool:
        return self.svcd and (self.alpha > 0 or self.variant == "repo_compat")

    @property
    def draws(self) -> bool:
        """Where visual tokens are masked at random."""
        return self._contrasts and self._masks

    @property
    def looks_at_entry(self) -> bool:
        """For the visual embeddings."""
        return self.draws

    def depths(self, layers: int) -> tuple[int, ...]:
        """Where the last token's state is read for l_φ."""
        del layers
        if not self._contrasts or self._masks:
            return ()
        return (self.stop_layer if self.variant == "paper" else 0,)

    def attention(self) -> AttentionRule | None:
        """Selection and sink penalty, as far as they are on; the code's merging."""
        if self.variant == "repo_compat":
            return OldestMean(self.interval) if self.select else None
        keep, beta = self.keep if self.select else 1.0, self.beta if self.sink else 0.0
        if keep == 1 and not beta:
            return None
        return SparseAttention(
            SparseOptions(keep, self.saliency, beta, self.score_space, self.apply_on, self.merge)
        )

    def logits(self, step: Step) -> Tensor:
        """Contrasted with l_φ."""
        if not self._contrasts:
            return step.logits
        if self._masks:
            return contrasted(step.logits, self._blind(step), self.alpha, self.cutoff)
        phi = next(iter(step.early.values()))
        if self.variant == "paper":
            return contrasted(step.logits, phi, self.alpha, self.cutoff)
        final = step.logits.log_softmax(-1)
        score = final - phi.log_softmax(-1) - self.alpha * phi
        return cut(score, plausible(final, self.cutoff))

    def _blind(self, step: Step) -> Tensor:
        """l_φ of masked visual embeddings, the same at all R positions: ``[B, 1, vocabulary]``."""
        if step.entered is None or step.visual is None:
            raise DefenseError(f"defence {self.name}: nothing entered the language model")
        kept = unmasked(step.visual, step.seeds, self.mask_rate)
        weights = kept / kept.sum(1, keepdim=True).clamp_min(1)
        if self.phi_input == "masked_visual_mean":
            mean = weights[:, None].to(step.entered.dtype) @ step.entered
            return step.head(mean)
        each = step.head(step.entered).softmax(-1)  # [B, n, vocabulary]
        return (weights[:, None].to(each.dtype) @ each + TINY).log()


def unmasked(visual: Tensor, seeds: Sequence[int], rate: float) -> Tensor:
    """Visual columns that a random mask leaves, the same whenever a seed is used again.

    Args:
        visual: bool ``[B, n]``.
        seeds: B, one a row.
        rate: share that is masked; of v columns ``round(rate · v)``, but one stays.

    Returns:
        bool ``[B, n]``.
    """
    kept = torch.zeros_like(visual)
    for row, seed in enumerate(seeds):
        places = visual[row].nonzero()[:, 0]
        number = len(places)
        left = min(number, max(1, number - round(rate * number)))
        order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
        kept[row, places[order[:left].to(places.device)]] = True
    return kept
