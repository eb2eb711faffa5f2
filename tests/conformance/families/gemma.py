"""What the tiny Gemma models share: a tokenizer, pictures, loud weights and batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, SiglipVisionConfig

SIZE, PATCH = 48, 8
SIDE = SIZE // PATCH
PAD, END, BEGIN, UNKNOWN, IMAGE, NEWLINE, OPEN, CLOSE = range(8)
_SENTENCE = (
    "is there a red blue circle square what colour the how many ? yes no one two three user model "
    "Here original image and here are some crops to help you see better"
)
WORDS = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "<image>", "\n", "<open>", "<close>"),
    *dict.fromkeys(_SENTENCE.split()),
]
QUESTIONS = ("is there a red circle ?", "what colour is the square ?", "how many ?")
VOCABULARY = 1200
"""Room for the 1152 tokens PaliGemma's processor adds."""
CASES: dict[str, tuple[tuple[str, tuple[int, ...]], ...]] = {
    "text only": ((QUESTIONS[0], ()),),
    "one image": ((QUESTIONS[0], (0,)),),
    "two images": ((QUESTIONS[1], (1, 0)),),
    "padded": ((QUESTIONS[0], (0,)), (QUESTIONS[2], (1,)), (QUESTIONS[1], (2,))),
    "mixed": ((QUESTIONS[0], (0, 1)), (QUESTIONS[2], (2,)), (QUESTIONS[1], ())),
}
"""Rows of each kind of batch: a question and its pictures."""


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """Word by word; a newline is a word."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        **options,
    )


def tower() -> SiglipVisionConfig:
    """Three layers over 6 × 6 patches."""
    return SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=32,
        vision_use_head=False,
    )


TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
}


def loud(model: Any, seed: int = 0) -> Any:
    """Random weights that make attention far from flat, Gemma 3's projector included; frozen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                fan = weight[0].numel() if "mm_input" not in name else weight.shape[0]
                weight.copy_(noise * 1.5 / fan**0.5)
            else:  # Gemma's normalisations multiply by 1 + weight
                siglip = "vision_tower" in name and "norm" in name and name.endswith("weight")
                weight.copy_(noise * 0.1 + (1.0 if siglip else 0.0))
    model.generation_config.eos_token_id = END
    model.generation_config.pad_token_id = PAD
    return model.eval().requires_grad_(False)


def picture(number: int = 0, size: tuple[int, int] = (40, 61)) -> Image.Image:
    """A picture with coarse structure."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    ground = np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
    noise = rng.integers(-40, 41, ground.shape)
    return Image.fromarray(np.clip(ground + noise, 0, 255).astype(np.uint8))


def joined(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Left-padded batch of the processor's outputs for single rows."""
    width = max(row["input_ids"].shape[1] for row in rows)
    batch = {}
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        parts = [row[name] for row in rows]
        batch[name] = torch.cat(
            [torch.nn.functional.pad(part, (width - part.shape[1], 0)) for part in parts]
        )
    pixels = [row["pixel_values"] for row in rows if "pixel_values" in row]
    if pixels:
        batch["pixel_values"] = torch.cat(pixels)
    return batch
