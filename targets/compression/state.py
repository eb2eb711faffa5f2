"""One forward pass of a language model under a session: its groups of layers, cut and dressed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from targets.compression import guards
from targets.compression.layout import Group, ImageSlots, columns_kept, keep_of, reindexed
from targets.compression.scoring import gather_rows
from targets.compression.trace import Trace
from targets.errors import CompressionError
from targets.families.base import Family


@dataclass(slots=True)
class TextPass:
    """One forward of the language model; travels through the layers' keyword arguments.

    Where gradient checkpointing includes hooks (transformers before 5.23), it replays layers with
    the same arguments, so a replay finds the state of its own forward, whatever has run since.

    Attributes:
        prefill: whether the cache was empty.
        positions: ``[B, n]`` position ids of the original sequence.
        uncut: the group of the sequence as it enters the language model.
        groups: by first layer.
        slots: where the images are, at prefill.
        trace: filled at prefill.
        masks: attention mask of each group, by first layer.
        ropes: cosine and sine of each group, by first layer.
    """

    prefill: bool
    positions: Tensor
    uncut: Group
    groups: dict[int, Group]
    slots: ImageSlots | None = None
    trace: Trace = field(default_factory=Trace)
    masks: dict[int, Any] = field(default_factory=dict)
    ropes: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def group(self, layer: int) -> Group:
        """The group a layer belongs to."""
        return self.groups[max(start for start in self.groups if start <= layer)]

    def before(self, layer: int) -> Group:
        """The group a cut at a layer starts from; on a replay the cut is already among `groups`."""
        earlier = [start for start in self.groups if start < layer]
        return self.groups[max(earlier)] if earlier else self.uncut

    def cut(
        self,
        layer: int,
        hidden: Tensor,
        slots: ImageSlots,
        kept: Tensor,
        gate: Tensor | None,
        *,
        masked: bool,
        reindexes: bool,
        inside: bool,
    ) -> Tensor:
        """Start a group at a layer; returns what is left of its input.

        Args:
            layer: first layer of the group.
            hidden: ``[B, L, D]`` its input.
            slots: where the images are.
            kept: bool ``[I, V]``.
            gate: ``[I, V]`` bias of the image columns, or None.
            masked: leave all columns, but let nobody attend to dropped ones.
            reindexes: whether kept columns get position ids without gaps.
            inside: whether the language model has already made masks and embeddings.
        """
        rows, length = hidden.shape[:2]
        old = self.before(layer)
        keep = keep_of(slots, kept, length, rows)
        survivors = None if masked else columns_kept(keep)
        live = keep & old.mask.bool()
        positions, mask = old.positions, live.long()
        if positions is None:
            raise CompressionError("columns can only be dropped at prefill")
        bias = None
        if gate is not None:
            places = (slots.rows[:, None], slots.columns)
            bias = gate.new_zeros(rows, length).index_put(places, gate)
        shift = None
        if reindexes:
            positions, shift = reindexed(positions, live)
        index = None
        if survivors is not None:
            index, _ = survivors
            mask, positions = mask.gather(1, index), positions.gather(1, index)
            bias = None if bias is None else bias.gather(1, index)
            hidden = gather_rows(hidden, index)
        self.groups[layer] = Group(layer, mask, index, shift, positions, bias, inside)
        return hidden

    def dress(self, family: Family, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Give a layer the mask and rotary embedding of its group, where they differ.

        Args:
            family: the model's adapter.
            layer: the layer.
            hidden: ``[B, n, D]`` its input.
            kwargs: its keyword arguments, changed in place.

        Raises:
            CompressionError: if its cache holds another number of columns than the group.
        """
        group = self.group(layer)
        if not group.inside and group.bias is None:
            return  # the model has made both from what it was given
        cache = kwargs.get("past_key_values")
        guards.check_length(group.mask, cache, layer, hidden.shape[1])
        if group.bias is not None:
            kwargs["attention_mask"] = _biased_mask(family, group, group.bias, layer, hidden, cache)
        else:
            if group.start not in self.masks:
                self.masks[group.start] = family.causal_mask(hidden, group.mask, cache, layer)
            kwargs["attention_mask"] = self.masks[group.start]
        if group.start not in self.ropes:
            positions = group.positions
            if positions is None:
                shift = 0 if group.shift is None else group.shift[:, None]
                positions = self.positions - shift
            self.ropes[group.start] = family.rope(hidden, positions)
        kwargs["position_embeddings"] = self.ropes[group.start]


def _biased_mask(
    family: Family, group: Group, bias: Tensor, layer: int, hidden: Tensor, cache: object
) -> Tensor:
    """A float mask that carries the gradient to the scores; not cached, so replays agree."""
    mask = family.causal_mask(hidden, group.mask, cache, layer, explicit=True)
    if mask.dtype == torch.bool:
        low = torch.finfo(hidden.dtype).min
        mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, low)
    return torch.add(mask, bias[:, None, None].to(mask.dtype))
