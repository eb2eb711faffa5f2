"""Install a compressor in a model for the length of a ``with`` block: hooks on this instance only.

    with compress(model, FastV(layer=2, retention=0.25)) as session:
        model.generate(**inputs)
    session.trace.kept

The vision tower is watched, the language model receives a shorter sequence (or, from layer K on,
its layers do), and decoding continues with each group of layers knowing its own columns. Ids,
placeholders and the mask that `generate` works with stay as they are.

Three traps of transformers 5 are kept shut: layers never see position ids with gaps (they would be
taken for packed sequences), a 2-D mask is always passed on, and layers whose cache is shorter get
their own mask.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from targets.caches import cache_of
from targets.compression import guards
from targets.compression import state as states
from targets.compression.base import Compressor, Cut, Merged, Stage
from targets.compression.layout import Group, find_slots, last_position
from targets.compression.pipeline import Pipeline, owned, parts_of
from targets.compression.ranker import Ranker
from targets.compression.shortening import Shortening
from targets.compression.state import TextPass
from targets.compression.trace import CutTrace, Forced, Trace
from targets.compression.watching import Watcher, mark
from targets.errors import CompressionError
from targets.families import family_of
from targets.families.base import Family
from targets.families.vision import LayerPass, VisionPass, VisionTap

Mode = Literal["hard", "masked", "observe", "rank"]
_STATE = "redteam_pass"


class RankingReached(Exception):
    """Raised at the ranking point in mode ``rank``; the trace is complete then."""


class CompressionSession:
    """A compressor installed in a model; see `compress`.

    Attributes:
        trace: what happened in the last prefill.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - transformers is untyped
        compressor: Compressor | Sequence[Compressor],
        *,
        family: Family | None = None,
        mode: Mode = "hard",
        kept: Forced = None,
        seeds: Sequence[int] | None = None,
        answer_columns: int = 0,
        relax: float | None = None,
    ) -> None:
        self.trace = Trace()
        self._family = family if family is not None else family_of(model)
        one = compressor if isinstance(compressor, Compressor) else Pipeline(stages=(*compressor,))
        self._parts, self._mode = parts_of(one), mode
        self._cuts_of = _sorted_cuts(self._parts, len(self._family.layers), mode)
        self._ranker = Ranker(self._family, self._cuts_of, kept, seeds, answer_columns, relax)
        self._cuts = mode in ("hard", "masked")
        self._handles: list[Any] = []
        self._image_mask: Tensor | None = None
        self._mask: Tensor | None = None
        self._inputs: dict[str, Any] = {}
        self._tower_memory: dict[int, dict[str, Any]] = {}
        self._tower: Shortening | None = None
        self._running: TextPass | None = None
        self._groups: dict[int, Group] = {}
        self._restored: tuple[CutTrace, Tensor | None] | None = None
        self._last: Tensor | None = None  # [B] position id of the last column so far
        guards.check(self._family, self._parts, self._cuts_of, relax)
        guards.check_tower(self._parts, mode)
        self._tap = self._make_tap()

    def __enter__(self) -> CompressionSession:
        guards.acquire(self._family.model, self)
        try:
            self._install()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def gather_labels(self, labels: Tensor) -> Tensor:
        """Labels ``[B, L]`` of the full sequence for the columns that reach the logits.

        Columns that only even the rows out get −100, which losses ignore.
        """
        last = self._groups[max(self._groups)] if self._groups else None
        if last is None or last.index is None:
            return labels
        return labels.gather(1, last.index).masked_fill(last.mask == 0, -100)

    def columns(self, layer: int) -> tuple[Tensor, Tensor, int]:
        """What the columns of a layer are, in the prefill that runs or ran last.

        Args:
            layer: one that has been reached.

        Returns:
            Living visual columns and all living ones, bool ``[B, n]``, and the first layer that has
            these columns.
        """
        if self._running is None:
            raise CompressionError("the language model has not run inside this session")
        group = self._running.group(layer)
        live = group.mask.bool()
        if group.slots is None:
            return torch.zeros_like(live), live, group.start
        rows, length = live.shape
        alive = group.slots.spread(group.slots.alive.long(), length, rows).bool()
        return alive & live, live, group.start

    @property
    def in_tower(self) -> bool:
        """Whether a part of it works inside the vision tower."""
        return any(one.stage is Stage.TOWER for one in self._parts)

    @property
    def settled(self) -> bool:
        """Whether all cuts of the prefill that runs or ran last have ranked."""
        return len(self.trace.cuts) == sum(cut.drops for cut in self._cuts_of)

    def restored(self, layer: int) -> Tensor | None:
        """Columns whose visual token a defence has put back, bool ``[B, n]``; None where none is.

        Args:
            layer: one that has been reached, of the prefill that runs or ran last.
        """
        one = self.trace.first
        if one is None or one.seen.cut.by is None or self._running is None:
            return None
        if self._restored is None or self._restored[0] is not one:
            found = one.seen.cut.by.restored(one.scores, one.selection, one.seen)
            self._restored = one, found  # the same for all layers
        tokens = self._restored[1]
        group = self._running.group(layer)
        if tokens is None or group.slots is None:
            return None
        slots, (rows, length) = group.slots, group.mask.shape
        # Of two places with one token the later holds it: VisionZip puts CLS where the first is.
        order = torch.arange(1, slots.carries.shape[1] + 1, device=tokens.device) * slots.alive
        last = torch.zeros_like(order).scatter_reduce(1, slots.carries, order, "amax")
        there = tokens.gather(1, slots.carries) & (last.gather(1, slots.carries) == order)
        there = there & slots.alive
        return slots.spread(there.long(), length, rows).bool()

    def mark(self) -> Callable[[], None]:
        """Remember how far decoding is; what it returns goes back there, as often as called."""
        groups, last, running = self._groups, self._last, self._running

        def back() -> None:
            self._groups, self._last, self._running = groups, last, running

        return back

    def select(self, rows: Tensor) -> None:
        """Go on decoding with some rows of the batch, in this order, as the cache does.

        Args:
            rows: long ``[n]``; rows may be left out or repeated.
        """

        def picked(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        self._groups = {
            start: Group(
                group.start,
                group.mask[rows],
                picked(group.index),
                picked(group.shift),
                inside=group.inside,
            )
            for start, group in self._groups.items()
        }
        self._last = picked(self._last)

    def _make_tap(self) -> VisionTap | None:
        if not any(one.sees_tower and one.stage is not Stage.TOWER for one in self._parts):
            return None
        family = self._family
        layers = {
            layer
            for one in self._parts
            for layer in one.tower_layers(family.tower_depth, family.feature_layer)
        }
        return family.tap(sorted(layers))

    def _install(self) -> None:
        family = self._family
        if self._tap is not None:
            self._tap.__enter__()
        for one in self._parts:
            if one.stage is Stage.TOWER:
                memory = self._tower_memory.setdefault(id(one), {})
                self._tower = Shortening(family, one, memory, self._ranker.forced)
                self._handles += self._tower.install()
            elif one.stage is Stage.ATTENTION and self._cuts:
                self._handles += one.install(family, self._tower_memory.setdefault(id(one), {}))
        self._handles += family.attach(lambda: self._running)
        self._handles += [
            family.core.register_forward_pre_hook(self._before_model, with_kwargs=True),
            family.text.register_forward_pre_hook(self._before_text, with_kwargs=True),
        ]
        for layer, module in enumerate(family.layers):
            hook = self._layer_hook(layer)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        watcher = Watcher(self._ranker, lambda: self._running)
        for one in self._parts:
            for layer in one.watches(len(family.layers)):
                self._handles += watcher.install(one, layer)

    def _remove(self) -> None:
        for handle in reversed(self._handles):
            handle.remove()
        self._handles = []
        if self._tap is not None:
            self._tap.__exit__(None, None, None)
        guards.release(self._family.model, self)

    # Text model ---------------------------------------------------------------------------------

    def _before_model(self, module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._image_mask = None if ids is None else ids == self._family.image_token_id
        self._mask = kwargs.get("attention_mask")
        self._inputs = kwargs

    def _before_text(
        self, module: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        del module
        cache = cache_of(kwargs)
        guards.check_cache(cache)
        kwargs = dict(kwargs)
        if cache is None or cache.get_seq_length() == 0:
            try:
                state = self._prefill(kwargs)
            finally:
                if self._tower is not None:
                    self._tower.emerged = None  # what a tower gave is for one prefill
        else:
            state = self._decode(kwargs)
        self._groups, self._running = state.groups, state
        kwargs[_STATE] = state
        return args, kwargs

    def _prefill(self, kwargs: dict[str, Any]) -> TextPass:
        embeds: Tensor = kwargs["inputs_embeds"]
        rows, length = embeds.shape[:2]
        mask, positions, given = guards.columns_of(kwargs, embeds, self._mask)
        if self._image_mask is None or self._image_mask.shape != (rows, length):
            raise CompressionError(
                "the session has not seen the token ids of this forward, so it cannot tell image "
                "tokens from text; call the model with input_ids"
            )
        layouts = self._layouts(self._image_mask)
        slots = find_slots(self._image_mask, layouts) if layouts else None
        uncut = Group(0, mask, positions=positions, slots=slots)
        state = TextPass(True, positions, uncut, {0: uncut}, embeds, given)
        state.memories = self._memories()
        self.trace = state.trace
        self._last = last_position(positions, mask.bool())
        if slots is not None:
            state.trace.rows = slots.rows
            state.vision = self._arranged(layouts)
            kwargs["inputs_embeds"] = self._cut_before_text(state, embeds)
        group = state.entering = state.groups[0]
        kwargs["attention_mask"] = self._family.plain_mask(given, group)
        kwargs["position_ids"] = group.positions
        if group.index is not None or not bool(group.mask.equal(mask)):
            self._family.shorten(kwargs, group)
        return state

    def _memories(self) -> dict[int, dict[str, Any]]:
        """Of compressors that work in the tower or in attention, what they began there."""
        return dict(self._tower_memory)

    def _layouts(self, placeholders: Tensor) -> Sequence[Any]:
        if not bool(placeholders.any()):
            return ()
        return self._family.images(placeholders, self._inputs)

    def _arranged(self, layouts: Sequence[Any]) -> VisionPass | None:
        if self._tap is None:
            return None
        captured: dict[int, LayerPass] | None = self._tap.latest
        self._tap.clear()
        return None if captured is None else self._family.arrange(captured, layouts, self._inputs)

    def _cut_before_text(self, state: TextPass, hidden: Tensor) -> Tensor:
        group = state.uncut
        for cut in self._cuts_of:
            if cut.stage is Stage.LAYER:
                continue
            if cut.stage is Stage.TOWER:
                guards.check_emerged(cut, self._emerged(), states.images_of(group))
            started = time.perf_counter()
            seen = self._ranker.before_text(cut, state, group, hidden, state.vision)
            one = self._ranker.choose(cut, seen, state.trace, state, started)
            if one is None:
                continue
            if self._mode == "rank":
                raise RankingReached
            if self._cuts:
                group, hidden = self._apply(cut, one, state, group, 0, hidden)
                state.groups[0] = group
        return hidden

    def _apply(
        self,
        cut: Cut,
        one: CutTrace,
        state: TextPass,
        group: Group,
        layer: int,
        hidden: Tensor,
    ) -> tuple[Group, Tensor]:
        """Make a cut: merge where the method does, then drop columns."""
        slots, owner = states.images_of(group), guards.owner(cut)
        kept, gate = one.selection.kept, self._ranker.bias(one)
        if torch.equal(kept & slots.alive, slots.alive):
            state.trace.survive(slots, kept, None)
            return group, hidden
        merged = owner.merge(one.selection, one.seen)
        if cut.stage is Stage.TOWER:
            merged = self._arrived(slots.gather(hidden))
        state.trace.survive(slots, kept, merged)
        if merged is not None:
            merged = self._widened(cut, merged)
            if gate is not None:
                moved = gate.gather(1, merged.source) * merged.dominant
            group, hidden, kept = states.place_merged(group, hidden, merged)
            if gate is not None:
                places = (~slots.alive).long().argsort(dim=1, stable=True)
                gate = torch.zeros_like(gate).scatter(1, places[:, : moved.shape[1]], moved)
            if layer == 0 and cut.stage is not Stage.LAYER:
                self._remember(state, group, hidden)
        return states.cut(
            group,
            layer,
            hidden,
            kept,
            gate,
            owner,
            masked=self._mode == "masked",
            inside=cut.stage is Stage.LAYER,
        )

    def _emerged(self) -> Merged | None:
        return None if self._tower is None else self._tower.emerged

    def _arrived(self, projected: Tensor) -> Merged:
        """What emerged from the tower, projected: the model has put it into the first places."""
        merged = self._emerged()
        if merged is None:
            raise CompressionError("the vision tower has not run inside this session")
        return replace(merged, features=projected[:, : merged.valid.shape[1]], projected=True)

    def _widened(self, cut: Cut, merged: Merged) -> Merged:
        """Merged tokens as wide as the language model."""
        if cut.stage is not Stage.VISION or merged.projected:
            return merged
        wide = self._family.project_tokens(merged.features.to(self._family.dtype))
        return Merged(wide, merged.valid, merged.source, merged.dominant, True)

    @staticmethod
    def _remember(state: TextPass, group: Group, hidden: Tensor) -> None:
        """Put merged tokens into the uncut input, for methods that look back at it."""
        if group.index is None:
            state.embeds = hidden
            return
        index = group.index[..., None].expand(*group.index.shape, hidden.shape[2])
        state.embeds = state.embeds.scatter(1, index, hidden)

    def _decode(self, kwargs: dict[str, Any]) -> TextPass:
        embeds: Tensor = kwargs["inputs_embeds"]
        steps = embeds.shape[1]
        if not self._groups or self._last is None:
            raise CompressionError(
                "the cache holds tokens this session has not seen; start with an empty cache"
            )
        encoded = self._inputs.get("mm_encoder_outputs") or {}
        if self._inputs.get("pixel_values") is not None or encoded.get("image") is not None:
            raise CompressionError(
                "an image in a later part of a cached sequence is not supported; put all images "
                "into the first call"
            )
        guards.check_length(self._groups[0].extended(steps).mask, cache_of(kwargs), 0, steps)
        groups = {start: group.extended(steps) for start, group in self._groups.items()}
        given = kwargs.get("position_ids")
        positions = self._last[:, None] + 1 + torch.arange(steps, device=embeds.device)
        if given is not None:
            positions = given.expand(*given.shape[:-2], len(embeds), steps)
        self._last = last_position(positions, torch.ones_like(embeds[..., 0], dtype=torch.bool))
        first = groups[0]
        kwargs["attention_mask"] = first.mask
        kwargs["position_ids"] = (
            positions if first.shift is None else positions - first.shift[:, None]
        )
        state = TextPass(False, positions, first, groups, embeds, trace=self.trace)
        state.memories = self._running.memories if self._running is not None else {}
        return state

    # Decoder layers -----------------------------------------------------------------------------

    def _layer_hook(self, layer: int) -> Any:  # noqa: ANN401 - a hook of torch
        def hook(
            module: object, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            del module
            return self._before_layer(layer, args, kwargs)

        return hook

    def _before_layer(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if _STATE not in kwargs:
            return args, kwargs  # a pass of a compressor's own, not through the text model
        kwargs = dict(kwargs)
        state: TextPass = kwargs.pop(_STATE)
        self._running = state
        kwargs["position_ids"] = None
        hidden: Tensor = args[0]
        if state.prefill and state.uncut.slots is not None:
            hidden = self._at_layer(state, layer, hidden, kwargs.get("position_embeddings"))
        if state.prefill:
            state.trace.lengths.setdefault(layer, hidden.shape[1])
            group = state.group(layer)
            if group.slots is not None:
                state.trace.tokens.setdefault(layer, group.slots.alive.sum(1))
        state.dress(self._family, layer, hidden, kwargs)
        mark(kwargs, state)
        return (hidden, *args[1:]), kwargs

    def _at_layer(
        self,
        state: TextPass,
        layer: int,
        hidden: Tensor,
        rope: Any,  # noqa: ANN401
    ) -> Tensor:
        """Rank and cut at the input of a layer, as far as anything is to be done there."""
        group = state.before(layer)
        for cut in self._cuts_of:
            if cut.stage is not Stage.LAYER:
                continue
            if cut.reads == layer:
                started = time.perf_counter()
                turned = state.rope(self._family, group, layer, hidden) if group.inside else rope
                seen = self._ranker.at_layer(cut, state, group, layer, hidden, turned)
                one = self._ranker.choose(cut, seen, state.trace, state, started)
                if one is not None and self._mode == "rank":
                    raise RankingReached
            if cut.layer == layer and cut.drops and self._cuts:
                found = state.chosen.get(cut)
                if found is None:
                    raise CompressionError("the pruning layer was reached before the ranking one")
                group, hidden = self._apply(cut, found, state, group, layer, hidden)
                state.groups[layer] = group
        return hidden


def _sorted_cuts(parts: Sequence[Compressor], layers: int, mode: Mode) -> tuple[Cut, ...]:
    """Cuts in the order they happen; without cutting, only what the first one needs is looked at.

    What later cuts would see depends on the earlier ones having been made.
    """
    cuts = owned(parts, layers)
    if mode in ("hard", "masked"):
        return cuts
    first = next((index for index, cut in enumerate(cuts) if cut.drops), len(cuts))
    return cuts[: first + 1]


def compress(
    model: Any,  # noqa: ANN401 - transformers is untyped
    compressor: Compressor | Sequence[Compressor],
    *,
    family: Family | None = None,
    mode: Mode = "hard",
    kept: Forced = None,
    seeds: Sequence[int] | None = None,
    answer_columns: int = 0,
    relax: float | None = None,
) -> CompressionSession:
    """Install a compressor in a model; use as a context manager.

    Args:
        model: a loaded model of a supported family.
        compressor: what drops tokens, and where; several act one after the other.
        family: its adapter, if at hand.
        mode: ``hard`` drops tokens; ``masked`` keeps them but lets nobody attend to them, the
            debugging twin of ``hard``; ``observe`` ranks and drops nothing; ``rank`` ranks and
            stops the forward there with `RankingReached`. The last two know the first cut only.
        kept: selection to impose: bool ``[I, V]``, at the first cut, and later ones drop nothing;
            or a `Selection` for all cuts. Scores are still computed.
        seeds: one per batch row, for compressors that draw; None is 0 for all.
        answer_columns: trailing columns that are not prompt (teacher forcing); the last prompt
            token is the one before them.
        relax: temperature of the straight-through relaxation (`column_bias`); None is off.

    Raises:
        CompressionError: on entering, if the compressor does not fit the model or another session
            is open; inside, for caches, beam search or assisted decoding it does not support.
    """
    return CompressionSession(
        model,
        compressor,
        family=family,
        mode=mode,
        kept=kept,
        seeds=seeds,
        answer_columns=answer_columns,
        relax=relax,
    )
