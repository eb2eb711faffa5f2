"""A tiny random Gemma 3 with two types of layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from families import gemma

CASES = gemma.CASES
POOL = 2
TOKENS = (gemma.SIDE * 2 // POOL) ** 2
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}user \n "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<open>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} \n {% endfor %}"
    "{% if add_generation_prompt %}model \n {% endif %}"
)


def build_model(attention: str = "sdpa", window: int = 256) -> Any:
    """12 × 12 patches pooled two by two, six layers of which every third attends fully."""
    text = Gemma3TextConfig(
        **{**gemma.TEXT, "num_hidden_layers": 6},
        sliding_window=window,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=4,
        attn_logit_softcapping=0.1,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
        },
    )
    vision = gemma.tower()
    vision.patch_size = gemma.PATCH // POOL
    config = Gemma3Config(
        vision_config=vision,
        text_config=text,
        mm_tokens_per_image=TOKENS,
        boi_token_index=gemma.OPEN,
        eoi_token_index=gemma.CLOSE,
        image_token_index=gemma.IMAGE,
        attn_implementation=attention,
        tie_word_embeddings=False,
    )
    return gemma.loud(Gemma3ForConditionalGeneration(config))


def build_processor(**scan: Any) -> Any:
    """Gemma 3's own, with pan and scan as asked."""
    images = Gemma3ImageProcessorPil(size={"height": gemma.SIZE, "width": gemma.SIZE})
    tokenizer = gemma.tokenizer(
        extra_special_tokens={
            "boi_token": "<open>",
            "eoi_token": "<close>",
            "image_token": "<image>",
        }
    )
    made = Gemma3Processor(images, tokenizer, chat_template=TEMPLATE, image_seq_length=TOKENS)
    made.images_kwargs = {**made.images_kwargs, **scan}
    return made


def inputs(processor: Any, rows: Sequence[tuple[str, Sequence[int]]]) -> dict[str, Tensor]:
    """Left-padded prompts as the processor makes them."""
    made = []
    for question, numbers in rows:
        content = [{"type": "image"} for _ in numbers] + [{"type": "text", "text": question}]
        talk = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(talk, add_generation_prompt=True)
        pictures = [[gemma.picture(number) for number in numbers]] if numbers else None
        made.append(processor(images=pictures, text=[text], return_tensors="pt"))
    return gemma.joined(made)
