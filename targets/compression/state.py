"""One forward pass of a language model under a session: its groups of layers, cut and dressed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from targets.caches import cache_of
from targets.compression import guards
from targets.compression.base import Compressor, Cut, Merged
from targets.compression.layout import Group, ImageSlots, columns_kept, reindexed, take
from targets.compression.scoring import gather_rows
from targets.compression.trace import CutTrace, Trace
from targets.errors import CompressionError
from targets.families.base import Family
from targets.families.vision import VisionPass


@dataclass(slots=True)
class TextPass:
    """One forward of the language model; travels through the layers' keyword arguments.

    Where gradient checkpointing includes hooks (transformers before 5.23), it replays layers with
    the same arguments, so a replay finds the state of its own forward, whatever has run since.

    Attributes:
        prefill: whether the cache was empty.
        positions: ``[…, B, n]`` position ids of the original sequence.
        uncut: the group of the sequence as it enters the language model.
        groups: by first layer.
        embeds: ``[B, L, D]`` input of the language model before any cut, merged tokens in place.
        given: the mask the language model was given, where it is no 2-D one.
        vision: the pass of the vision tower, if any compressor looks at it.
        trace: filled at prefill.
        entering: the group in which the sequence reaches layer 0.
        chosen: what each cut chose; a replay finds it here.
        masks: attention mask of layers, by group and form.
        ropes: rotary embedding of layers, by group and form.
        memories: of each compressor, by identity.
    """

    prefill: bool
    positions: Tensor
    uncut: Group
    groups: dict[int, Group]
    embeds: Tensor
    given: Any = None
    vision: VisionPass | None = None
    trace: Trace = field(default_factory=Trace)
    entering: Group | None = None
    chosen: dict[Cut, CutTrace] = field(default_factory=dict)
    masks: dict[tuple[int, object], Any] = field(default_factory=dict)
    ropes: dict[tuple[int, object], Any] = field(default_factory=dict)
    memories: dict[int, dict[str, Any]] = field(default_factory=dict)

    def memory(self, compressor: Compressor) -> dict[str, Any]:
        """What a compressor remembers between its cuts of this forward."""
        return self.memories.setdefault(id(compressor), {})

    def group(self, layer: int) -> Group:
        """The group a layer belongs to."""
        return self.groups[max(start for start in self.groups if start <= layer)]

    def before(self, layer: int) -> Group:
        """The group a cut at a layer starts from; on a replay the cut is already among `groups`."""
        if layer == 0:
            return self.uncut if self.entering is None else self.entering
        return self.group(layer - 1)

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
        cache = cache_of(kwargs)
        guards.check_length(group.mask, cache, layer, hidden.shape[1])
        form = family.form(layer)
        if group.bias is not None:
            kwargs["attention_mask"] = self._biased_mask(family, group, layer, hidden, cache)
        else:
            if (group.start, form) not in self.masks:
                made = family.layer_mask(hidden, group, cache, layer, self.given)
                self.masks[group.start, form] = made
            kwargs["attention_mask"] = self.masks[group.start, form]
        kwargs["position_embeddings"] = self.rope(family, group, layer, hidden)

    def rope(self, family: Family, group: Group, layer: int, hidden: Tensor) -> Any:  # noqa: ANN401
        """Rotary embedding of a group in the form a layer takes."""
        form = family.form(layer)
        if (group.start, form) not in self.ropes:
            positions = group.positions
            if positions is None:
                shift = 0 if group.shift is None else group.shift[:, None]
                positions = self.positions - shift
            self.ropes[group.start, form] = family.rope(hidden, positions, layer)
        return self.ropes[group.start, form]

    def _biased_mask(
        self, family: Family, group: Group, layer: int, hidden: Tensor, cache: object
    ) -> Tensor:
        """A float mask that carries the gradient to the scores; not cached, so replays agree."""
        if group.bias is None:
            raise CompressionError("there is no bias to add")
        mask = family.layer_mask(hidden, group, cache, layer, self.given, explicit=True)
        if mask.dtype == torch.bool:
            low = torch.finfo(hidden.dtype).min
            mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, low)
        return torch.add(mask, group.bias[:, None, None].to(mask.dtype))


def images_of(group: Group) -> ImageSlots:
    """Where the images of a group are.

    Raises:
        CompressionError: at decoding, when nothing is cut any more.
    """
    if group.slots is None or group.positions is None:
        raise CompressionError("columns can only be dropped at prefill")
    return group.slots


def place_merged(group: Group, hidden: Tensor, merged: Merged) -> tuple[Group, Tensor, Tensor]:
    """Let merged tokens take the first living places of their images, in their order.

    Args:
        group: the columns before.
        hidden: ``[B, n, D]`` what they hold.
        merged: the new tokens, as wide as `hidden`.

    Returns:
        The group with positions of the sources, `hidden` with the tokens in it, and the places
        that are in use, bool ``[I, V]``.
    """
    slots, positions = images_of(group), group.positions
    if positions is None:
        raise CompressionError("columns can only be dropped at prefill")
    width = merged.source.shape[1]
    if bool((merged.valid.sum(1) > slots.alive.sum(1)).any()):
        raise CompressionError(
            f"{int(merged.valid.sum(1).amax())} merged tokens do not fit into the "
            f"{int(slots.alive.sum(1).amin())} places of an image; force a smaller kept set"
        )
    # Living places first, in order; a stable sort of a row that is alive throughout is 0 … V − 1.
    places = (~slots.alive).long().argsort(dim=1, stable=True)[:, :width]
    rows = slots.rows[:, None].expand_as(places)[merged.valid]
    columns = slots.columns.gather(1, places)[merged.valid]
    hidden = hidden.index_put((rows, columns), merged.features[merged.valid].to(hidden.dtype))
    sources = slots.columns.gather(1, merged.source)[merged.valid]
    moved = positions.clone()
    moved[..., rows, columns] = positions[..., rows, sources]
    used = torch.zeros_like(slots.alive).scatter(1, places, merged.valid)
    sources = slots.carries.gather(1, merged.source)
    carries = slots.carries.scatter(1, places, torch.where(merged.valid, sources, places))
    slots = replace(slots, carries=carries)
    return replace(group, positions=moved, slots=slots), hidden, used


def cut(
    old: Group,
    start: int,
    hidden: Tensor,
    kept: Tensor,
    gate: Tensor | None,
    by: Compressor,
    *,
    masked: bool,
    inside: bool,
) -> tuple[Group, Tensor]:
    """The columns that are left when only `kept` places live on.

    Args:
        old: the columns before.
        start: first layer of the new group.
        hidden: ``[B, n, D]`` what they hold.
        kept: bool ``[I, V]``.
        gate: ``[I, V]`` bias of the image columns, or None.
        by: the compressor, for its position mode and separators.
        masked: leave all columns, but let nobody attend to dropped ones.
        inside: whether the language model has already made masks and embeddings.

    Returns:
        The new group, and what is left of `hidden`.
    """
    slots, positions = images_of(old), old.positions
    if positions is None:
        raise CompressionError("columns can only be dropped at prefill")
    rows, length = hidden.shape[:2]
    dead = slots.image_columns(length, rows)
    alive = slots.spread((slots.alive & kept).long(), length, rows).bool()
    separate = torch.zeros_like(slots.separators) if by.drops_separators else slots.separators
    keep = ~dead | alive | separate
    live = keep & old.mask.bool()
    # What stands before the first living column evens the rows out and need not be carried along;
    # padding behind (of answers) has to stay where it is.
    begun = live.long().cumsum(1) > 0
    index = None if masked else columns_kept(keep & begun)
    bias = old.bias
    if gate is not None:
        fresh = slots.spread(gate, length, rows)
        bias = fresh if bias is None else bias + fresh
    shift = old.shift
    if by.reindexes:
        fresh, more = reindexed(positions, live)
        # A row that loses nothing keeps its ids: those of a grid have no gaps to be closed.
        same = (live == old.mask.bool()).all(1) & ~_merged_rows(slots, rows)
        positions = torch.where(same[:, None], positions, fresh)
        more = more.masked_fill(same, 0)
        shift = more if shift is None else shift + more
    mask, whole, slots = live.long(), old.index, slots.after(kept, index)
    if index is not None:
        mask, positions = mask.gather(1, index), take(positions, index)
        bias = None if bias is None else bias.gather(1, index)
        hidden = gather_rows(hidden, index)
        whole = index if whole is None else whole.gather(1, index)
    group = Group(start, mask, whole, shift, positions, bias, inside or old.inside, slots)
    return group, hidden


def _merged_rows(slots: ImageSlots, rows: int) -> Tensor:
    """Rows in which some place carries another token than its own, bool ``[B]``."""
    own = torch.arange(slots.carries.shape[1], device=slots.carries.device)
    other = ((slots.carries != own) & slots.alive).any(1)
    found = torch.zeros(rows, dtype=torch.long, device=other.device)
    return found.index_add(0, slots.rows, other.long()) > 0
