"""A tiny random Qwen2-VL."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from families import qwen

TEXT = {
    "vocab_size": len(qwen.WORDS),
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 3, 3],
    },
    "bos_token_id": None,
    "eos_token_id": qwen.ids("<|im_end|>")[0],
    "pad_token_id": 0,
}


def build_model(attention: str = "sdpa") -> Any:
    """Three full-attention blocks, a 2 × 2 merger and five decoder layers."""
    vision = {
        "depth": 3,
        "embed_dim": 32,
        "hidden_size": 64,
        "mlp_ratio": 2,
        "num_heads": 4,
        "patch_size": qwen.PATCH,
        "spatial_merge_size": qwen.MERGE,
    }
    config = Qwen2VLConfig(
        text_config=dict(TEXT),
        vision_config=vision,
        attn_implementation=attention,
        **qwen.TOKEN_IDS,
    )
    return qwen.loud(Qwen2VLForConditionalGeneration(config))


def build_processor() -> Any:
    """Word-level, for pictures of any size."""
    return qwen.build_processor(Qwen2VLProcessor)
