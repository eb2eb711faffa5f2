"""A tiny random Qwen2.5-VL."""

from __future__ import annotations

from typing import Any

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

from families import qwen, qwen2_vl


def build_model(attention: str = "sdpa") -> Any:
    """Windows of 2 × 2 tokens in blocks 0 and 2, full attention in 1 and 3."""
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 40,
        "out_hidden_size": 64,
        "num_heads": 4,
        "patch_size": qwen.PATCH,
        "spatial_merge_size": qwen.MERGE,
        "window_size": 2 * qwen.PATCH * qwen.MERGE,
        "fullatt_block_indexes": [1, 3],
    }
    config = Qwen2_5_VLConfig(
        text_config=dict(qwen2_vl.TEXT),
        vision_config=vision,
        attn_implementation=attention,
        **qwen.TOKEN_IDS,
    )
    return qwen.loud(Qwen2_5_VLForConditionalGeneration(config))


def build_processor() -> Any:
    """Word-level, for pictures of any size."""
    return qwen.build_processor(Qwen2_5_VLProcessor)
