"""Run a part of the model beside the forward that a session is in, without anyone's hooks."""

from __future__ import annotations

import contextlib
import contextvars
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from targets.compression.sight import TextSight

_HOOKS: Final = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


_ASIDE: Final = contextvars.ContextVar("aside", default=False)


def is_aside() -> bool:
    """Whether the model runs beside the forward of a session, for a compressor's own use."""
    return _ASIDE.get()


@contextlib.contextmanager
def unhooked(module: nn.Module) -> Iterator[None]:
    """Calls of a module and all its parts run no forward hooks; they are back afterwards.

    The session's own hooks would take such a call for the prefill it is waiting for, and a tap
    would keep the wrong values. Gradient checkpointing is off as well: a replay would come when the
    hooks are back.
    """
    saved: list[tuple[nn.Module, str, Any]] = []
    token = _ASIDE.set(True)
    try:
        for part in module.modules():
            for name in _HOOKS:
                saved.append((part, name, part.__dict__[name]))
                part.__dict__[name] = OrderedDict()
            if part.__dict__.get("gradient_checkpointing"):
                saved.append((part, "gradient_checkpointing", True))
                part.__dict__["gradient_checkpointing"] = False
        yield
    finally:
        _ASIDE.reset(token)
        for part, name, value in saved:
            part.__dict__[name] = value


def question_state(text: TextSight) -> Tensor:
    """Last hidden state of the language model for each row's question alone; live.

    The question is the text behind the last image of its row, the end of a chat template included;
    in rows without any it is all of their text. It is run by itself, from position 0.

    Args:
        text: the prompt, at the input of the language model.

    Returns:
        ``[B, D]`` state of the last word; zero for rows without a word.
    """
    words = text.words_after()
    words = torch.where(words.any(1, keepdim=True), words, text.words)
    family, lengths = text.family, words.sum(1)
    found = text.embeds.new_zeros(len(words), text.embeds.shape[2])
    for length in sorted(set(lengths.tolist()) - {0}):
        # Rows of one length at a time: some models read padded text in another way than whole text.
        rows = (lengths == length).nonzero()[:, 0]
        embeds = text.embeds[rows][words[rows]].reshape(len(rows), length, -1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        with unhooked(family.text):
            output = family.text(
                inputs_embeds=embeds,
                attention_mask=mask,
                use_cache=False,
                **family.positions(mask),
            )
        found = found.index_put((rows,), output.last_hidden_state[:, -1].to(found.dtype))
    return found
