"""A tiny random Idefics3: 3 × 3 tokens a tile, at most four tiles and one of the whole."""

from __future__ import annotations

from typing import Any

from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from families import tiled

CASES, inputs = tiled.CASES, tiled.inputs
TAGS = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
SPECIAL = (
    "<image>",
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
    *TAGS,
    "\n\n",
    "\n",
)
WORDS = tiled.words(SPECIAL)
IMAGE = WORDS.index("<image>")
TOKENS = 9
SIZES = {
    "size": {"longest_edge": 2 * tiled.TILE},
    "max_image_size": {"longest_edge": tiled.TILE},
}


def build_model(attention: str = "sdpa") -> Any:
    """Three layers of a tower without CLS, blocks of 2 × 2 patches, four Llama layers."""
    config = Idefics3Config(
        vision_config=dict(tiled.VISION),
        text_config=LlamaConfig(**tiled.TEXT, vocab_size=len(WORDS)),
        image_token_id=IMAGE,
        scale_factor=2,
        attn_implementation=attention,
    )
    return tiled.loud(Idefics3ForConditionalGeneration(config))


def build_processor() -> Any:
    """Word-level, for pictures of any size."""
    return Idefics3Processor(
        Idefics3ImageProcessorPil(**SIZES),
        tiled.tokenizer(SPECIAL),
        image_seq_len=TOKENS,
        chat_template=tiled.template("<image>"),
    )
