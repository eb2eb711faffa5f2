"""What the tiny Qwen-VL models share: a processor, pictures of several sizes, and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from families import tiled

PATCH, MERGE = 4, 2
_WORDS = (
    "<pad> <|endoftext|> <|im_start|> <|im_end|> <unk> <|vision_start|> <|vision_end|> "
    "<|image_pad|> <|video_pad|> user assistant is there a red blue circle square what colour the "
    "how many ? yes no one two three green sign says on left right"
)
WORDS = _WORDS.split()
QUESTIONS = ("is there a red circle ?", "what colour is the square ?", "how many ?")
SIZES = ((24, 40), (37, 29), (48, 16))
"""Pictures of 3 × 5, 5 × 4 and 6 × 2 tokens; the second is resampled."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %} {{ part['text'] }} {% endif %}"
    "{% endfor %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def ids(*words: str) -> list[int]:
    """Their numbers."""
    return [WORDS.index(word) for word in words]


IMAGE, VIDEO = ids("<|image_pad|>", "<|video_pad|>")
TOKEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": ids("<|vision_start|>")[0],
    "vision_end_token_id": ids("<|vision_end|>")[0],
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Word by word, with Qwen's special tokens."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=[word for word in WORDS if word.startswith("<|")],
        padding_side="left",
    )


def build_processor(kind: type[Any]) -> Any:
    """A processor of the class `kind` for pictures of any size, one token for 8 × 8 pixels."""
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, size={"shortest_edge": 256, "longest_edge": 4096}
    )

    return tiled.stills_only(kind)(images, tokenizer(), None, chat_template=TEMPLATE)


def loud(model: Any, seed: int = 0) -> Any:
    """Random weights that make attention far from flat, frozen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                fan = 1 if "embed" in name and "proj" not in name else weight[0].numel()
                weight.copy_(noise * 1.5 / fan**0.5)
            else:
                # Queries and keys of normalised length are compared more sharply if it is longer.
                middle = 1.6 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0
                weight.copy_(noise * 0.1 + (0.0 if name.endswith("bias") else middle))
    model.generation_config.eos_token_id = ids("<|im_end|>")[0]
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
    texts = []
    for question, numbers in rows:
        content = [{"type": "image"} for _ in numbers] + [{"type": "text", "text": question}]
        talk = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(talk, add_generation_prompt=True))
    pictures = [picture(number) for _, numbers in rows for number in numbers]
    made = processor(images=pictures or None, text=texts, padding=True, return_tensors="pt")
    return dict(made)


CASES: dict[str, tuple[tuple[str, tuple[int, ...]], ...]] = {
    "text only": ((QUESTIONS[0], ()),),
    "one image": ((QUESTIONS[0], (0,)),),
    "two images": ((QUESTIONS[1], (1, 0)),),
    "padded": ((QUESTIONS[0], (0,)), (QUESTIONS[2], (1,)), (QUESTIONS[1], (2,))),
    "mixed": ((QUESTIONS[0], (0, 1)), (QUESTIONS[2], (2,)), (QUESTIONS[1], ())),
}
"""Rows of each kind of batch: a question and its pictures."""
