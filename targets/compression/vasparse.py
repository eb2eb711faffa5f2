"""VASparse's token sparsification: keep what is attended to or itself looks at the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from targets.compression.aggregation import Groups, appended, density_peaks, members_of
from targets.compression.base import Cut, Merged, Scores, Seen, Selection, Stage, numbered
from targets.compression.budgets import power_stages
from targets.compression.raters import all_keys, at_images, attention_rows, precise, sight_of
from targets.compression.scoring import standardised, top_k_mask
from targets.compression.sight import TextSight
from targets.compression.sparsevlm import chosen
from targets.compression.staged import Staged
from targets.errors import CompressionError

_CHUNK: Final = 128
_SCORES: Final = "scores"


@dataclass(frozen=True, kw_only=True)
class VASparse(Staged):
    """Keep the visual tokens that are best for attention recall and visual saliency together.

    Paper: Zhuang et al., "VASparse: Towards Efficient Visual Hallucination Mitigation via
    Visual-Aware Token Sparsification" (CVPR 2025, arXiv 2501.06553), Eq. 3 to 5. The score of a
    token is ``δ_i = a_i² + λ P_i``: a is the attention of the last prompt token, and P the softmax
    over the prompt's tokens of the attention they pay to image tokens. Keeping the S largest
    minimises ``Σ (a_i − M_i a_i)² − λ P_i M_i`` over sets M of S tokens (Theorem 1). Layers run in
    full and their output is pruned, the same share at each stage.

    The paper does this for every generated token on the cache of keys and values, and its aim is
    fewer hallucinations; here the prompt's visual tokens are dropped once, at prefill. The
    contrastive decoding and the penalty on sinks that go with it are no compression.

    Args:
        layers: 0-based layers at whose inputs tokens are dropped, by the attention of the layer
            before; None is 3, 7, 16, 20 of 32 (the code counts the ranking layers 2, 6, 15, 19),
            moved in proportion to the model's depth.
        retention: kept ÷ all visual tokens, in (0, 1]; each of S stages keeps its S-th root. The
            code's default, 0.75 a stage, is 0.316.
        keep_tokens: visual tokens kept of each image, ≥ 1, instead of retention.
        budget_is: ``final`` means what the last stage leaves, ``average`` the mean over all layers
            of the language model.
        saliency: λ ≥ 0; 0.1 in the paper, 1 in the code. Attention of single tokens being far below
            P, it means something for one `score_space` only.
        score_space: ``prob`` squares the head-mean attention, as the code does; ``logit`` takes the
            head-mean of ``(q · K_i)²``, the formula, for which strongly negative logits count too.
        aggregate: ``sum`` clusters dropped tokens by density peaks and appends the sum of each
            cluster, within the budget; ``none`` lets them go.
        positions: whether kept tokens keep their position ids.

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: it selects per attention head and generated token, on the cache;
    a token that leaves the sequence leaves all heads, so heads are averaged. Which layer's
    attention P is made from is not public [unknown]: here the ranking layer's, its last head, as
    in the paper. The paper sums clusters of keys and values; summing hidden states is not the same,
    hence ``none``. How many clusters it makes is not public [unknown]: as in SparseVLM, whose code
    it builds on. The released prefill path does not run; positions are ours [inferred].
    """

    name: ClassVar[str] = "vasparse"
    official_layers: ClassVar[tuple[int, ...]] = (3, 7, 16, 20)

    budget_is: Literal["final", "average"] = "final"
    saliency: Annotated[float, Ge(0)] = 0.1
    score_space: Literal["prob", "logit"] = "prob"
    aggregate: Literal["none", "sum"] = "none"
    positions: Literal["keep", "reindex"] = "keep"

    @property
    def merges(self) -> bool:
        """It makes clusters if it aggregates."""
        return self.aggregate == "sum"

    @property
    def attends(self) -> bool:
        """It squares an attention."""
        return True

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One behind each ranking layer; clusters are made of that layer's output."""
        found: list[Cut] = []
        for layer in self.drops_at(layers):
            if self.merges:
                look = Cut(Stage.LAYER, layer - 1, attends=True, drops=False)
                found += [look, Cut(Stage.LAYER, layer)]
            else:
                found.append(Cut(Stage.LAYER, layer, layer - 1, attends=True))
        return numbered(found)

    def stages(self, tokens: int, final: int, number: int) -> tuple[int, ...]:
        """The same share at each stage."""
        return power_stages([0.5 ** (i + 1) for i in range(number)], tokens, final)

    def look(self, seen: Seen) -> None:
        """Rank at the ranking layer and remember it for the cut behind."""
        seen.memory[_SCORES] = self._rank(seen)

    def score(self, seen: Seen) -> Scores:
        """``a² + λ P``, ``[I, V]``."""
        if not self.merges:
            return self._rank(seen)
        found: Scores | None = seen.memory.get(_SCORES)
        if found is None:
            raise CompressionError("vasparse ranks at the layer before its cut, which has not run")
        return found

    def _rank(self, seen: Seen) -> Scores:
        if seen.attention is None or seen.query is None or seen.keys is None:
            raise CompressionError("vasparse needs the attention of the last prompt token")
        if self.score_space == "prob":
            recall = seen.attention.mean(1).square()
        else:
            logits = (precise(seen.keys) @ precise(seen.query)[..., None]).squeeze(-1)
            recall = logits.square().mean(1)
        score = recall + self.saliency * saliency(sight_of(seen))
        score = score.masked_fill(~seen.valid, 0)
        return Scores(score, standardised(score, seen.valid))

    def select(self, scores: Scores, seen: Seen) -> Selection:
        """The best tokens, and clusters of the others if asked for."""
        counts = seen.counts
        if self.merges:
            pairs = zip(seen.valid.sum(1).tolist(), counts.tolist(), strict=True)
            counts = torch.tensor([chosen(*pair) for pair in pairs], device=counts.device)
        return self.complete(top_k_mask(scores.score, counts, seen.valid), seen)

    def complete(self, kept: Tensor, seen: Seen) -> Selection:
        """Clusters of the dropped tokens for a given kept set."""
        if not self.merges:
            return Selection(kept)
        dropped = seen.valid & ~kept
        room = torch.minimum((seen.counts - kept.sum(1)).clamp_min(0), dropped.sum(1))
        groups = density_peaks(seen.features, dropped, room, self.score(seen).score)
        return Selection(kept, groups.targets, groups.assignment)

    def merge(self, selection: Selection, seen: Seen) -> Merged | None:
        """Kept tokens in order, then the sum of each cluster."""
        if selection.targets is None or selection.assignment is None:
            return None
        groups = Groups(selection.targets, selection.assignment)
        own, others, _ = members_of(seen.features, groups)
        return appended(seen.features, selection.kept, selection.targets, own + others)


def saliency(text: TextSight) -> Tensor:
    """P of Eq. 5 at the visual tokens, ``[I, V]``.

    Softmax over the living prompt columns of a row of the attention each of them pays, in the last
    head, to the image tokens of the row; values lie between 1/(e n) and e/n.
    """
    rows, length = text.live.shape
    images = text.slots.spread(text.slots.alive.float(), length, rows)  # [B, n]
    columns = torch.arange(length, device=images.device).expand(rows, length)
    keys = all_keys(text)
    mass = torch.cat(
        [
            (attention_rows(text, here, keys, slice(-1, None))[:, 0] * images[:, None]).sum(-1)
            for here in torch.split(columns, _CHUNK, 1)
        ],
        1,
    )
    prompt = text.live & (columns <= text.last)
    weight = mass.masked_fill(~prompt, torch.finfo(mass.dtype).min).softmax(-1)
    return at_images(text, weight)
