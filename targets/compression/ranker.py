"""The part of a session that ranks: what the compressor is shown, and what follows from it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from targets.compression.base import Compressor, Cut, Scores, Seen, Selection, Stage
from targets.compression.layout import Group, ImageSlots
from targets.compression.scoring import attention_row
from targets.compression.sight import TextSight
from targets.compression.state import TextPass
from targets.compression.trace import CutTrace, Forced, Trace, choose, column_bias, forced_at
from targets.errors import CompressionError
from targets.families.base import Family
from targets.families.vision import VisionPass

_APART = 1_000_003
"""Seeds of the images in one row are this far apart."""


@dataclass(frozen=True, slots=True)
class Ranker:
    """Shows compressors what they rank by, at each cut.

    Attributes:
        family: the model's adapter.
        cuts: of all compressors, in the order they happen.
        forced: a selection imposed from outside.
        seeds: one per batch row; None is 0 for all.
        answer_columns: trailing columns that are not prompt.
        relax: temperature of the straight-through relaxation; None is off.
    """

    family: Family
    cuts: tuple[Cut, ...]
    forced: Forced
    seeds: Sequence[int] | None
    answer_columns: int
    relax: float | None

    def before_text(
        self, cut: Cut, state: TextPass, group: Group, hidden: Tensor, vision: VisionPass | None
    ) -> Seen:
        """What a cut before the language model sees; `hidden` are the present input columns."""
        slots = _slots(group)
        sight = self.sight(state, group, 0, hidden, None)
        projected = slots.gather(hidden)
        if cut.stage is Stage.TOWER:
            # The tokens that are left stand in the first places, not where their patches were.
            projected = _owner(cut).unmerge(projected, state.memory(_owner(cut)))
        if cut.stage is not Stage.VISION:
            return self._seen(cut, state, group, projected, sight, vision)
        if vision is None:
            raise CompressionError(
                f"compressor {_name(cut)} ranks by the vision tower, which has not run inside this "
                "session; pass pixel_values, not encoder outputs made before"
            )
        seen = self._seen(cut, state, group, _fit(vision.patches, slots), sight, vision)
        attention = vision.attention() if cut.attends else None
        return replace(
            seen,
            projected=projected,
            attention=None if attention is None else _fit_heads(attention, slots),
            query=vision.query if cut.attends else None,
            keys=_fit_heads(vision.patch_keys, slots) if cut.attends else None,
        )

    def at_layer(
        self,
        cut: Cut,
        state: TextPass,
        group: Group,
        layer: int,
        hidden: Tensor,
        rope: Any,  # noqa: ANN401 - the family's form
    ) -> Seen:
        """What a cut sees at the input ``[B, n, D]`` of a decoder layer."""
        slots = _slots(group)
        sight = self.sight(state, group, layer, hidden, rope)
        seen = self._seen(cut, state, group, slots.gather(hidden), sight, state.vision)
        if not cut.attends:
            return seen
        column = torch.full((len(hidden), 1), sight.last, device=hidden.device)
        query = self.family.text_queries(layer, hidden, rope, column)[:, :, 0]
        keys = self.family.text_keys(layer, hidden, rope)
        attention = attention_row(
            query,
            keys,
            self.family.text_scaling(layer),
            visible=sight.visible(column)[:, 0],
            softcap=self.family.text_softcap(layer),
        )
        return replace(
            seen,
            attention=slots.gather(attention.transpose(1, 2)).transpose(1, 2),
            query=query[slots.rows],
            keys=slots.gather(keys.transpose(1, 2)).transpose(1, 2),
        )

    def watched(
        self, one: Compressor, state: TextPass, group: Group, layer: int, before: Tensor
    ) -> Seen:
        """What a compressor that watches a module sees of its input ``[B, n, D]``."""
        cut = Cut(Stage.LAYER, layer, by=one)
        slots = _slots(group)
        return Seen(
            features=slots.gather(before),
            counts=slots.alive.sum(1),
            seeds=self._image_seeds(slots),
            valid=slots.alive,
            totals=slots.totals,
            cut=cut,
            lattice=slots.lattice,
            rows=slots.rows,
            memory=state.memory(one),
            deepest=len(self.family.layers),
            family=self.family,
        )

    def sight(
        self,
        state: TextPass,
        group: Group,
        layer: int,
        hidden: Tensor,
        rope: Any,  # noqa: ANN401
    ) -> TextSight:
        """The prompt as a compressor sees it at a layer."""
        slots = _slots(group)
        rows, length = hidden.shape[:2]
        last = length - 1 - self.answer_columns
        live = group.mask.bool()
        before = torch.arange(length, device=hidden.device) <= last
        words = live & ~slots.image_columns(length, rows) & before
        embeds = state.embeds
        if group.index is not None:
            embeds = embeds.gather(
                1, group.index[..., None].expand(*group.index.shape, embeds.shape[2])
            )
        allowed = self.family.allowed(state.given, group, layer)
        return TextSight(
            self.family, layer, hidden, embeds, rope, live, words, slots, last, allowed
        )

    def bias(self, one: CutTrace) -> Tensor | None:
        """Log-gate of the visual tokens ``[I, V]``; None without relaxation."""
        if self.relax is None:
            return None
        return column_bias(one.scores, one.selection.kept, self.relax, one.seen.valid)

    def choose(
        self, cut: Cut, seen: Seen, trace: Trace, state: TextPass, started: float
    ) -> CutTrace | None:
        """Score and select at a cut; None where it only looks.

        `started` is when making `seen` began, since attention is recomputed for it.

        Run again on the same input it repeats the same operations (a replay under checkpointing
        must) and leaves the trace as it is.
        """
        owner = _owner(cut)
        if not cut.drops:
            owner.look(seen)
            return None
        scores, selection = self._choose(cut, seen)
        one = CutTrace(scores, selection, seen, time.perf_counter() - started)
        if cut not in state.chosen:
            state.chosen[cut] = one
            trace.cuts.append(one)
        return one

    def _choose(self, cut: Cut, seen: Seen) -> tuple[Scores, Selection]:
        forced, number = self.forced, [c for c in self.cuts if c.drops].index(cut)
        if isinstance(forced, Tensor) and number > 0:
            forced = seen.valid  # the set was imposed at the first cut; merging has moved places
        elif forced is not None and not isinstance(forced, Tensor):
            forced = forced_at(forced, number)
        return choose(_owner(cut), seen, forced)

    def _seen(
        self,
        cut: Cut,
        state: TextPass,
        group: Group,
        features: Tensor,
        sight: TextSight,
        vision: VisionPass | None,
    ) -> Seen:
        slots, owner, deepest = _slots(group), _owner(cut), len(self.family.layers)
        totals = slots.totals
        left = [owner.count(cut, int(total), deepest) for total in totals.tolist()]
        valid = slots.alive
        counts = torch.tensor(left, device=features.device)
        return Seen(
            features=features,
            counts=torch.minimum(counts, valid.sum(1)),
            seeds=self._image_seeds(slots),
            valid=valid,
            totals=totals,
            cut=cut,
            lattice=slots.lattice,
            rows=slots.rows,
            vision=vision if owner.sees_tower else None,
            text=sight,
            memory=state.memory(owner),
            deepest=deepest,
            family=self.family,
        )

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


def _slots(group: Group) -> ImageSlots:
    if group.slots is None:
        raise CompressionError("there is no image to rank")
    return group.slots


def _owner(cut: Cut) -> Any:  # noqa: ANN401 - a Compressor; the session has filled it in
    return cut.by


def _name(cut: Cut) -> str:
    return str(_owner(cut).name)


def _fit(values: Tensor, slots: ImageSlots) -> Tensor:
    """Tokens ``[I, v, …]`` of a vision pass on the places ``[I, V, …]`` of the prompt.

    After merging a place may carry another token than its own.
    """
    width = slots.carries.shape[1]
    if values.shape[1] < width:
        raise CompressionError(
            f"the vision tower gave {values.shape[1]} tokens, the prompt has places for {width}"
        )
    if values.shape[1] == width and slots.carry_themselves:
        return values
    index = slots.carries.reshape(*slots.carries.shape, *[1] * (values.dim() - 2))
    return values.gather(1, index.expand(*slots.carries.shape, *values.shape[2:]))


def _fit_heads(values: Tensor, slots: ImageSlots) -> Tensor:
    """The same for ``[I, N, v, …]``."""
    return _fit(values.transpose(1, 2), slots).transpose(1, 2)
