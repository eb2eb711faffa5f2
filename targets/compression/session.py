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

from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from targets.compression import guards
from targets.compression.base import Compressor, Merged, Stage
from targets.compression.layout import Group, ImageSlots, find_slots
from targets.compression.ranker import Ranker
from targets.compression.state import TextPass
from targets.compression.trace import Forced, Trace
from targets.errors import CompressionError
from targets.families import family_of
from targets.families.base import Family

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
        self._compressor, self._mode = compressor, mode
        self._ranker = Ranker(compressor, self._family, kept, seeds, answer_columns, relax)
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
        trace = Trace()
        seen = self._ranker.at_vision(vision, trace)
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

    def _prefill(self, kwargs: dict[str, Any]) -> TextPass:
        embeds: Tensor = kwargs["inputs_embeds"]
        rows, length = embeds.shape[:2]
        mask, positions = guards.columns_of(kwargs, embeds)
        if self._image_mask is None or self._image_mask.shape != (rows, length):
            raise CompressionError(
                "the session has not seen the token ids of this forward, so it cannot tell image "
                "tokens from text; call the model with input_ids"
            )
        slots = find_slots(self._image_mask, self._family.tokens)
        uncut = Group(0, mask, positions=positions)
        state = TextPass(True, positions, uncut, {0: uncut}, slots)
        self._last = positions.masked_fill(mask == 0, -1).amax(1)
        if slots is not None:
            self._rank_before_text(state, slots, embeds, kwargs)
        group = state.groups[0]
        kwargs["attention_mask"], kwargs["position_ids"] = group.mask, group.positions
        return state

    def _rank_before_text(
        self, state: TextPass, slots: ImageSlots, embeds: Tensor, kwargs: dict[str, Any]
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
            self._ranker.at_input(embeds, slots, state.trace)
        state.trace.rows = slots.rows
        if stage is Stage.LAYER or state.trace.selection is None or not self._cuts:
            return
        if merged is not None:
            self._place_merged(state, slots, merged)
            kept = merged.valid
            kept = torch.nn.functional.pad(kept, (0, self._family.tokens - kept.shape[1]))
            gate = self._ranker.merged_bias(state.trace, merged)
        else:
            kept = state.trace.selection.kept
            gate = self._ranker.bias(state.trace)
        kwargs["inputs_embeds"] = self._cut(state, 0, embeds, kept, gate)

    def _place_merged(self, state: TextPass, slots: ImageSlots, merged: Merged) -> None:
        """With kept positions, a merged token stands where its patch stood."""
        if self._compressor.reindexes:
            return
        positions = state.positions.clone()
        places = slots.gather(state.positions).gather(1, merged.source)
        width = merged.source.shape[1]
        positions[slots.rows[:, None], slots.columns[:, :width]] = places
        state.uncut = Group(0, state.uncut.mask, positions=positions)

    def _decode(self, kwargs: dict[str, Any]) -> TextPass:
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
        return TextPass(False, positions, first, groups, trace=self.trace)

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
        state: TextPass = kwargs.pop(_STATE)
        kwargs["position_ids"] = None
        hidden: Tensor = args[0]
        slots = state.slots
        if slots is not None and self._compressor.stage is Stage.LAYER:
            if layer == self._compressor.looks_at:
                rope, mask = kwargs["position_embeddings"], state.uncut.mask
                self._ranker.at_layer(layer, hidden, rope, mask, slots, state.trace)
                if self._mode == "rank":
                    raise RankingReached
            if layer == self._compressor.prunes_at and self._cuts:
                selection = state.trace.selection
                if selection is None:
                    raise CompressionError("the pruning layer was reached before the ranking one")
                gate = self._ranker.bias(state.trace)
                hidden = self._cut(state, layer, hidden, selection.kept, gate)
        if state.prefill:
            state.trace.lengths.setdefault(layer, hidden.shape[1])
        state.dress(self._family, layer, hidden, kwargs)
        return (hidden, *args[1:]), kwargs

    def _cut(
        self, state: TextPass, layer: int, hidden: Tensor, kept: Tensor, gate: Tensor | None
    ) -> Tensor:
        if state.slots is None:
            return hidden
        return state.cut(
            layer,
            hidden,
            state.slots,
            kept,
            gate,
            masked=self._mode == "masked",
            reindexes=self._compressor.reindexes,
            inside=self._compressor.stage is Stage.LAYER,
        )


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
