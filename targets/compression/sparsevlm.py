"""SparseVLM: words that say most about the image rate its tokens; some dropped ones return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from targets.compression.aggregation import Groups, appended, density_peaks, members_of
from targets.compression.base import Cut, Merged, Scores, Seen, Selection, Stage, numbered
from targets.compression.budgets import descending, power_stages, table_stages
from targets.compression.raters import (
    all_keys,
    at_images,
    attention_rows,
    compact,
    precise,
    raters,
    rates,
    sight_of,
)
from targets.compression.scoring import TINY, log_probability, standardised, top_k_mask
from targets.compression.sight import TextSight
from targets.compression.staged import Staged
from targets.errors import CompressionError
from targets.families.base import rotate

_WHOLE: Final = 576
_LISTS: Final = {
    "v1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "v2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
"""Tokens chosen at each stage, of 576, by the number the authors call a setting by."""
_HEADS: Final = 14
_CHUNK: Final = 64
_WIDTH: Final = 0.5
"""Of the sigmoid in the relaxed count of raters, in units of the log-rate."""
_WEAKEST: Final = 1e-3
"""Gravity nearer to zero than this would make infinite scores."""


@dataclass(frozen=True, kw_only=True)
class SparseVLM(Staged):
    """Keep the tokens that the image's own words attend to; cluster the best of the others.

    Paper: Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model
    Inference" (ICML 2025, arXiv 2410.04417), code v1.5 and v2.0 ("SparseVLM+"). Raters are chosen
    once, on the input embeddings: softmax over the text behind the image of ``V Tᵀ``, mean over the
    image; text tokens above the mean rate. A stage runs a layer in full; its score is that layer's
    attention, mean over heads and raters; the tokens that enter the next layer are the best ones.

    ``v1.5`` recycles: of the dropped tokens the best ``int(0.3 n) + 1`` are clustered by density
    peaks into ``int(m / 10) + 1`` groups, whose means follow the kept tokens. ``v2.0`` divides the
    attention by what rotary embedding alone would make of it ("gravity": rotated vectors of ones,
    scaled), takes the 14 heads in which raters give the image most, and recycles nothing. ``rank``
    is the older adaptive rule: at most ``int(13.5 · rank)`` tokens are chosen, with the rank of the
    matrix of raters × image tokens.

    Args:
        layers: 0-based layers at whose inputs tokens are dropped, by the attention of the layer
            before; None is 3, 7, 16 of 32 (the authors count the ranking layers 2, 6, 15), moved in
            proportion to the model's depth.
        retention: kept ÷ all visual tokens, in (0, 1]; counts recycled tokens. For ``rank`` it is
            the most that is kept; 1 leaves the rule alone.
        keep_tokens: visual tokens kept of each image, ≥ 1, instead of retention.
        budget_is: ``final`` means what the last stage leaves, ``average`` the mean over all layers
            of the language model, ``official`` the name of a published list (192, 128, 96 or 64 of
            576). Between lists, and for other sizes of images, counts are interpolated.
        variant: which code to follow.
        recycling: whether dropped tokens come back as clusters; None is as the variant has it.
        positions: None is as the variant has it: v1.5 and rank number the tokens anew, v2.0 keeps
            their position ids.
        heads: heads that count in v2.0, ≥ 1; None is the official 14, or half of them in models
            with fewer than 28.
        head_share: heads that count in v2.0 as a share of all, in (0, 1], instead of heads.
        rank_scale: tokens for each unit of rank, > 0 (rank).

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: instead of noise on the densities, of equally dense tokens the
    one with the larger score counts as denser. Where no text follows the image the last prompt
    token rates; where no text token is above the mean, all rate. Several images of a prompt share
    its raters and have budgets of their own [inferred]. Gravity nearer to zero than 1e-3 is moved
    there. The published lists hold the chosen tokens only; ours count clusters too, so that a
    budget is what is really left. The rank's tolerance is that of `torch.linalg.matrix_rank`.
    """

    name: ClassVar[str] = "sparsevlm"
    official_layers: ClassVar[tuple[int, ...]] = (3, 7, 16)

    budget_is: Literal["final", "average", "official"] = "final"
    variant: Literal["v1.5", "v2.0", "rank"] = "v1.5"
    recycling: bool | None = None
    positions: Literal["keep", "reindex"] | None = None
    heads: Annotated[int, Ge(1)] | None = None
    head_share: Annotated[float, Interval(gt=0, le=1)] | None = None
    rank_scale: Annotated[float, Gt(0)] = 13.5

    def __post_init__(self) -> None:
        """Check budget, layers and heads."""
        super().__post_init__()
        if self.heads is not None and self.head_share is not None:
            raise CompressionError(
                f"compressor sparsevlm: give heads ({self.heads}) or head_share "
                f"({self.head_share}), not both"
            )

    @property
    def recycles(self) -> bool:
        """Whether dropped tokens come back as clusters."""
        return self.variant != "v2.0" if self.recycling is None else self.recycling

    @property
    def merges(self) -> bool:
        """It makes clusters if it recycles."""
        return self.recycles

    @property
    def reindexes(self) -> bool:
        """As the variant, unless `positions` says otherwise."""
        if self.positions is None:
            return self.variant != "v2.0"
        return self.positions == "reindex"

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """A look at each ranking layer and a cut behind it; one cut does where nothing returns.

        Clusters are made of the ranking layer's *output*, which a cut that looks earlier does not
        have.
        """
        found: list[Cut] = []
        for layer in self.drops_at(layers):
            if self.recycles:
                found += [Cut(Stage.LAYER, layer - 1, drops=False), Cut(Stage.LAYER, layer)]
            else:
                found.append(Cut(Stage.LAYER, layer, layer - 1))
        return numbered(found)

    # Budgets ------------------------------------------------------------------------------------

    def stages(self, tokens: int, final: int, number: int) -> tuple[int, ...]:
        """Counts in the proportions of the published lists, found by their last one."""
        rows = self._lists()
        if number != len(rows[0][1]):
            return power_stages([0.5 ** (i + 1) for i in range(number)], tokens, final)
        table = [(counts[-1], counts) for _, counts in rows]
        mixed = table_stages(table, _WHOLE, tokens, final)
        return descending([one + 0.5 for one in mixed[:-1]], tokens, final)

    def official_stages(self, tokens: int, wanted: int, layers: int) -> tuple[int, ...]:
        """Counts of the list of that name."""
        if len(self.starts(layers)) != len(self.official_layers):
            raise CompressionError(
                f"compressor sparsevlm: the published lists are for three stages, layers has "
                f"{len(self.starts(layers))}; choose budget_is final or average"
            )
        mixed = [one + 0.5 for one in table_stages(self._lists(), _WHOLE, tokens, wanted)]
        return descending(mixed[:-1], tokens, max(1, int(mixed[-1])))

    def _lists(self) -> list[tuple[float, list[int]]]:
        """Published lists by name, clusters counted."""
        lists = _LISTS["v2.0" if self.variant == "v2.0" else "v1.5"]
        rows: list[tuple[float, list[int]]] = []
        for name, chosen in lists.items():
            before, counts = _WHOLE, list[int]()
            for one in chosen:
                before = one + (clusters(before - one) if self.recycles else 0)
                counts.append(before)
            rows.append((name, counts))
        return rows

    # Ranking ------------------------------------------------------------------------------------

    def look(self, seen: Seen) -> None:
        """Rank at the ranking layer and remember it for the cut behind."""
        seen.memory["scores"] = self._rank(seen)

    def score(self, seen: Seen) -> Scores:
        """Attention the raters give, ``[I, V]``; for v2.0 relative to gravity."""
        found = self._remembered(seen) if self.recycles else self._rank(seen)
        if self.variant != "rank":
            return found
        allowed = (seen.memory["rank"] * self.rank_scale).long().clamp_min(1)
        most = torch.minimum(self._chosen(seen), allowed)
        best = top_k_mask(found.score, most, seen.valid)
        return Scores(found.score, found.log_score, chosen=best)

    @property
    def count_varies(self) -> bool:
        """With the rule of the rank."""
        return self.variant == "rank"

    def soft_count(self, scores: Scores, seen: Seen) -> Tensor | None:
        """`rank_scale` times the raters, by a sigmoid of their log-rate above the mean, ``[I]``.

        There are no more ranks than raters, and as many unless two of them attend alike to within
        rounding. The budget, which may keep fewer, is left out.
        """
        del scores
        if not self.count_varies:
            return None
        rate, real = rates(seen)
        above = (rate + TINY).log() + real.sum(1, keepdim=True).clamp_min(1).log()
        soft = (torch.sigmoid(above / _WIDTH) * real).sum(1)
        return self.rank_scale * soft[seen.rows]

    def _remembered(self, seen: Seen) -> Scores:
        found: Scores | None = seen.memory.get("scores")
        if found is None:
            raise CompressionError("sparsevlm ranks at the layer before its cut, which has not run")
        return found

    def _rank(self, seen: Seen) -> Scores:
        text = sight_of(seen)
        rows = raters(seen)
        if self.variant == "v2.0":
            score = self._corrected(seen, text, rows).masked_fill(~seen.valid, 0)
            return Scores(score, standardised(score, seen.valid))
        if self.variant == "rank":
            seen.memory["rank"] = _rank_of(seen, text, rows)
        score = text.attention(rows).mean(1).masked_fill(~seen.valid, 0)
        return Scores(score, log_probability(score))

    def _corrected(self, seen: Seen, text: TextSight, rows: Tensor) -> Tensor:
        """Attention of the raters ÷ gravity, mean over the heads that give the image most."""
        columns, real = compact(rows)
        total, keys = torch.zeros((), device=rows.device), all_keys(text)
        for here, counts in zip(
            torch.split(columns, _CHUNK, 1), torch.split(real, _CHUNK, 1), strict=True
        ):
            paid = attention_rows(text, here, keys) / gravity(text, here)[:, None]
            total = total + (paid * counts[:, None, :, None]).sum(2)
        found = at_images(text, total / real.sum(1).clamp_min(1)[:, None, None])  # [I, N, V]
        found = found.masked_fill(~seen.valid[:, None], 0)
        best = top_k_mask(found.sum(2), self._heads(found.shape[1]))
        return (found * best[..., None]).sum(1) / best.sum(1, keepdim=True)

    def _heads(self, number: int) -> int:
        if self.head_share is not None:
            return max(1, round(self.head_share * number))
        return min(number, self.heads or min(_HEADS, max(1, number // 2)))

    # Choosing -----------------------------------------------------------------------------------

    def _chosen(self, seen: Seen) -> Tensor:
        """Tokens kept as they are so that clusters fill up the budget, ``[I]``."""
        if not self.recycles:
            return seen.counts
        pairs = zip(seen.valid.sum(1).tolist(), seen.counts.tolist(), strict=True)
        return torch.tensor([chosen(*pair) for pair in pairs], device=seen.counts.device)

    def select(self, scores: Scores, seen: Seen) -> Selection:
        """The best tokens, and the clusters the best of the others form."""
        kept = scores.chosen
        if kept is None:
            kept = top_k_mask(scores.score, self._chosen(seen), seen.valid)
        return self.complete(kept, seen)

    def complete(self, kept: Tensor, seen: Seen) -> Selection:
        """Clusters of the best dropped tokens for a given kept set."""
        if not self.recycles:
            return Selection(kept)
        score = self.score(seen).score
        dropped = seen.valid & ~kept
        number = dropped.sum(1)
        pool = torch.where(number > 0, (number * 3) // 10 + 1, number)
        wanted = torch.where(number > 0, pool // 10 + 1, number)
        room = (seen.counts - kept.sum(1)).clamp_min(0)
        members = top_k_mask(score, pool, dropped)
        groups = density_peaks(seen.features, members, torch.minimum(wanted, room), score)
        return Selection(kept, groups.targets, groups.assignment)

    def merge(self, selection: Selection, seen: Seen) -> Merged | None:
        """Kept tokens in order, then the mean of each cluster."""
        if selection.targets is None or selection.assignment is None:
            return None
        groups = Groups(selection.targets, selection.assignment)
        own, others, number = members_of(seen.features, groups)
        mean = (own + others) / (number + 1)
        return appended(seen.features, selection.kept, selection.targets, mean)


def clusters(dropped: int) -> int:
    """Clusters that so many dropped tokens leave behind: ``int((int(0.3 n) + 1) / 10) + 1``."""
    return ((dropped * 3) // 10 + 1) // 10 + 1 if dropped else 0


def chosen(before: int, total: int) -> int:
    """The most tokens kept as they are, such that with their clusters at most `total` are left.

    With k of `before` kept, ``k + clusters(before − k)`` grows by 0 or 1 with k, so every total
    from that of k = 1 on is met exactly; below it clusters are left out.
    """
    return max((k for k in range(1, before + 1) if k + clusters(before - k) <= total), default=1)


def gravity(text: TextSight, columns: Tensor) -> Tensor:
    """What rotary embedding alone makes of attention logits: ``[B, R, n]``, float32.

    Vectors of ones, rotated as queries at ``columns [B, R]`` and as keys everywhere, multiplied and
    divided by √E.
    """
    if text.rope is None:
        raise CompressionError("gravity exists at layers of the language model only")
    width = text.family.layers[text.layer].self_attn.head_dim
    cosine, sine = (precise(part).expand(len(columns), -1, -1) for part in text.rope)
    ones = torch.ones(*cosine.shape[:2], width, device=cosine.device, dtype=cosine.dtype)
    keys = rotate(ones, cosine, sine)
    queries = keys.gather(1, columns[..., None].expand(*columns.shape, width))
    found = queries @ keys.transpose(1, 2) / width**0.5
    floor = torch.where(found < 0, -_WEAKEST, _WEAKEST)
    return torch.where(found.abs() < _WEAKEST, floor, found)


@torch.no_grad()
def _rank_of(seen: Seen, text: TextSight, rows: Tensor) -> Tensor:
    """Rank of the head-mean attention of raters × image tokens, ``[I]``."""
    columns, real = compact(rows)
    paid = at_images(text, attention_rows(text, columns, all_keys(text)).mean(1))  # [I, R, V]
    inside = real[seen.rows][:, :, None] & seen.valid[:, None]
    values = torch.linalg.svdvals(paid.masked_fill(~inside, 0))
    longest = torch.maximum(real[seen.rows].sum(1), seen.valid.sum(1))
    bar = values[:, :1] * longest[:, None] * torch.finfo(values.dtype).eps
    rank: Tensor = (values > bar).sum(1)
    return rank
