"""The part of a session that ranks: what the compressor is shown, and what follows from it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from targets.compression.base import Compressor, Merged, Seen
from targets.compression.layout import ImageSlots
from targets.compression.scoring import attention_row
from targets.compression.trace import Forced, Trace, choose, column_bias
from targets.errors import CompressionError
from targets.families.base import Family
from targets.families.vision import VisionPass

_APART = 1_000_003
"""Seeds of the images in one row are this far apart."""


@dataclass(frozen=True, slots=True)
class Ranker:
    """Shows a compressor what it ranks by, at each stage.

    Attributes:
        compressor: what ranks.
        family: the model's adapter.
        forced: a selection imposed from outside.
        seeds: one per batch row; None is 0 for all.
        answer_columns: trailing columns that are not prompt.
        relax: temperature of the straight-through relaxation; None is off.
    """

    compressor: Compressor
    family: Family
    forced: Forced
    seeds: Sequence[int] | None
    answer_columns: int
    relax: float | None

    def at_vision(self, vision: VisionPass, trace: Trace) -> Seen:
        """Rank by a pass of the vision tower."""
        # Which rows the images belong to is known only when the text model starts; whoever ranks
        # by the tower has nothing to draw.
        images, tokens = vision.patches.shape[:2]
        seen = Seen(
            features=vision.patches,
            count=self.compressor.budget(tokens),
            seeds=(0,) * images,
            attention=vision.attention(),
            query=vision.query,
            keys=vision.patch_keys,
            vision=vision,
        )
        self._choose(seen, trace)
        return seen

    def at_input(self, embeds: Tensor, slots: ImageSlots, trace: Trace) -> None:
        """Rank by the projected tokens in the input ``[B, L, D]`` of the language model."""
        self._choose(self._seen(slots.gather(embeds), slots), trace)

    def at_layer(
        self,
        layer: int,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor,
        slots: ImageSlots,
        trace: Trace,
    ) -> None:
        """Rank by the input ``[B, L, D]`` of a decoder layer and the attention it would compute.

        Run again on the same input it repeats the same operations (a replay under checkpointing
        must) and leaves the trace as it is.
        """
        seen = self._seen(slots.gather(hidden), slots)
        if self.compressor.attends:
            column = hidden.shape[1] - 1 - self.answer_columns
            query, keys = self.family.text_query_keys(layer, hidden, rope, column)
            before = torch.arange(mask.shape[1], device=mask.device) <= column
            attention = attention_row(
                query,
                keys,
                self.family.text_scaling(layer),
                visible=mask.bool() & before,
                softcap=self.family.text_softcap(layer),
            )
            seen = replace(
                seen,
                attention=slots.gather(attention.transpose(1, 2)).transpose(1, 2),
                query=query[slots.rows],
                keys=slots.gather(keys.transpose(1, 2)).transpose(1, 2),
            )
        self._choose(seen, trace)

    def bias(self, trace: Trace) -> Tensor | None:
        """Log-gate of the visual tokens ``[I, V]``; None without relaxation."""
        if self.relax is None or trace.scores is None or trace.selection is None:
            return None
        return column_bias(trace.scores, trace.selection.kept, self.relax)

    def merged_bias(self, trace: Trace, merged: Merged) -> Tensor | None:
        """The same for merged tokens, which stand in the first places of their image."""
        bias = self.bias(trace)
        if bias is None:
            return None
        moved = bias.gather(1, merged.source) * merged.dominant
        return torch.nn.functional.pad(moved, (0, self.family.tokens - moved.shape[1]))

    def _seen(self, features: Tensor, slots: ImageSlots) -> Seen:
        count = self.compressor.budget(features.shape[1])
        return Seen(features, count, self._image_seeds(slots))

    def _image_seeds(self, slots: ImageSlots) -> tuple[int, ...]:
        """A seed for each image: its row's, told apart by its place in the row."""
        rows = slots.rows.tolist()
        if self.seeds is None:
            return (0,) * len(rows)
        if max(rows) >= len(self.seeds):
            raise CompressionError(
                f"{len(self.seeds)} seeds were given, but row {max(rows)} holds an image; give "
                "one seed a row"
            )
        places = zip(rows, slots.ordinals(), strict=True)
        return tuple(self.seeds[row] + _APART * place for row, place in places)

    def _choose(self, seen: Seen, trace: Trace) -> None:
        started = time.perf_counter()
        scores, selection = choose(self.compressor, seen, self.forced)
        if trace.scores is None:
            trace.scores, trace.selection, trace.seen = scores, selection, seen
            trace.seconds = time.perf_counter() - started
