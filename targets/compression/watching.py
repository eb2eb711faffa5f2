"""See attention and MLP of some layers at work, for compressors that rank by what these change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from targets.compression import state as states
from targets.compression.base import Compressor
from targets.compression.ranker import Ranker
from targets.compression.state import TextPass

_STATE = "redteam_pass"


class Watcher:
    """Hooks that show a compressor the modules of a layer.

    Args:
        ranker: makes what it sees.
        running: the pass that went through a layer's own hook last.
    """

    def __init__(self, ranker: Ranker, running: Callable[[], TextPass | None]) -> None:
        self._ranker, self._running = ranker, running
        self._replayed: TextPass | None = None

    def install(self, one: Compressor, layer: int) -> list[Any]:
        """Hooks on a layer's attention and MLP; handles with ``remove``."""
        block = self._ranker.family.layers[layer]
        handles = [block.self_attn.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for name, module in (("attention", block.self_attn), ("mlp", block.mlp)):
            hook = self._hook(one, layer, name)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return handles

    def _begin(self, module: object, args: object, kwargs: dict[str, Any]) -> None:
        del module, args
        # A replay under checkpointing does not come through the layer's own hook.
        self._replayed = marked(kwargs)

    def _hook(self, one: Compressor, layer: int, name: str) -> Any:  # noqa: ANN401 - of torch
        def hook(
            module: object,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            output: Any,  # noqa: ANN401
        ) -> None:
            del module
            before: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            state = self._replayed or self._running()
            if state is None or not state.prefill or state.uncut.slots is None:
                return
            after = output[0] if isinstance(output, tuple) else output
            group = state.group(layer)
            seen = self._ranker.watched(one, state, group, layer, before)
            one.watch(layer, name, seen.features, states.images_of(group).gather(after), seen)

        return hook


def mark(kwargs: dict[str, Any], state: TextPass) -> None:
    """Let a layer's rotary embedding say which pass it belongs to.

    It is the one argument that reaches the attention module of every family, and that replays of
    the layer under checkpointing get again as the same object.
    """
    turn = kwargs.get("position_embeddings")
    if isinstance(turn, tuple):
        turn[0].__dict__[_STATE] = state


def marked(kwargs: dict[str, Any]) -> TextPass | None:
    """The pass that `mark` noted; None where there is none."""
    turn = kwargs.get("position_embeddings")
    found: TextPass | None = turn[0].__dict__.get(_STATE) if isinstance(turn, tuple) else None
    return found
