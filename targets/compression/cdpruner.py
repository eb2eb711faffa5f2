"""CDPruner: a determinantal point process of visual tokens, weighted by the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from targets.compression.base import Compressor, Scores, Seen, Stage
from targets.compression.divprune import places_of
from targets.compression.scoring import gather_rows, precise, standardised_log
from targets.compression.tiles import Tiles
from targets.errors import CompressionError

_LEAST = 1e-6
"""Conditional variances are no smaller: below is rounding. Also added to relevances, officially."""
_RIDGE = 1e-4
"""On the diagonal of the chosen tokens' similarity when the score is worked out with gradients."""


@dataclass(frozen=True, kw_only=True)
class CDPruner(Compressor):
    """Keep tokens that are relevant to the question and unlike one another, by greedy DPP-MAP.

    Paper: Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token
    Pruning in MLLMs" (NeurIPS 2025, arXiv 2506.10967). With S the cosine similarity of projected
    tokens and r their relevance, scaled to ``(r − min + 1e-6) / (max − min)`` over the image, the
    kernel is ``L_ij = r_i S_ij r_j``. Tokens are chosen one by one, each time the one that raises
    ``log det L`` of the chosen most (fast greedy MAP, Chen et al. 2018, arXiv 1709.05135).

    A picture of several tiles is done tile by tile, the budget shared out by their sizes; row
    separators stay.

    Args:
        relevance: ``embeddings``: mean cosine of the projected token with the language model's own
            embeddings of the text behind the last image (all text, if none is behind it); ``none``:
            every token is as relevant.
        sign: what counts as relevant: likeness to the text (positive) or unlikeness (negative).
        theta: weight of relevance in [0, 1): the kernel uses ``exp(theta / (2 (1 − theta)) · r)``
            in place of r; None is r itself, as in the official code.
        retention: kept ÷ all visual tokens, in (0, 1].
        keep_tokens: visual tokens kept of each image, ≥ 1, instead of retention.
        positions: the official code makes position ids contiguous.

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: for LLaVA the paper measures relevance with CLIP's text tower,
    and takes its *negative*, because CLIP's patch features oppose its text features. A model inside
    a session shows token embeddings, not text, and LLaVA's checkpoints hold no text tower; so
    relevance comes from the model's own embeddings with positive sign, as ports to other models
    do [secondary]. Relevance is scaled over each image, not over the batch. Equal relevances
    count as 1. The score is ours, the paper has none: what the token would add, and did for those
    chosen, ``r_i² · (S_ii − S_iC S_CC⁻¹ S_Ci)`` with C the tokens chosen before (with 1e-4 on the
    diagonal of S_CC); the kept tokens are the greedy choice. The score is differentiable, the
    order is not.
    """

    name: ClassVar[str] = "cdpruner"

    relevance: Literal["embeddings", "none"] = "embeddings"
    sign: Literal["positive", "negative"] = "positive"
    theta: Annotated[float, Interval(ge=0, lt=1)] | None = None
    retention: Annotated[float, Interval(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Ge(1)] | None = None
    positions: Literal["keep", "reindex"] = "reindex"

    @property
    def stage(self) -> Stage:
        """Before the language model."""
        return Stage.INPUT

    def score(self, seen: Seen) -> Scores:
        """What a token adds or would add, ``[I, V]``."""
        features = precise(seen.features).masked_fill(~seen.valid[..., None], 0)
        unit = torch.nn.functional.normalize(features, dim=-1)
        weight = self._weight(self._relevance(unit, seen), seen.valid)
        tiles = Tiles.of(seen.lattice, seen.valid)
        unit, weight, counts = tiles.split(unit), tiles.split(weight), tiles.share(seen.counts)
        similarity = _exact(unit @ unit.transpose(1, 2))
        order = greedy_map(similarity.detach(), weight.detach(), counts, tiles.present)
        gain = marginal_gain(similarity, weight, order, counts)
        score = tiles.join(gain.masked_fill(~tiles.present, 0))
        chosen = tiles.join(places_of(order, counts, tiles.present.shape[1]) < counts[:, None])
        return Scores(score, standardised_log(score, seen.valid), chosen=chosen)

    def _relevance(self, unit: Tensor, seen: Seen) -> Tensor:
        """Mean cosine with the text, ``[I, V]``."""
        if self.relevance == "none":
            return unit.new_zeros(unit.shape[:2])
        text = seen.text
        if text is None:
            raise CompressionError("cdpruner needs the prompt's text for its relevance")
        behind = text.words_after()
        words = torch.where(behind.any(1, keepdim=True), behind, text.words)
        embeds = precise(text.embeds).masked_fill(~words[..., None], 0)
        total = torch.nn.functional.normalize(embeds, dim=-1).sum(1)
        mean = (total / words.sum(1, keepdim=True).clamp_min(1))[seen.rows]
        relevance = (unit @ mean[..., None]).squeeze(-1)
        return relevance if self.sign == "positive" else -relevance

    def _weight(self, relevance: Tensor, valid: Tensor) -> Tensor:
        """Factor of each token in the kernel, ``[I, V]``."""
        low = relevance.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
        span = relevance.masked_fill(~valid, -torch.inf).amax(1, keepdim=True) - low
        flat = ~(span > 0) | ~span.isfinite()
        scaled = (relevance - low.masked_fill(flat, 0) + _LEAST) / span.masked_fill(flat, 1)
        scaled = torch.where(flat | ~valid, torch.ones_like(scaled), scaled)
        if self.theta is None:
            return scaled
        return torch.exp(self.theta / (2 * (1 - self.theta)) * scaled)


def _exact(similarity: Tensor) -> Tensor:
    """A token is as like itself as any other is: rounding shall not decide between equal ones."""
    own = torch.eye(similarity.shape[1], dtype=torch.bool, device=similarity.device)
    return torch.where(own & (similarity > 0.5), torch.ones_like(similarity), similarity)


@torch.no_grad()
def greedy_map(similarity: Tensor, weight: Tensor, counts: Tensor, valid: Tensor) -> Tensor:
    """Greedy order ``[I, K]`` of the subset with the largest ``log det`` of ``w_i S_ij w_j``.

    With C the Cholesky factor of S over the chosen, token i would add the conditional variance
    ``w_i² (1 − |c_i|²)``, where c_i are its entries in the rows of that factor.

    Args:
        similarity: ``[I, V, V]``, S, symmetric, positive semi-definite.
        weight: ``[I, V]``, w > 0.
        counts: long ``[I]``; K is the largest. Only the first `counts` of a row mean anything.
        valid: bool ``[I, V]``, tokens that may be chosen.
    """
    images, tokens = weight.shape
    steps = max(1, int(counts.amax()))
    rows = similarity.new_zeros(images, steps, tokens)
    left = similarity.diagonal(dim1=1, dim2=2).clone()
    free = valid.clone()
    order = []
    for step in range(steps):
        gain = weight.square() * left.clamp_min(_LEAST)
        chosen = gain.masked_fill(~free, -torch.inf).argmax(1, keepdim=True)
        order.append(chosen)
        before = gather_rows(rows[:, :step].transpose(1, 2), chosen)  # [I, 1, step]
        row = gather_rows(similarity, chosen) - before @ rows[:, :step]
        scale = left.gather(1, chosen).clamp_min(_LEAST).sqrt()
        rows[:, step] = row.squeeze(1) / scale
        left = left - rows[:, step].square()
        free = free.scatter(1, chosen, False)
    return torch.cat(order, 1)


def marginal_gain(similarity: Tensor, weight: Tensor, order: Tensor, counts: Tensor) -> Tensor:
    """The score ``[I, V]`` of `CDPruner`, live in ``similarity [I, V, V]`` and ``weight [I, V]``.

    Args:
        similarity: S.
        weight: w.
        order: long ``[I, K]``, greedy.
        counts: long ``[I]``, entries of `order` that count.
    """
    tokens, width = weight.shape[1], order.shape[1]
    real = torch.arange(width, device=order.device) < counts[:, None]
    rows = gather_rows(similarity, order)  # [I, K, V]
    core = rows.gather(2, order[:, None].expand(-1, width, -1))
    # Entries past the count stand alone, so that they change nothing.
    one = torch.eye(width, dtype=core.dtype, device=core.device)
    both = real[:, :, None] & real[:, None]
    core = torch.where(both, core, one) + _RIDGE * one
    factor = torch.linalg.cholesky(core)
    explained = torch.linalg.solve_triangular(factor, rows, upper=False).square()
    steps = torch.arange(width, device=order.device)[:, None]
    place = places_of(order, counts, tokens)
    earlier = (steps < place[:, None]) & real[..., None]
    left = similarity.diagonal(dim1=1, dim2=2) - (explained * earlier).sum(1)
    gain: Tensor = weight.square() * left.clamp_min(_LEAST)
    return gain
