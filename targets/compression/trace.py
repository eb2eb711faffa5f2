"""What a session remembers of a prefill, and the choice every ranking ends in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from targets.base import Ranking
from targets.compression.base import Compressor, Merged, Scores, Seen, Selection
from targets.compression.layout import ImageSlots
from targets.errors import CompressionError

Forced = Tensor | Selection | Sequence[Selection] | None
"""A selection imposed from outside: bool ``[I, V]``, or what an earlier trace holds."""


@dataclass(frozen=True, slots=True)
class CutTrace:
    """What happened at one cut; tensors of I images, live.

    Attributes:
        scores: importance of the visual tokens.
        selection: the hard choice.
        seen: what the compressor saw.
        seconds: spent ranking and choosing, recomputed attention included; on a GPU, until the
            work was handed over.
    """

    scores: Scores
    selection: Selection
    seen: Seen
    seconds: float


@dataclass(slots=True)
class Trace:
    """What happened in the last prefill; tensors of I images, live.

    Attributes:
        cuts: those that chose, in order.
        rows: ``[I]`` batch row of each image.
        lengths: sequence length in each language-model layer, those run.
        tokens: visual tokens alive in each language-model layer, ``[I]`` each.
        survivors: bool ``[I, V]`` visual tokens still there, as themselves, after all cuts so far.
    """

    cuts: list[CutTrace] = field(default_factory=list)
    rows: Tensor | None = None
    lengths: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, Tensor] = field(default_factory=dict)
    survivors: Tensor | None = None

    @property
    def first(self) -> CutTrace | None:
        """The first cut; None where nothing was ranked."""
        return self.cuts[0] if self.cuts else None

    @property
    def scores(self) -> Scores | None:
        """Of the first cut."""
        return self.cuts[0].scores if self.cuts else None

    @property
    def seen(self) -> Seen | None:
        """By the first cut."""
        return self.cuts[0].seen if self.cuts else None

    @property
    def score(self) -> Tensor | None:
        """``[I, V]`` of the first cut, in the graph."""
        return self.cuts[0].scores.score if self.cuts else None

    @property
    def selection(self) -> Selection | None:
        """The hard choices of all cuts, as `kept` of `compress` takes them."""
        if not self.cuts:
            return None
        later = tuple(one.selection for one in self.cuts[1:])
        return replace(self.cuts[0].selection, later=later)

    @property
    def kept(self) -> Tensor | None:
        """Visual tokens that are there after the last cut, bool ``[I, V]``.

        Of merging compressors, those taken over as they are; where nothing is dropped (mode
        ``observe``), those the first cut would keep.
        """
        if self.survivors is not None:
            return self.survivors
        return self.cuts[0].selection.kept if self.cuts else None

    @property
    def seconds(self) -> float:
        """Spent ranking and choosing."""
        return sum(one.seconds for one in self.cuts)

    def ranking(self) -> Ranking:
        """The first cut's ranking in the words of `targets.base`.

        Raises:
            CompressionError: if nothing was ranked.
        """
        if not self.cuts:
            raise CompressionError("nothing was ranked: the prompt held no image")
        one = self.cuts[0]
        return ranking_of(one.scores, one.selection, one.seen)

    def survive(self, slots: ImageSlots, kept: Tensor, merged: Merged | None) -> None:
        """Note what is left when only `kept` places live on, or `merged` tokens take over.

        Args:
            slots: where the images were before the cut.
            kept: bool ``[I, V]`` places.
            merged: what took their places, if anything did.
        """
        places, alive = slots.carries, slots.alive & kept
        if merged is not None:
            places, alive = slots.carries.gather(1, merged.source), merged.valid & merged.dominant
        # Several places may carry one token (CLS stands where the first patch does).
        found = torch.zeros_like(slots.carries).scatter_add(1, places, alive.long()) > 0
        self.survivors = found if self.survivors is None else found & self.survivors


def ranking_of(scores: Scores, selection: Selection, seen: Seen) -> Ranking:
    """Put what a compressor saw and chose into the words of `targets.base`."""
    by = seen.cut.by
    return Ranking(
        score=scores.score,
        log_score=scores.log_score,
        query=seen.query if scores.attends else None,
        keys=seen.keys if scores.attends and seen.query is not None else None,
        features=seen.features if seen.projected is None else seen.projected,
        kept=selection.kept,
        soft_count=None if by is None else by.soft_count(scores, seen),
    )


def choose(compressor: Compressor, seen: Seen, forced: Forced = None) -> tuple[Scores, Selection]:
    """Score and select; the whole budget keeps everything as it is.

    Raises:
        CompressionError: if the forced selection has another shape than the scores.
    """
    scores = compressor.score(seen)
    if forced is not None:
        return scores, _imposed(compressor, seen, scores, forced)
    if bool((seen.counts >= seen.valid.sum(1)).all()) and scores.chosen is None:
        return scores, Selection(seen.valid.clone())
    return scores, compressor.select(scores, seen)


def _imposed(compressor: Compressor, seen: Seen, scores: Scores, forced: Forced) -> Selection:
    # Of several cuts, the ranker has picked this one's selection already.
    selection = forced_at(forced, 0)
    width = scores.score.shape[1]
    here = selection.kept.shape
    if here[0] != len(scores.score) or not int(seen.totals.amax()) <= here[1] <= width:
        raise CompressionError(
            f"the forced selection is {list(here)}, but there are "
            f"{list(scores.score.shape)} images × visual tokens to choose from"
        )
    kept = torch.nn.functional.pad(selection.kept, (0, width - here[1]))
    kept = kept.to(device=scores.score.device, dtype=torch.bool) & seen.valid
    if bool((~kept.any(1)).any()):
        raise CompressionError("the forced selection keeps no token of some image; keep at least 1")
    if selection.targets is None and compressor.merges and not torch.equal(kept, seen.valid):
        return compressor.complete(kept, seen)
    if selection.assignment is None:
        return replace(selection, kept=kept, later=())
    assignment = torch.nn.functional.pad(selection.assignment, (0, width - here[1]), value=-1)
    return replace(selection, kept=kept, assignment=assignment, later=())


def forced_at(forced: Forced, number: int) -> Selection:
    """The selection imposed at a cut.

    Raises:
        CompressionError: if it comes from a compressor with fewer cuts.
    """
    if isinstance(forced, Tensor):
        return Selection(forced.bool())
    if forced is None:
        raise CompressionError("no selection is imposed")
    whole = forced if isinstance(forced, Selection) else Selection.stack(list(forced))
    cuts = (whole, *whole.later)
    if number >= len(cuts):
        raise CompressionError(
            f"the forced selection knows {len(cuts)} cuts, this compressor makes a further one; "
            "take it from an answer of the same compressor"
        )
    return cuts[number]


def column_bias(scores: Scores, kept: Tensor, temperature: float, valid: Tensor) -> Tensor:
    """Log-gate of the kept tokens: zero forward, a sigmoid relaxation of the top-k backward.

    With s the log-scores and θ the live midpoint between the last kept and the first dropped of
    each image, a kept token's gate is ``m = sigmoid((s − θ) / temperature)``; what is added to the
    attention logits of its column is ``log m`` minus its own value.

    Args:
        scores: of ``[I, V]`` tokens.
        kept: bool ``[I, V]``.
        temperature: width of the relaxation in units of the log-score, > 0.
        valid: bool ``[I, V]``, tokens there were to choose from.

    Returns:
        ``[I, V]``, zero everywhere; gradient only through kept tokens and θ.
    """
    dropped = valid & ~kept
    if not bool(dropped.any()):
        return torch.zeros_like(scores.log_score)
    score = scores.log_score
    worst = score.masked_fill(~kept, torch.inf).amin(1, keepdim=True)
    best = score.masked_fill(~dropped, -torch.inf).amax(1, keepdim=True)
    whole = ~dropped.any(1, keepdim=True)
    bar = torch.where(whole, worst, (worst + best.clamp_min(-1e4)) / 2)
    gate = torch.nn.functional.logsigmoid((score - bar) / temperature)
    return ((gate - gate.detach()) * kept).to(score.dtype)
