"""Prompts as token ids, made once per text and remembered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from targets.errors import TargetError
from targets.families.base import Family
from targets.preprocessing import Layout

_REMEMBERED = 512
Size = tuple[int, int]
"""Height and width of a picture."""
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A batch of prompts, left-padded.

    Attributes:
        ids: ``[B, L]``, all placeholders for the image included.
        mask: ``[B, L]``, 0 for padding.
    """

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class Dialogue(Prompt):
    """Prompts with answers behind them, for teacher forcing.

    The last prompt token of all rows is in one column; answers start behind it and are padded at
    the right. The last answer token is not part of `ids`, since nothing follows from it.

    Attributes:
        targets: ``[B, A]`` answer tokens, the end token last.
        real: bool ``[B, A]``, False for padding.
    """

    targets: Tensor
    real: Tensor

    @staticmethod
    def of(prompt: Prompt, targets: Tensor, real: Tensor) -> Dialogue:
        """Prompts with tokens behind them.

        Args:
            prompt: B prompts.
            targets: ``[B, A]``, padded at the right.
            real: bool ``[B, A]``, False for padding.
        """
        mask = torch.cat([prompt.mask, real[:, 1:].long()], 1)
        return Dialogue(torch.cat([prompt.ids, targets[:, :-1]], 1), mask, targets, real)


class PromptBook:
    """Turns questions and answers into ids the way the model's own processor does.

    Args:
        processor: with tokenizer and, if it has one, a chat template.
        family: the model's adapter; it writes out what stands for a picture.

    Raises:
        TargetError: if a template does not place exactly one image, or there is no end token.
    """

    def __init__(
        self,
        processor: Any,  # noqa: ANN401 - transformers is untyped
        family: Family,
    ) -> None:
        self._processor, self._tokenizer = processor, processor.tokenizer
        self._family, self._device = family, family.device
        self._texts: OrderedDict[tuple[str, str | None, Size], tuple[list[int], list[int]]]
        self._texts = OrderedDict()
        self._batches: OrderedDict[tuple[tuple[str, ...], tuple[str, ...], Size], Dialogue]
        self._batches = OrderedDict()
        self._prompts: OrderedDict[tuple[tuple[str, ...], Size], Prompt] = OrderedDict()
        self._layouts: dict[Size, Layout] = {}
        end, pad = self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
        if end is None:
            raise TargetError("the tokenizer has no end-of-sequence token; answers could not end")
        self.end = int(end)
        self.pad = int(end if pad is None else pad)

    def text(self, question: str) -> str:
        """The prompt of a question as text, with one placeholder for the image."""
        image = self._processor.image_token
        if getattr(self._processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            text = str(
                self._processor.apply_chat_template(
                    [{"role": "user", "content": content}], add_generation_prompt=True
                )
            )
        else:
            text = f"{image} {question}"
        if text.count(image) != 1:
            raise TargetError(
                f"the prompt {text!r} holds {text.count(image)} image placeholders {image!r}; "
                "exactly one is needed (is the placeholder part of the question?)"
            )
        return text

    def prompt(self, questions: Sequence[str], layout: Layout, size: Size) -> Prompt:
        """Prompts of a batch of questions, left-padded.

        Args:
            questions: B texts.
            layout: of the pictures.
            size: height and width of the pictures; those of one size have one layout.
        """
        key = tuple(questions), size
        self._layouts[size] = layout
        found = self._prompts.get(key)
        if found is None:
            found = self._pad([self._encode(question, None, size)[0] for question in key[0]])
            _remember(self._prompts, key, found)
        return found

    def dialogue(
        self, questions: Sequence[str], answers: Sequence[str], layout: Layout, size: Size
    ) -> Dialogue:
        """Prompts of a batch with their answers, end tokens included.

        Raises:
            TargetError: if there is not one answer a question.
        """
        key = tuple(questions), tuple(answers), size
        found = self._batches.get(key)
        if found is None:
            if len(questions) != len(answers):
                raise TargetError(f"{len(questions)} questions with {len(answers)} answers")
            found = self._join(key[0], key[1], layout, size)
            _remember(self._batches, key, found)
        return found

    def _join(
        self, questions: tuple[str, ...], answers: tuple[str, ...], layout: Layout, size: Size
    ) -> Dialogue:
        prompt = self.prompt(questions, layout, size)
        pairs = zip(questions, answers, strict=True)
        rows = [self._encode(question, answer, size)[1] for question, answer in pairs]
        width = max(map(len, rows))
        filled = [row + [self.pad] * (width - len(row)) for row in rows]
        targets = torch.tensor(filled, device=self._device)
        lengths = torch.tensor([len(row) for row in rows], device=self._device)
        real = torch.arange(width, device=self._device) < lengths[:, None]
        return Dialogue.of(prompt, targets, real)

    def words(self, text: str) -> list[int]:
        """Ids of a text as it stands behind another word.

        Raises:
            TargetError: if it has none.
        """
        before = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self._tokenizer(f"a {text}", add_special_tokens=False)["input_ids"]
        alone = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        ids: list[int] = whole[len(before) :] if whole[: len(before)] == before else alone
        if not ids:
            raise TargetError(f"the text {text!r} has no token; give a word")
        return ids

    def alone(self, text: str) -> Prompt:
        """A text by itself as a prompt of one row: no template and no picture.

        Raises:
            TargetError: if it has no token.
        """
        ids = self._ids(text)
        if not text.strip() or not ids:
            raise TargetError(f"the text {text!r} has no token; give a word")
        return self._pad([ids])

    def _pad(self, rows: list[list[int]]) -> Prompt:
        width = max(map(len, rows))
        ids = torch.tensor(
            [[self.pad] * (width - len(row)) + row for row in rows], device=self._device
        )
        lengths = torch.tensor([len(row) for row in rows], device=self._device)
        real = torch.arange(width, device=self._device) >= width - lengths[:, None]
        return Prompt(ids, real.long())

    def _encode(self, question: str, answer: str | None, size: Size) -> tuple[list[int], list[int]]:
        """Ids of a prompt, and of its answer with the end token."""
        found = self._texts.get((question, answer, size))
        if found is None:
            text = self.text(question)
            text = self._family.expand(text, self._processor.image_token, self._layouts[size])
            prompt = self._ids(text)
            reply: list[int] = []
            if answer is not None:
                # A tokenizer may join across the border, so the answer is read off the whole.
                space = "" if text[-1:].isspace() else " "
                whole = self._ids(f"{text}{space}{answer}")
                fits = whole[: len(prompt)] == prompt
                alone = self._tokenizer(answer, add_special_tokens=False)["input_ids"]
                reply = [*(whole[len(prompt) :] if fits else alone), self.end]
            found = prompt, reply
            _remember(self._texts, (question, answer, size), found)
        return found

    def _ids(self, text: str) -> list[int]:
        begin = self._tokenizer.bos_token
        special = not (begin is not None and text.startswith(begin))
        ids: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        # Tokenizers that append an end token would end the prompt before the answer.
        return ids[:-1] if ids and ids[-1] == self.end else ids


def _remember(shelf: OrderedDict[_Key, _Value], key: _Key, value: _Value) -> None:
    shelf[key] = value
    if len(shelf) > _REMEMBERED:
        shelf.popitem(last=False)
