"""A tiny random InternVL: 3 × 3 tokens a tile, at most four tiles and a thumbnail."""

from __future__ import annotations

from typing import Any

from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from families import tiled

CASES, inputs = tiled.CASES, tiled.inputs
SPECIAL = ("<IMG_CONTEXT>", "<img>", "</img>", "<video>")
WORDS = tiled.words(SPECIAL)
IMAGE = WORDS.index("<IMG_CONTEXT>")
TOKENS = 9


def build_model(
    attention: str = "sdpa", *, mean_pooling: bool = True, feature_layer: int = -1, text: str = ""
) -> Any:
    """InternViT with normalised queries and keys; the text model is Qwen2, or Qwen3 if asked."""
    vision = InternVLVisionConfig(
        **tiled.VISION, use_qk_norm=True, norm_type="rms_norm", use_mean_pooling=mean_pooling
    )
    options = {**tiled.TEXT, "vocab_size": len(WORDS)}
    config = InternVLConfig(
        vision_config=vision,
        text_config=Qwen3Config(**options, head_dim=12)
        if text == "qwen3"
        else Qwen2Config(**options),
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
        vision_feature_layer=feature_layer,
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    return tiled.loud(InternVLForConditionalGeneration(config))


def build_processor() -> Any:
    """Word-level, for pictures of any size."""
    names = ("context_image_token", "start_image_token", "end_image_token", "video_token")
    tokenizer = tiled.tokenizer(
        SPECIAL, extra_special_tokens=dict(zip(names, SPECIAL, strict=True))
    )
    images = GotOcr2ImageProcessorPil(
        size={"height": tiled.TILE, "width": tiled.TILE}, max_patches=4
    )
    kind = tiled.stills_only(InternVLProcessor)
    template = tiled.template(SPECIAL[0])
    return kind(images, tokenizer, None, image_seq_length=TOKENS, chat_template=template)
