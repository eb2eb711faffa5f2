"""Costs on paper against published figures and sums written out."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from targets.costs import Dimensions, cache_bytes, layer_macs, prefill_macs

LLAVA_7B = Dimensions(4096, 4096, 4096, 11008, gated=True, layers=32)


def test_the_published_figure_of_llava_comes_out() -> None:
    """3.82 TFLOPs (multiply-accumulates) for 576 image tokens, 0.42 and 0.85 T for 64 and 128."""
    assert round(prefill_macs([576] * 32, LLAVA_7B) / 1e12, 2) == 3.82
    assert round(prefill_macs([64] * 32, LLAVA_7B) / 1e12, 2) == 0.42


def test_the_closed_form() -> None:
    n, d, m = 7, 12, 20
    plain = Dimensions(d, d, d, m, gated=True, layers=3)
    assert layer_macs(n, plain) == 4 * n * d * d + 2 * n * n * d + 3 * n * d * m
    grouped = Dimensions(d, d, 4, m, gated=False, layers=3)
    wanted = 2 * n * d * d + 2 * n * d * 4 + 2 * n * n * d + 2 * n * d * m
    assert layer_macs(n, grouped) == wanted
    assert prefill_macs([n, n, 2], plain) == 2 * layer_macs(n, plain) + layer_macs(2, plain)


def test_dimensions_come_from_the_configuration() -> None:
    from transformers import Gemma3TextConfig, Qwen2Config

    qwen = Dimensions.of(
        Qwen2Config(
            hidden_size=64,
            num_attention_heads=8,
            num_key_value_heads=2,
            intermediate_size=96,
            num_hidden_layers=5,
        )
    )
    assert qwen == Dimensions(64, 64, 16, 96, gated=True, layers=5)
    wide = Gemma3TextConfig(
        hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=48
    )
    assert (Dimensions.of(wide).query_width, Dimensions.of(wide).key_width) == (96, 48)


def test_cache_bytes_count_what_is_there() -> None:
    layer = SimpleNamespace(
        keys=torch.zeros(2, 3, 5, 4), values=torch.zeros(2, 3, 5, 4, dtype=torch.bfloat16)
    )
    assert cache_bytes(SimpleNamespace(layers=[layer, layer])) == 2 * 120 * (4 + 2)
