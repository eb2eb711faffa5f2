"""The tiny LLaVA of `tiny`, in the form all families have here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tiny
from torch import Tensor

CASES: dict[str, tuple[tuple[str, tuple[int, ...]], ...]] = {
    "text only": ((tiny.QUESTIONS[0], ()),),
    "one image": ((tiny.QUESTIONS[0], (0,)),),
    "two images": ((tiny.QUESTIONS[1], (1, 0)),),
    "padded": tuple((question, (n,)) for n, question in enumerate(tiny.QUESTIONS)),
    "mixed": ((tiny.QUESTIONS[0], (0, 1)), (tiny.QUESTIONS[2], (2,)), (tiny.QUESTIONS[1], ())),
}


def build_model(attention: str = "sdpa") -> Any:
    """`tiny.build_model`."""
    return tiny.build_model(attention)


def build_processor() -> Any:
    """`tiny.build_processor`."""
    return tiny.build_processor()


def inputs(processor: Any, rows: Sequence[tuple[str, Sequence[int]]]) -> dict[str, Tensor]:
    """Left-padded prompts, each a question behind its pictures."""
    del processor
    import torch

    made = [tiny.rendered(question, len(numbers)) for question, numbers in rows]
    width = max(map(len, made))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in made])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in made])
    found = {"input_ids": ids, "attention_mask": mask}
    numbers = [number for _, pictures in rows for number in pictures]
    if numbers:
        found["pixel_values"] = tiny.normalised(tiny.pictures(3)[numbers])
    return found
