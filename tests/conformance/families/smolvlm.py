"""A tiny random SmolVLM: 2 × 2 tokens a tile, each a block of 3 × 3 patches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

from transformers import (
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from families import idefics3, tiled

CASES, inputs = tiled.CASES, tiled.inputs
WORDS, IMAGE = idefics3.WORDS, idefics3.IMAGE
TOKENS = 4


def build_model(attention: str = "sdpa") -> Any:
    """As Idefics3, with larger blocks."""
    config = SmolVLMConfig(
        vision_config=dict(tiled.VISION),
        text_config=LlamaConfig(**tiled.TEXT, vocab_size=len(WORDS)),
        image_token_id=IMAGE,
        scale_factor=3,
        attn_implementation=attention,
    )
    return tiled.loud(SmolVLMForConditionalGeneration(config))


def build_processor() -> Any:
    """Word-level; what it needs for videos is left out."""
    kind = tiled.stills_only(SmolVLMProcessor)
    with mock.patch.object(processing_smolvlm, "num2words", str):
        return kind(
            SmolVLMImageProcessorPil(**idefics3.SIZES),
            tiled.tokenizer(idefics3.SPECIAL),
            SimpleNamespace(num_frames=1, fps=1),
            image_seq_len=TOKENS,
            chat_template=tiled.template("<image>"),
        )
