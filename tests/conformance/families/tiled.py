"""What tiny models whose pictures are cut into tiles share: words, pictures, prompts, weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TILE, PATCH = 24, 4
"""Pixels along a tile and along a patch: 6 × 6 patches."""
_SENTENCE = (
    "user assistant is there a red blue circle square what colour the how many ? yes no one two "
    "three green sign says on left right"
)
QUESTIONS = ("is there a red circle ?", "what colour is the square ?", "how many ?")
SIZES = ((24, 24), (30, 60), (70, 40), (20, 29))
"""Heights and widths of the pictures, by number; none but the first has a tile's size."""
CASES: dict[str, tuple[tuple[str, tuple[int, ...]], ...]] = {
    "text only": ((QUESTIONS[0], ()),),
    "one image": ((QUESTIONS[0], (1,)),),
    "two images": ((QUESTIONS[1], (1, 0)),),
    "padded": ((QUESTIONS[0], (1,)), (QUESTIONS[2], (5,)), (QUESTIONS[1], (9,))),
    "mixed": ((QUESTIONS[0], (0, 1)), (QUESTIONS[2], (2,)), (QUESTIONS[1], ())),
}
"""Rows of each kind of batch: a question and its pictures. Pictures 4 apart have the same size."""
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": TILE,
    "patch_size": PATCH,
}


def words(special: Sequence[str]) -> list[str]:
    """The vocabulary: four usual tokens, special ones, words."""
    return ["<pad>", "<s>", "</s>", "<unk>", *special, *_SENTENCE.split()]


def tokenizer(special: Sequence[str], **options: Any) -> PreTrainedTokenizerFast:
    """Word by word; `special` are tokens of their own wherever they stand."""
    table = {word: number for number, word in enumerate(words(special))}
    core = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        **options,
    )
    made.add_tokens([AddedToken(one, special=True, normalized=False) for one in special])
    return made


def template(image: str) -> str:
    """A chat template that writes pictures and text in their order."""
    return (
        "<s> {% for message in messages %}{{ message['role'] }} {% for part in message['content'] "
        "%}{% if part['type'] == 'image' %}" + image + "{% else %} {{ part['text'] }} {% endif %}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )


def stills_only(kind: type[Any]) -> type[Any]:
    """A processor class without a check that needs a video processor, hence torchvision."""

    class StillsOnly(kind):  # type: ignore[misc]
        """Pictures only."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    return StillsOnly


def loud(model: Any, seed: int = 0) -> Any:
    """Random weights that make attention far from flat, frozen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            compares = "vision" in name and any(
                part in name for part in ("q_proj", "k_proj", "q_norm", "k_norm")
            )
            if "embed" in name and "patch" not in name:
                weight.copy_(noise)
            elif weight.dim() > 1:
                weight.copy_(noise * (2.5 if compares else 1.5) / weight[0].numel() ** 0.5)
            elif compares:
                weight.copy_(noise * 0.3 + 1.6)
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
    texts = []
    for question, numbers in rows:
        content = [{"type": "image"} for _ in numbers] + [{"type": "text", "text": question}]
        talk = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(talk, add_generation_prompt=True))
    pictures = [[picture(number) for number in numbers] for _, numbers in rows]
    made = processor(
        images=pictures if any(pictures) else None,
        text=texts,
        padding=True,
        return_tensors="pt",
        add_special_tokens=False,
    )
    return {name: value for name, value in made.items() if name != "token_type_ids"}
