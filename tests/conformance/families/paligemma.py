"""A tiny random PaliGemma, and a PaliGemma 2 with sliding windows and capped logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from families import gemma

CASES = gemma.CASES
TOKENS = gemma.SIDE**2


def build_model(attention: str = "sdpa") -> Any:
    """Over Gemma."""
    return _model(GemmaConfig(**gemma.TEXT), attention)


def build_second(window: int = 256) -> Any:
    """Over Gemma 2, which takes eager attention only."""
    text = Gemma2Config(
        **gemma.TEXT,
        sliding_window=window,
        query_pre_attn_scalar=6,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    )
    return _model(text, "eager")


def _model(text: Any, attention: str) -> Any:
    config = PaliGemmaConfig(
        vision_config=gemma.tower(),
        text_config=text,
        image_token_index=gemma.IMAGE,
        projection_dim=32,
        hidden_size=32,
        vocab_size=gemma.VOCABULARY,
        attn_implementation=attention,
        tie_word_embeddings=False,
    )
    return gemma.loud(PaliGemmaForConditionalGeneration(config))


def build_processor() -> Any:
    """SigLIP's image processor and PaliGemma's prompts."""
    images = SiglipImageProcessorPil(
        size={"height": gemma.SIZE, "width": gemma.SIZE}, image_seq_length=TOKENS
    )
    tokenizer = gemma.tokenizer(additional_special_tokens=["<image>"])
    return PaliGemmaProcessor(images, tokenizer)


def inputs(processor: Any, rows: Sequence[tuple[str, Sequence[int]]]) -> dict[str, Tensor]:
    """Left-padded prompts as the processor makes them; it cannot write one without a picture."""
    made = []
    for question, numbers in rows:
        if numbers:
            pictures = [[gemma.picture(number) for number in numbers]]
            text = "<image>" * len(numbers) + question
            row = processor(images=pictures, text=[text], return_tensors="pt")
        else:
            ids = torch.tensor([processor.tokenizer(f"<bos>{question}\n")["input_ids"]])
            row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            row["token_type_ids"] = torch.zeros_like(ids)
        made.append(row)
    return gemma.joined(made)
