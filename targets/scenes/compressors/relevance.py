"""How much each visual token contributed to an answer: the labels of compression by explainability.

The rule is the one of the paper (arXiv 2506.01097, after Chefer et al., arXiv 2103.15679): the
relevance R starts as the identity and each layer adds ``E_h[(A * dA)^+] R``, with A its attention
and dA the gradient of the generated token's logit; the row of the position that generates the token
says what mattered to it. It needs whole attention matrices and their gradients, so it is a tool to
make labels with a small model offline, and no part of any compressor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from targets.scenes import passes
from targets.scenes.compressors.questions import Questions, Reading, correct, read
from targets.scenes.packing import IGNORE

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

_SCENES = 8
"""Scenes labelled at a time; bounds the memory of the attention matrices."""


def relevance(attentions: Sequence[Tensor], logits: Tensor, rows: Tensor) -> Tensor:
    """One row of R after the last layer.

    Args:
        attentions: ``[B, N, L, L]`` of each layer, first layer first, in the graph of `logits`.
        logits: ``[B]``, of the token whose relevance is wanted.
        rows: ``[B]``, the position that generates it.

    Returns:
        ``[B, L]``, not negative, without gradient.
    """
    slopes = torch.autograd.grad(logits.sum(), list(attentions), retain_graph=True)
    # R = (I + E_n) … (I + E_1), so a row of it is made from the left, without any L × L product.
    row = torch.nn.functional.one_hot(rows, attentions[0].shape[-1]).to(logits.dtype)
    with torch.no_grad():
        for attention, slope in zip(reversed(attentions), reversed(slopes), strict=True):
            mean = (attention * slope).clamp_min(0).mean(1)
            row = row + (row[:, None] @ mean)[:, 0]
    return row


@dataclass(frozen=True, slots=True)
class Labelled:
    """Training pairs of the small network.

    Attributes:
        attention: ``[M, V]`` layer-0 attention to the visual tokens, mean over heads and question.
        relevance: ``[M, V]`` R of the visual tokens, mean over the answer's tokens.
        question: ``[M]`` which question of the batch it was.
    """

    attention: Tensor
    relevance: Tensor
    question: Tensor

    @staticmethod
    def join(parts: Sequence[Labelled]) -> Labelled:
        """Several as one; `question` counts on."""
        fields = ("attention", "relevance", "question")
        return Labelled(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))

    def save(self, path: Path) -> None:
        """Write a safetensors file: making labels takes longer than learning them."""
        from safetensors.torch import save_file

        fields = ("attention", "relevance", "question")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: getattr(self, name).contiguous() for name in fields}, path)

    @staticmethod
    def load(path: Path) -> Labelled:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        return Labelled(**load_file(path))


def label(model: LlavaForConditionalGeneration, batch: Questions) -> Labelled:
    """Labels of the questions that the model answers rightly at full tokens.

    Args:
        model: loaded with eager attention, its weights frozen.
        batch: questions about a few scenes.
    """
    with torch.no_grad():
        features = passes.see(model, batch.images).hidden[:, 1:]
        tokens = model.model.multi_modal_projector(features)[batch.scene]
    reading = read(model, tokens.requires_grad_(True), batch, attentions=True)
    right = correct(reading.logits, batch.targets)
    total = torch.zeros(tokens.shape[:2])
    # The end mark is left out: it is generated, but says nothing about the picture.
    length = (batch.targets != IGNORE).sum(1) - 1
    first = reading.question.stop - 1
    for step in range(int(length.amax())):
        wanted = batch.targets[:, step].clamp_min(0)
        logits = reading.logits[:, step].gather(1, wanted[:, None])[:, 0]
        rows = torch.full_like(wanted, first + step)
        found = relevance(reading.attentions, logits, rows)[:, reading.visual]
        total = total + found * (step < length)[:, None]
    paid = question_attention(reading.attentions[0].detach(), batch, reading)
    mean = total / length[:, None]
    return Labelled(paid[right], mean[right], right.nonzero()[:, 0])


def question_attention(attention: Tensor, batch: Questions, reading: Reading) -> Tensor:
    """Mean over heads and the question's words of ``[Q, N, L, L]`` at the visual tokens."""
    rows = attention.mean(1)[:, reading.question, reading.visual]
    words = (batch.words > 0)[..., None]
    return (rows * words).sum(1) / words.sum(1)


def label_scenes(model: LlavaForConditionalGeneration, drawn: Questions) -> Labelled:
    """Labels of all questions about many scenes; `Labelled.question` counts over all of them."""
    parts = []
    for start in range(0, len(drawn.images), _SCENES):
        scenes = torch.arange(start, min(start + _SCENES, len(drawn.images)))
        part = label(model, drawn.of_scenes(scenes))
        before = int((drawn.scene < start).sum())
        parts.append(Labelled(part.attention, part.relevance, part.question + before))
    return Labelled.join(parts)
