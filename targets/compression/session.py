"""Install a compressor in a model for the length of a ``with`` block: hooks on this instance only.

    with compress(model, FastV(layer=2, retention=0.25)) as session:
        model.generate(**inputs)
    session.trace.kept

The vision tower and projector are watched, the language model receives a shorter sequence (or,
from layer K on, its layers do), and decoding continues with each group of layers knowing its own
columns. Ids, placeholders and the mask that `generate` works with stay as they are.

Three traps of transformers 5 are kept shut: layers never see position ids with gaps (they would be
taken for packed sequences), a 2-D mask is always passed on, and layers whose cache is shorter get
their own mask.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from targets.compression import guards
from targets.compression.base import Compressor, Merged, Seen, Stage
from targets.compression.layout import (
    Group,
    ImageSlots,
    columns_kept,
    find_slots,
    keep_of,
    reindexed,
)
from targets.compression.scoring import attention_row, gather_rows
from targets.compression.trace import Forced, Trace, choose, column_bias
from targets.errors import CompressionError
from targets.families import family_of
from targets.families.base import Family

Mode = Literal["hard", "masked", "observe", "rank"]
_STATE = "redteam_pass"


class RankingReached(Exception):
    """Raised at the ranking point in mode ``rank``; the trace is complete then."""


@dataclass(slots=True)
class _Pass:
    """One forward of the language model; travels through the layers' keyword arguments.

    Gradient checkpointing replays layers with the same arguments, so a replay finds the state of
    its own forward, whatever has run since.
    """

    prefill: bool
    positions: Tensor  # [B, n] position ids of the original sequence
    groups: dict[int, Group]
    slots: ImageSlots | None = None
    trace: Trace = field(default_factory=Trace)
    masks: dict[int, Any] = field(default_factory=dict)
    ropes: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def group(self, layer: int) -> Group:
        """The group a layer belongs to."""
        return self.groups[max(start for start in self.groups if start <= layer)]


class CompressionSession:
    """A compressor installed in a model; see `compress`.

    Attributes:
        trace: what happened in the last prefill.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - transformers is untyped
        compressor: Compressor,
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
        self._compressor, self._mode, self._forced, self._seeds = compressor, mode, kept, seeds
        self._answer_columns, self._relax = answer_columns, relax
        self._cuts = mode in ("hard", "masked")
        self._tap = self._family.tap()
        self._handles: list[Any] = []
        self._image_mask: Tensor | None = None
        self._pictures = False
        self._vision: tuple[Trace, Merged | None] | None = None
        self._groups: dict[int, Group] = {}
        self._last: Tensor | None = None  # [B] position id of the last column so far
        guards.check(self._family, compressor, relax)

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
        """Labels ``[B, L]`` of the full sequence for the columns that reach the logits."""
        index = self._groups[max(self._groups)].index if self._groups else None
        return labels if index is None else labels.gather(1, index)

    def _install(self) -> None:
        family = self._family
        if self._compressor.stage is Stage.VISION:
            self._tap.__enter__()
            self._handles += [
                family.projector.register_forward_pre_hook(self._before_projector),
                family.projector.register_forward_hook(self._behind_projector),
            ]
        self._handles += [
            family.core.register_forward_pre_hook(self._before_model, with_kwargs=True),
            family.text.register_forward_pre_hook(self._before_text, with_kwargs=True),
        ]
        for layer, module in enumerate(family.layers):
            hook = self._layer_hook(layer)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._tap.__exit__(None, None, None)
        guards.release(self._family.model, self)

    # Vision tower and projector -----------------------------------------------------------------

    def _before_projector(self, module: object, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        del module
        vision = self._tap.latest
        if vision is None:
            raise CompressionError(
                f"compressor {self._compressor.name} ranks by the vision tower, which has not run "
                "inside this session; pass pixel_values, not encoder outputs made before"
            )
        tokens = vision.patches.shape[1]
        trace = Trace()
        # Which rows the images belong to is known when the text model starts.
        seen = Seen(
            features=vision.patches,
            count=self._compressor.budget(tokens),
            seeds=self._image_seeds(None, len(vision.hidden)),
            attention=vision.attention(),
            query=vision.query,
            keys=vision.patch_keys,
            vision=vision,
        )
        self._choose(seen, trace)
        selection = trace.selection
        if selection is None or not self._cuts or bool(selection.kept.all()):
            self._vision = (trace, None)
            return None
        merged = self._compressor.merge(selection, seen)
        self._vision = (trace, merged)
        return (merged.features.to(inputs[0].dtype), *inputs[1:])

    def _behind_projector(self, module: object, inputs: object, output: Tensor) -> Tensor | None:
        del module, inputs
        if self._vision is None:
            return None
        trace, merged = self._vision
        if merged is None:
            if trace.seen is not None:  # patch by patch, these are what the text model receives
                trace.seen = replace(trace.seen, features=output)
            return None
        tokens = self._family.tokens
        # Placeholders stay as many as they are: merged tokens take the first places of the image.
        return torch.nn.functional.pad(output, (0, 0, 0, tokens - output.shape[1]))

    # Text model ---------------------------------------------------------------------------------

    def _before_model(self, module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._image_mask = None if ids is None else ids == self._family.image_token_id
        encoded = kwargs.get("mm_encoder_outputs") or {}
        self._pictures = kwargs.get("pixel_values") is not None or encoded.get("image") is not None

    def _before_text(
        self, module: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        del module
        cache = kwargs.get("past_key_values")
        guards.check_cache(cache)
        kwargs = dict(kwargs)
        if cache is None or cache.get_seq_length() == 0:
            state = self._prefill(kwargs)
            self.trace = state.trace
        else:
            state = self._decode(kwargs)
        self._groups = state.groups
        kwargs[_STATE] = state
        return args, kwargs

    def _prefill(self, kwargs: dict[str, Any]) -> _Pass:
        embeds: Tensor = kwargs["inputs_embeds"]
        rows, length = embeds.shape[:2]
        mask, positions = guards.columns_of(kwargs, embeds)
        if self._image_mask is None or self._image_mask.shape != (rows, length):
            raise CompressionError(
                "the session has not seen the token ids of this forward, so it cannot tell image "
                "tokens from text; call the model with input_ids"
            )
        slots = find_slots(self._image_mask, self._family.tokens)
        state = _Pass(True, positions, {0: Group(0, mask, positions=positions)}, slots)
        self._last = positions.masked_fill(mask == 0, -1).amax(1)
        if slots is not None:
            self._rank_before_text(state, slots, embeds, kwargs)
        group = state.groups[0]
        kwargs["attention_mask"], kwargs["position_ids"] = group.mask, group.positions
        return state

    def _rank_before_text(
        self, state: _Pass, slots: ImageSlots, embeds: Tensor, kwargs: dict[str, Any]
    ) -> None:
        stage = self._compressor.stage
        merged: Merged | None = None
        if stage is Stage.VISION:
            if self._vision is None:
                raise CompressionError(
                    f"compressor {self._compressor.name} ranks by the vision tower, which has not "
                    "run inside this session"
                )
            state.trace, merged = self._vision
            self._vision = None
        elif stage is Stage.INPUT:
            self._choose(self._seen(slots.gather(embeds), slots), state.trace)
        state.trace.rows = slots.rows
        if stage is Stage.LAYER or state.trace.selection is None or not self._cuts:
            return
        if merged is not None:
            self._place_merged(state, slots, merged)
            kept = merged.valid
            kept = torch.nn.functional.pad(kept, (0, self._family.tokens - kept.shape[1]))
            gate = self._merged_bias(state.trace, merged)
        else:
            kept = state.trace.selection.kept
            gate = self._bias(state.trace)
        kwargs["inputs_embeds"] = self._cut(state, 0, embeds, slots, kept, gate)

    def _place_merged(self, state: _Pass, slots: ImageSlots, merged: Merged) -> None:
        """With kept positions, a merged token stands where its patch stood."""
        if self._compressor.reindexes:
            return
        old = state.groups[0]
        positions = state.positions.clone()
        places = slots.gather(state.positions).gather(1, merged.source)
        width = merged.source.shape[1]
        positions[slots.rows[:, None], slots.columns[:, :width]] = places
        state.groups[0] = Group(0, old.mask, positions=positions)

    def _decode(self, kwargs: dict[str, Any]) -> _Pass:
        embeds: Tensor = kwargs["inputs_embeds"]
        steps = embeds.shape[1]
        if not self._groups or self._last is None:
            raise CompressionError(
                "the cache holds tokens this session has not seen; start with an empty cache"
            )
        if self._pictures:
            raise CompressionError(
                "an image in a later part of a cached sequence is not supported; put all images "
                "into the first call"
            )
        guards.check_length(
            self._groups[0].extended(steps).mask, kwargs["past_key_values"], 0, steps
        )
        groups = {start: group.extended(steps) for start, group in self._groups.items()}
        given = kwargs.get("position_ids")
        positions = self._last[:, None] + 1 + torch.arange(steps, device=embeds.device)
        if given is not None:
            positions = given.expand(len(embeds), steps)
        self._last = positions[:, -1]
        first = groups[0]
        kwargs["attention_mask"] = first.mask
        kwargs["position_ids"] = (
            positions if first.shift is None else positions - first.shift[:, None]
        )
        return _Pass(False, positions, groups, trace=self.trace)

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
        kwargs = dict(kwargs)
        state: _Pass = kwargs.pop(_STATE)
        kwargs["position_ids"] = None
        hidden: Tensor = args[0]
        slots = state.slots
        if slots is not None and self._compressor.stage is Stage.LAYER:
            if layer == self._compressor.looks_at:
                self._rank_at_layer(state, slots, layer, hidden, kwargs["position_embeddings"])
            if layer == self._compressor.prunes_at and self._cuts:
                selection = state.trace.selection
                if selection is None:
                    raise CompressionError("the pruning layer was reached before the ranking one")
                gate = self._bias(state.trace)
                hidden = self._cut(state, layer, hidden, slots, selection.kept, gate)
        if state.prefill:
            state.trace.lengths.setdefault(layer, hidden.shape[1])
        group = state.group(layer)
        if group.changed and (group.start > 0 or group.bias is not None):
            self._dress(state, group, layer, hidden, kwargs)
        return (hidden, *args[1:]), kwargs

    def _rank_at_layer(
        self,
        state: _Pass,
        slots: ImageSlots,
        layer: int,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
    ) -> None:
        # The same operations run again when the layer is replayed; only their first result counts.
        features = slots.gather(hidden)
        seen = self._seen(features, slots)
        if self._compressor.attends:
            column = hidden.shape[1] - 1 - self._answer_columns
            query, keys = self._family.text_query_keys(layer, hidden, rope, column)
            visible = state.groups[0].mask.bool()
            visible = visible & (torch.arange(visible.shape[1], device=visible.device) <= column)
            attention = attention_row(
                query,
                keys,
                self._family.text_scaling(layer),
                visible=visible,
                softcap=self._family.text_softcap(layer),
            )
            rows, columns = slots.rows[:, None], slots.columns
            seen = replace(
                seen,
                attention=attention.transpose(1, 2)[rows, columns].transpose(1, 2),
                query=query[slots.rows],
                keys=keys.transpose(1, 2)[rows, columns].transpose(1, 2),
            )
        self._choose(seen, state.trace)
        if self._mode == "rank":
            raise RankingReached

    def _dress(
        self, state: _Pass, group: Group, layer: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Give a layer the mask and rotary embedding of its group."""
        cache = kwargs.get("past_key_values")
        guards.check_length(group.mask, cache, layer, hidden.shape[1])
        if state.prefill and group.bias is not None:
            kwargs["attention_mask"] = self._biased_mask(group, layer, hidden, cache)
        else:
            if group.start not in state.masks:
                made = self._family.causal_mask(hidden, group.mask, cache, layer)
                state.masks[group.start] = made
            kwargs["attention_mask"] = state.masks[group.start]
        if group.start not in state.ropes:
            positions = group.positions
            if positions is None:
                shift = 0 if group.shift is None else group.shift[:, None]
                positions = state.positions - shift
            state.ropes[group.start] = self._family.rope(hidden, positions)
        kwargs["position_embeddings"] = state.ropes[group.start]

    def _biased_mask(self, group: Group, layer: int, hidden: Tensor, cache: object) -> Tensor:
        """A float mask that carries the gradient to the scores; not cached, so replays agree."""
        mask = self._family.causal_mask(hidden, group.mask, cache, layer, explicit=True)
        if mask.dtype == torch.bool:
            low = torch.finfo(hidden.dtype).min
            mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, low)
        bias = group.bias if group.bias is not None else torch.zeros_like(group.mask)
        return torch.add(mask, bias[:, None, None].to(mask.dtype))

    # Ranking and cutting ------------------------------------------------------------------------

    def _seen(self, features: Tensor, slots: ImageSlots) -> Seen:
        count = self._compressor.budget(features.shape[1])
        return Seen(features, count, self._image_seeds(slots, len(features)))

    def _image_seeds(self, slots: ImageSlots | None, images: int) -> tuple[int, ...]:
        """A seed for each image: its row's, told apart by its place in the row."""
        if self._seeds is None:
            return (0,) * images
        if slots is None:
            return tuple(self._seeds) if len(self._seeds) == images else (0,) * images
        rows = slots.rows.tolist()
        if max(rows) >= len(self._seeds):
            raise CompressionError(
                f"{len(self._seeds)} seeds were given for a batch of {max(rows) + 1} rows or more"
            )
        ordinals = slots.ordinals()
        return tuple(
            self._seeds[row] + 1_000_003 * place for row, place in zip(rows, ordinals, strict=True)
        )

    def _choose(self, seen: Seen, trace: Trace) -> None:
        started = time.perf_counter()
        scores, selection = choose(self._compressor, seen, self._forced)
        if trace.scores is None:
            trace.scores, trace.selection, trace.seen = scores, selection, seen
            trace.seconds = time.perf_counter() - started

    def _bias(self, trace: Trace) -> Tensor | None:
        if self._relax is None or trace.scores is None or trace.selection is None:
            return None
        return column_bias(trace.scores, trace.selection.kept, self._relax)

    def _merged_bias(self, trace: Trace, merged: Merged) -> Tensor | None:
        bias = self._bias(trace)
        if bias is None:
            return None
        moved = bias.gather(1, merged.source) * merged.dominant
        return torch.nn.functional.pad(moved, (0, self._family.tokens - moved.shape[1]))

    def _cut(
        self,
        state: _Pass,
        layer: int,
        hidden: Tensor,
        slots: ImageSlots,
        kept: Tensor,
        gate: Tensor | None,
    ) -> Tensor:
        """Start a group at a layer; returns what is left of its input."""
        rows, length = hidden.shape[:2]
        old = state.group(layer)
        keep = keep_of(slots, kept, length, rows)
        survivors = None if self._mode == "masked" else columns_kept(keep)
        live = keep & old.mask.bool()
        positions, mask = old.positions, live.long()
        if positions is None:
            raise CompressionError("columns can only be dropped at prefill")
        bias = None
        if gate is not None:
            bias = gate.new_zeros(rows, length)
            bias = bias.index_put((slots.rows[:, None], slots.columns), gate)
        shift = None
        if self._compressor.reindexes:
            positions, shift = reindexed(positions, live)
        index = None
        if survivors is not None:
            index, _ = survivors
            mask, positions = mask.gather(1, index), positions.gather(1, index)
            bias = None if bias is None else bias.gather(1, index)
            hidden = gather_rows(hidden, index)
        state.groups[layer] = Group(layer, mask, index, shift, positions, bias, changed=True)
        return hidden


def compress(
    model: Any,  # noqa: ANN401 - transformers is untyped
    compressor: Compressor,
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
        compressor: what drops tokens, and where.
        family: its adapter, if at hand.
        mode: ``hard`` drops tokens; ``masked`` keeps them but lets nobody attend to them, the
            debugging twin of ``hard``; ``observe`` ranks and drops nothing; ``rank`` ranks and
            stops the forward there with `RankingReached`.
        kept: selection to impose, bool ``[I, V]`` or `Selection`; scores are still computed.
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
