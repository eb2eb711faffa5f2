"""VisionDrop: let visual tokens rate one another, in the vision tower and in the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import torch
from torch import Tensor

from targets.compression.aggregation import Groups, appended, evenly, members_of
from targets.compression.base import Cut, Merged, Scores, Seen, Selection, Stage, numbered
from targets.compression.budgets import descending
from targets.compression.raters import sight_of
from targets.compression.scoring import log_probability, top_k_mask
from targets.compression.sight import TextSight
from targets.compression.staged import Staged
from targets.compression.visionzip import VisionZip
from targets.errors import CompressionError

_TOTALS: Final = (48, 35, 26, 19)
"""Tokens after the tower and after each stage, where the authors say 32."""
_CONTEXTUAL: Final = (6, 5, 4, 3)
"""How many of these are contextual."""
_NAME: Final = 32


@dataclass(frozen=True, kw_only=True)
class VisionDrop(Staged):
    """Drop and merge in the manner of VisionZip at the tower, then by image-to-image attention.

    Paper: VisionDrop (AAAI 2026), code Ruixxxx/VisionDrop; text takes no part. At the vision tower
    it is VisionZip. At the input of each pruning layer the score of a visual token is that layer's
    own attention from image rows: softmax over all columns a row may attend to, mean over heads and
    rows. The best tokens stay (dominant), every step-th of the others becomes a target, the rest
    joins the target whose head-mean rotated key has the largest cosine with its own; a contextual
    token is ``target + mean(joined)`` and follows the dominant ones.

    Args:
        layers: 0-based layers at whose inputs tokens are dropped; None is 8, 16, 24 of 32, moved in
            proportion to the model's depth.
        retention: kept ÷ all visual tokens, in (0, 1]; counts contextual tokens (and CLS).
        keep_tokens: visual tokens kept of each image, ≥ 1, instead of retention.
        budget_is: ``final`` means what the last stage leaves; ``average`` the mean over all layers
            of the language model; ``official`` scales the published counts (42 + 6 after the tower,
            30 + 5, 22 + 4 and 16 + 3 after the stages, named 32), which are that mean at 32 layers.
        positions: the official code numbers the tokens anew at each stage.

    Raises:
        CompressionError: for an option outside its range.

    *Differs from the paper in …*: published are the counts of one setting; others have the same
    proportions [inferred]. Several images of a prompt: rows of all of them rate, each image has its
    own budget [inferred]. Where a stage has one token, nothing is merged. Tiles and towers without
    CLS are handled as our VisionZip does. Nothing is detached.
    """

    name: ClassVar[str] = "visiondrop"
    official_layers: ClassVar[tuple[int, ...]] = (8, 16, 24)

    budget_is: Literal["final", "average", "official"] = "final"
    positions: Literal["keep", "reindex"] = "reindex"

    @property
    def stage(self) -> Stage:
        """First before the projector."""
        return Stage.VISION

    @property
    def merges(self) -> bool:
        """It makes contextual tokens."""
        return True

    @property
    def drops_separators(self) -> bool:
        """As VisionZip."""
        return True

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """At the tower, then at each layer."""
        inside = [Cut(Stage.LAYER, layer) for layer in self.drops_at(layers)]
        return numbered([Cut(Stage.VISION, attends=True), *inside])

    def starts(self, layers: int) -> tuple[int, ...]:
        """The tower's cut counts from layer 0 on."""
        return (0, *self.drops_at(layers))

    # Budgets ------------------------------------------------------------------------------------

    def stages(self, tokens: int, final: int, number: int) -> tuple[int, ...]:
        """Counts in the published proportions; equal factors for other than 3 layers."""
        share = [one / _TOTALS[-1] for one in _TOTALS[:-1]]
        if number != len(_TOTALS):
            steps = range(number - 1)
            share = [share[0] ** ((number - 1 - i) / (number - 1)) for i in steps]
        return descending([final * one + 0.5 for one in share], tokens, final)

    def official_stages(self, tokens: int, wanted: int, layers: int) -> tuple[int, ...]:
        """The published counts, scaled."""
        final = max(1, round(wanted * _TOTALS[-1] / _NAME))
        if len(self.starts(layers)) != len(_TOTALS):
            return self.stages(tokens, final, len(self.starts(layers)))
        earlier = [wanted * one / _NAME + 0.5 for one in _TOTALS[:-1]]
        return descending(earlier, tokens, final)

    # Ranking ------------------------------------------------------------------------------------

    def score(self, seen: Seen) -> Scores:
        """Attention received, ``[I, V]``: of CLS at the tower, of image rows at a layer."""
        if seen.cut.stage is Stage.VISION:
            return _TOWER.score(seen)
        text = sight_of(seen)
        score = text.attention(_image_rows(text)).mean(1).masked_fill(~seen.valid, 0)
        return Scores(score, log_probability(score))

    # Choosing -----------------------------------------------------------------------------------

    def select(self, scores: Scores, seen: Seen) -> Selection:
        """The dominant tokens, and where each other one goes."""
        if seen.cut.stage is Stage.VISION:
            return _TOWER.select(scores, seen)
        dominant = seen.counts - self._contextual(seen)
        return self.complete(top_k_mask(scores.score, dominant, seen.valid), seen)

    def complete(self, kept: Tensor, seen: Seen) -> Selection:
        """Targets and assignment for a dominant set; both follow from the keys."""
        if seen.cut.stage is Stage.VISION:
            return _TOWER.complete(kept, seen)
        rest = seen.valid & ~kept
        room = torch.minimum((seen.counts - kept.sum(1)).clamp_min(0), rest.sum(1))
        wanted = torch.minimum(self._contextual(seen), room)
        groups = evenly(sight_of(seen).keys().mean(1), rest, wanted)
        return Selection(kept, groups.targets, groups.assignment)

    def merge(self, selection: Selection, seen: Seen) -> Merged | None:
        """Dominant tokens in order, then contextual ones."""
        if selection.targets is None or selection.assignment is None:
            return None
        if seen.cut.stage is Stage.VISION:
            return _TOWER.merge(selection, seen)
        groups = Groups(selection.targets, selection.assignment)
        own, others, number = members_of(seen.features, groups)
        extra = own + others / number.clamp_min(1)
        return appended(seen.features, selection.kept, selection.targets, extra)

    def _contextual(self, seen: Seen) -> Tensor:
        """Contextual tokens of each image, ``[I]``; none where all tokens stay."""
        stage = min(self.stage_of(seen.cut, seen.deepest), len(_TOTALS) - 1)
        share = _CONTEXTUAL[stage] / _TOTALS[stage]
        wanted = (seen.counts * share + 0.5).long()
        wanted = torch.minimum(wanted, (seen.counts - 1).clamp_min(0))
        return wanted.masked_fill(seen.counts >= seen.valid.sum(1), 0)


@dataclass(frozen=True, kw_only=True)
class _Tower(VisionZip):
    """VisionZip with the published split, 42 + 6."""

    def split(self, total: int, has_cls: bool) -> tuple[int, int]:
        """Patches kept as they are, and contextual tokens."""
        room = total - int(has_cls) - 1
        if room < 0:
            raise CompressionError(
                f"compressor visiondrop: {total} tokens leave no patch beside CLS at the vision "
                "tower; keep more"
            )
        contextual = min(int(total * _CONTEXTUAL[0] / _TOTALS[0] + 0.5), room)
        return total - contextual - int(has_cls), contextual


_TOWER: Final = _Tower(retention=1.0)
"""Budgets come with what it sees."""


def _image_rows(text: TextSight) -> Tensor:
    """Columns that hold a visual token, bool ``[B, n]``."""
    rows, length = text.live.shape
    return text.slots.spread(text.slots.alive.long(), length, rows).bool() & text.live
