"""How much memory an answer or a gradient of one picture needs: estimates, from the model alone.

They decide with how large a batch somebody begins, so they need not be exact. On tiny models of
every family the estimate for gradients is 0.9 to 4 times what autograd saves; on the embedded model
it is 1.9 times that, and what an H100 held at the peak of an attack was 2.0 times. [inferred]
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch
from torch import Tensor, nn

from targets.families.base import Family

SAVED: Final = 2
"""Elements saved for the backward pass for each element that a linear layer puts out: inputs of
norms and activations, both factors of gates, queries, keys and values. [inferred]"""
HELD: Final = 4
"""Elements that a forward pass without gradients holds at once, in widths of its widest layer."""
TEXT: Final = 64
"""Columns allowed for the question and the answer."""
_EAGER: Final = 3
"""Copies of an attention matrix where the implementation makes one."""
_LOGITS: Final = 3
"""Copies of the logits of an answer, in float32."""
_ANSWER: Final = 8
"""Tokens of an answer whose logits are held at once."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes for one picture.

    Attributes:
        answer: a forward pass without gradients, with its cache.
        gradient: a forward pass whose activations are kept, through tower and language model.
    """

    answer: int
    gradient: int


def footprint(family: Family, inputs: dict[str, Tensor], tokens: int) -> Footprint:
    """Estimate for a picture.

    Args:
        family: the model.
        inputs: what `Preprocessing.inputs` makes of one picture.
        tokens: visual tokens of it.
    """
    item = family.dtype.itemsize
    columns, patches = tokens + TEXT, _patches(family, inputs, tokens)
    text, vision = _Stack.of(family.text), _Stack.of(family.tower)
    logits = family.model.get_output_embeddings().weight.shape[0] * 4 * _LOGITS
    cache = columns * item * sum(_keys(layer) for layer in family.layers)
    held = HELD * item * max(columns * text.widest, patches * vision.widest)
    squares = text.square(columns), vision.square(patches)
    saved = SAVED * item * (columns * text.total + patches * vision.total)
    return Footprint(
        answer=cache + held + logits + max(squares),
        gradient=saved
        + logits * _ANSWER
        + squares[0] * len(family.layers)
        + squares[1] * family.tower_depth,
    )


@dataclass(frozen=True, slots=True)
class _Stack:
    """The linear layers of a tower or a language model, for one position.

    Attributes:
        total: elements that all of them put out.
        widest: elements that the widest puts out.
        heads: of an attention matrix that is really made; 0 where none is.
    """

    total: int
    widest: int
    heads: int

    @classmethod
    def of(cls, module: Any) -> _Stack:  # noqa: ANN401 - transformers is untyped
        widths = [one.out_features for one in module.modules() if isinstance(one, nn.Linear)]
        config = module.config
        eager = getattr(config, "_attn_implementation", None) == "eager"
        heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None)
        return cls(sum(widths), max(widths, default=0), int(heads or 1) if eager else 0)

    def square(self, positions: int) -> int:
        """Bytes of one layer's attention matrices, in float32."""
        return self.heads * positions * positions * 4 * _EAGER


def _keys(layer: Any) -> int:  # noqa: ANN401 - transformers is untyped
    """Elements of keys and values of one column in one layer's cache."""
    attention = layer.self_attn
    names = ("k_proj", "v_proj")
    found = [getattr(attention, name).out_features for name in names if hasattr(attention, name)]
    return sum(found)


def _patches(family: Family, inputs: dict[str, Tensor], tokens: int) -> int:
    """Patches that the tower runs on, by what its first layer takes of each."""
    for one in family.tower.modules():
        if isinstance(one, nn.Conv2d | nn.Conv3d):
            each = one.in_channels * prod(one.kernel_size)
            pixels = sum(
                value.numel()
                for name, value in inputs.items()
                if name.startswith("pixel_values") and torch.is_floating_point(value)
            )
            return max(tokens, -(-pixels // each))
    return tokens
