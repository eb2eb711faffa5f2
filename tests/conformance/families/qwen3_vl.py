"""A tiny random Qwen3-VL."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from families import qwen, qwen2_vl


def build_model(attention: str = "sdpa") -> Any:
    """DeepStack into the first three of five decoder layers; heads wider than width ÷ heads."""
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 40,
        "out_hidden_size": 48,
        "num_heads": 4,
        "patch_size": qwen.PATCH,
        "spatial_merge_size": qwen.MERGE,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    text = {
        **qwen2_vl.TEXT,
        "hidden_size": 48,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        attn_implementation=attention,
        **qwen.TOKEN_IDS,
    )
    return qwen.loud(Qwen3VLForConditionalGeneration(config))


def build_processor() -> Any:
    """Word-level, for pictures of any size."""
    return qwen.build_processor(Qwen3VLProcessor)
