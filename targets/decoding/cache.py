"""A cache of keys and values that grows in place.

That of transformers joins all columns anew for every token, and copies all of them whenever beams
change places. Here a layer keeps room behind its columns, and beams of one sample, whose prompts
are the same, exchange only what was generated.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = 64
"""Columns of room behind a prompt, and of further room whenever that is used up."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A layer that forgets nothing; its keys and values are the front of something larger.

    Attributes:
        prompt: columns that came first, at once.
    """

    prompt: int = 0
    _room: tuple[Tensor | None, Tensor | None] = (None, None)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Put columns ``[B, M, q, E]`` behind the others; all of them."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.prompt = key_states.shape[2]
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        keys, values = self._room
        self.keys, keys = _grown(self.keys, keys, key_states)
        self.values, values = _grown(self.values, values, value_states)
        self._room = keys, values
        return self.keys, self.values

    def exchange(self, rows: Tensor) -> None:
        """Reorder all rows, long ``[B]``, where each comes to a row with the same prompt."""
        if self._room[0] is None:
            self.batch_select_indices(rows)
            return
        for held in (self.keys, self.values):
            said = held[:, :, self.prompt :]
            said.copy_(said[rows])

    def part(self) -> None:
        """Write no more to the tensors there are, which somebody else keeps."""
        self._room = None, None


def _grown(shown: Tensor, room: Tensor | None, more: Tensor) -> tuple[Tensor, Tensor]:
    """Columns with more behind, and what they are the front of."""
    length, wanted = shown.shape[2], shown.shape[2] + more.shape[2]
    # Whatever else changes a layer (selecting rows, moving it) puts other tensors in its place.
    if (
        room is None
        or room.data_ptr() != shown.data_ptr()
        or len(room) != len(more)
        or room.shape[2] < wanted
    ):
        room = more.new_empty(*more.shape[:2], wanted + _ROOM, more.shape[3])
        room[:, :, :length] = shown
    room[:, :, length:wanted] = more
    return room[:, :, :wanted], room


def growing(config: Any) -> Any:  # noqa: ANN401 - transformers is untyped
    """An empty cache for a model; layers that forget stay those of transformers.

    Args:
        config: of the model.
    """
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(one) is DynamicLayer else one for one in cache.layers]
    return cache


def apart(cache: Any) -> Any:  # noqa: ANN401
    """A cache that grows apart from the given one and shares its tensors so far."""
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.part()
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    return found


def exchange(cache: Any, rows: Tensor) -> None:  # noqa: ANN401
    """Reorder beams among those of their own sample.

    Args:
        cache: from `growing`.
        rows: long ``[n]``, of n rows.
    """
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            if layer.get_seq_length() > 0:
                layer.exchange(rows)
        else:
            layer.batch_select_indices(rows)
