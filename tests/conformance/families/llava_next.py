"""A tiny random LLaVA-NeXT, its processor, and prompts; OneVision shares most of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

TILE, PATCH = 24, 8
PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
SIZES = ((20, 44), (41, 35), (50, 18))
"""One row of two tiles, two by two, and a column of three."""
_SENTENCE = (
    "<pad> <s> </s> <unk> <image> <video> is there a red blue circle square what colour the how "
    "many ? yes no one two three green sign says on left right USER ASSISTANT :"
)
WORDS = _SENTENCE.split()
QUESTIONS = ("is there a red circle ?", "what colour is the square ?", "how many ?")
ANSWERS = ("yes", "blue", "two three")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
TEXT = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CASES: dict[str, tuple[tuple[str, tuple[int, ...]], ...]] = {
    "text only": ((QUESTIONS[0], ()),),
    "one image": ((QUESTIONS[0], (0,)),),
    "two images": ((QUESTIONS[1], (1, 0)),),
    "padded": ((QUESTIONS[0], (0,)), (QUESTIONS[2], (1,)), (QUESTIONS[1], (2,))),
    "mixed": ((QUESTIONS[0], (0, 1)), (QUESTIONS[2], (2,)), (QUESTIONS[1], ())),
}
"""Rows of each kind of batch: a question and its pictures."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Word by word."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", WORDS.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<video>"],
        padding_side="left",
    )


def build_processor() -> Any:
    """Word-level, for pictures of any size in tiles of 24 × 24, nine tokens each."""
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaNextProcessor(
        images,
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    )


def build_model(attention: str = "sdpa") -> Any:
    """Three CLIP layers of which the second makes the features, and five decoder layers."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=PATCH,
        projection_dim=32,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_index=WORDS.index("<image>"),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=(TILE // PATCH) ** 2,
        pad_token_id=0,
        attn_implementation=attention,
    )
    return loud(LlavaNextForConditionalGeneration(config))


def loud(model: Any, seed: int = 0) -> Any:
    """Random weights that make attention far from flat, frozen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                fan = 1 if "embed" in name and "patch" not in name else weight[0].numel()
                weight.copy_(noise * 1.5 / fan**0.5)
            elif "embedding" in name or "newline" in name:
                weight.copy_(noise)
            else:
                weight.copy_(noise * 0.1 + (0.0 if name.endswith("bias") else 1.0))
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def picture(number: int = 0) -> Image.Image:
    """A picture with coarse structure; its size depends on its number."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8))
    size = SIZES[number % len(SIZES)]
    ground = np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
    noise = rng.integers(-40, 41, ground.shape)
    return Image.fromarray(np.clip(ground + noise, 0, 255).astype(np.uint8))


def inputs(processor: Any, rows: Sequence[tuple[str, Sequence[int]]]) -> dict[str, Any]:
    """Left-padded prompts, each a question behind its pictures, as the processor makes them.

    Args:
        processor: the family's.
        rows: question and numbers of the pictures.
    """
    texts = ["<image> " * len(numbers) + question for question, numbers in rows]
    pictures = [[picture(number) for number in numbers] for _, numbers in rows if numbers]
    made = processor(images=pictures or None, text=texts, padding=True, return_tensors="pt")
    return dict(made)
