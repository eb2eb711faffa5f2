"""A tiny random LLaVA-OneVision; a picture of four tiles is over its limit of tokens."""

from __future__ import annotations

from typing import Any

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from families import tiled
from families.llava_next import (
    ANSWERS,
    CASES,
    QUESTIONS,
    SIZES,
    TEMPLATE,
    TEXT,
    WORDS,
    inputs,
    loud,
    picture,
    tokenizer,
)

__all__ = [
    "ANSWERS",
    "CASES",
    "QUESTIONS",
    "SIZES",
    "build_model",
    "build_processor",
    "inputs",
    "picture",
]

TILE, PATCH = 24, 7
"""Three patches and a strip of 3 pixels that nobody sees, as with SigLIP's 384 and 14."""
PINPOINTS = [[TILE * rows, TILE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
ASPECT = "anyres_max_3"


def build_processor() -> Any:
    """Word-level, for pictures of any size in tiles of 24 × 24, nine tokens each."""
    images = LlavaOnevisionImageProcessorPil(
        size={"height": TILE, "width": TILE}, image_grid_pinpoints=PINPOINTS
    )
    return tiled.stills_only(LlavaOnevisionProcessor)(
        images,
        tokenizer(),
        None,
        num_image_tokens=(TILE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        image_token="<image>",
        video_token="<video>",
        vision_aspect_ratio=ASPECT,
        chat_template=TEMPLATE,
    )


def build_model(attention: str = "sdpa") -> Any:
    """Three SigLIP layers, of which the last makes the features, and five decoder layers."""
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(**TEXT),
        image_token_index=WORDS.index("<image>"),
        video_token_index=WORDS.index("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio=ASPECT,
        pad_token_id=0,
        attn_implementation=attention,
    )
    return loud(LlavaOnevisionForConditionalGeneration(config))
