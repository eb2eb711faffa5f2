"""What a prefill costs on paper: multiply-accumulates and cache bytes of a language model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

FORMULA: Final = "n·d·(2·d_q + 2·d_kv) + 2·n²·d_q + f·n·d·m per layer"
"""MACs of one decoder layer on n columns; f is 3 for a gated feed-forward network, else 2."""


@dataclass(frozen=True, slots=True)
class Dimensions:
    """What the cost of a decoder layer depends on.

    Attributes:
        width: d, of the residual stream.
        query_width: d_q, all query heads together.
        key_width: d_kv, all key heads together.
        inner: m, width of the feed-forward network.
        gated: whether that has three matrices, not two.
        layers: how many.
    """

    width: int
    query_width: int
    key_width: int
    inner: int
    gated: bool
    layers: int

    @staticmethod
    def of(text: Any) -> Dimensions:  # noqa: ANN401 - a configuration of transformers
        """From the configuration of a language model."""
        heads = int(text.num_attention_heads)
        head = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
        keys = int(getattr(text, "num_key_value_heads", None) or heads)
        return Dimensions(
            width=int(text.hidden_size),
            query_width=heads * head,
            key_width=keys * head,
            inner=int(text.intermediate_size),
            # Every text model of the supported families has a gated network.
            gated=True,
            layers=int(text.num_hidden_layers),
        )


def layer_macs(columns: int, size: Dimensions) -> int:
    """Multiply-accumulates of one decoder layer on n columns (`FORMULA`).

    Attention counts the full square, as published figures do, though half of it is masked. With
    d = d_q = d_kv this is ``4nd² + 2n²d + 3ndm``: 3.82 T for 576 tokens in the 32 layers of
    LLaVA-1.5-7B. One multiply-accumulate is two FLOPs.
    """
    projections = columns * size.width * (2 * size.query_width + 2 * size.key_width)
    attention = 2 * columns * columns * size.query_width
    forward = (3 if size.gated else 2) * columns * size.width * size.inner
    return projections + attention + forward


def prefill_macs(lengths: Iterable[int], size: Dimensions) -> int:
    """Sum over layers, each with its own number of columns."""
    return sum(layer_macs(length, size) for length in lengths)


def cache_bytes(cache: Any) -> int:  # noqa: ANN401 - a cache of transformers
    """Bytes of the keys and values a cache holds."""
    total = 0
    for layer in cache.layers:
        for part in (layer.keys, layer.values):
            total += part.numel() * part.element_size()
    return total
