"""A vision tower that a compressor shortens from inside, and where what comes out of it goes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from targets.compression.base import Compressor, Merged
from targets.compression.trace import Forced
from targets.families.base import Family


class Shortening:
    """Installs the one compressor of a session that acts inside the tower.

    Args:
        family: the model's adapter.
        one: the compressor.
        memory: its memory, emptied whenever the tower starts.
        forced: a selection imposed from outside, which has to act in the tower already.

    Attributes:
        emerged: what came out of the tower last; None once it has been used.
    """

    def __init__(
        self, family: Family, one: Compressor, memory: dict[str, Any], forced: Forced
    ) -> None:
        self._family, self._one, self._memory, self._forced = family, one, memory, forced
        self.emerged: Merged | None = None

    def install(self) -> list[Any]:
        """Hooks on tower and projector; handles with ``remove``."""
        family = self._family
        return [
            family.tower.register_forward_pre_hook(self._begin),
            *self._one.install(family, self._memory),
            family.projector.register_forward_pre_hook(self._before_projector),
        ]

    def _begin(self, module: object, inputs: object) -> None:
        del module, inputs
        self._memory.clear()
        self._memory["forced"] = self._forced

    def _before_projector(self, module: object, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        features: Tensor = inputs[0]
        merged = self.emerged = self._one.emerge(features, self._memory)
        # Placeholders stay as many as they are, so the projector gets as many features.
        pad = self._family.fixed_tokens() - merged.features.shape[1]
        return (torch.nn.functional.pad(merged.features, (0, 0, 0, pad)), *inputs[1:])
