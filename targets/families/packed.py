"""Towers that take pictures of any size as one packed sequence, as Qwen-VL's do.

All patches of all pictures stand in a single row; a layer attends within segments of it, which are
whole pictures or windows of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from targets.compression.scoring import received_attention
from targets.families.vision import LayerPass, TappedLayer, VisionPass, VisionTap, averaged


@dataclass(frozen=True, slots=True)
class PackedPass(VisionPass):
    """A pass over packed pictures; there is a single run, G = 1, whose S are all their patches.

    Attributes:
        segments: lengths of the segments each captured layer attends within, in packed order.
        sizes: patches of each picture, in packed order.
    """

    segments: dict[int, tuple[int, ...]] = field(default_factory=dict)
    sizes: tuple[int, ...] = ()

    def received(self, layer: int | None = None) -> Tensor:
        """``[I, N, V]`` mean attention a token's patches receive from all patches of its picture.

        In a windowed layer patches of other windows pay nothing. Every picture's attention sums
        to 1 over its patches, so over its tokens (means of r patches) it sums to 1 / r.
        """
        number = self.feature_layer if layer is None else layer
        here = self.layers[number]
        cut = list(self.segments[number])
        pairs = zip(torch.split(here.queries, cut, 2), torch.split(here.keys, cut, 2), strict=True)
        # Mean over the rows of a segment, times its rows, is the sum over them.
        sums = [
            received_attention(queries, keys, self.scaling) * queries.shape[2]
            for queries, keys in pairs
        ]
        rows = torch.tensor(self.sizes, device=here.keys.device)
        share = torch.cat(sums, 2) / rows.repeat_interleave(rows)
        return self.per_token(share.transpose(1, 2)).mean(2).transpose(1, 2)

    def _smoothed(self, values: Tensor, by: LayerPass, times: int) -> Tensor:
        """Averaged within each picture."""
        cut = list(self.sizes)
        pairs = zip(torch.split(values, cut, 2), torch.split(by.keys, cut, 2), strict=True)
        return torch.cat([averaged(*pair, self.scaling, times) for pair in pairs], 2)


class PackedTap(VisionTap):
    """Captures blocks whose attention makes queries, keys and values in one ``qkv``.

    Queries and keys are kept as attention compares them, after the rotary embedding of the tower.

    Args:
        tower: the vision tower; its start begins a new capture.
        blocks: by number, those to capture.
        stop: raise `FeaturesReached` behind the last of them.
    """

    def __init__(
        self,
        tower: Any,  # noqa: ANN401 - modules of transformers are untyped
        blocks: dict[int, Any],
        *,
        stop: bool = False,
    ) -> None:
        layers = {
            number: TappedLayer(block, block.attn.qkv, block.attn, int(block.attn.num_heads))
            for number, block in blocks.items()
        }
        super().__init__(tower, layers, stop=stop)

    def __enter__(self) -> PackedTap:
        self._handles = [self._tower.register_forward_pre_hook(self._begin)]
        last = max(self._layers)
        for number, one in self._layers.items():
            end = self._keep(number, "hidden", last=number == last)
            self._handles += [
                one.key.register_forward_pre_hook(self._keep_turn(number), with_kwargs=True),
                one.query.register_forward_hook(self._keep(number, "qkv")),
                one.layer.register_forward_hook(end),
            ]
        self._listed()
        return self

    def _keep_turn(self, number: int) -> Callable[[object, object, dict[str, Any]], None]:
        def hook(module: object, inputs: object, kwargs: dict[str, Any]) -> None:
            del module, inputs
            turn = torch.stack(tuple(kwargs["position_embeddings"]))
            self._seen.setdefault((number, "turn"), turn)

        return hook

    def _pass(self, number: int, one: TappedLayer) -> LayerPass:
        packed = self._seen[number, "qkv"]
        queries, keys, values = packed.view(len(packed), 3, one.heads, -1).permute(1, 2, 0, 3)
        cosine, sine = self._seen[number, "turn"].float()
        hidden = self._seen[number, "hidden"]
        queries, keys = (_turn(part, cosine, sine)[None] for part in (queries, keys))
        return LayerPass(hidden[None], queries, keys, values[None], one.key.proj)


def _turn(values: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of ``[N, S, E]`` in float32, as the tower does it."""
    exact = values.float()
    first, second = exact.chunk(2, dim=-1)
    return (exact * cosine + torch.cat([-second, first], -1) * sine).to(values.dtype)
