"""What a compressor may see of the prompt around the images, at the input of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from targets.compression.layout import ImageSlots

if TYPE_CHECKING:
    from targets.families.base import Family


@dataclass(frozen=True, slots=True)
class TextSight:
    """The sequence at the input of a language-model layer; tensors are live.

    Attributes:
        family: the model's adapter.
        layer: whose input this is; 0 before the model.
        hidden: ``[B, n, D]``, that input.
        embeds: ``[B, n, D]``, what the same columns were at the input of the language model.
        rope: cosine and sine ``[B, n, R]`` as the layer gets them; None at Stage.INPUT.
        live: bool ``[B, n]``, columns that may be attended to.
        words: bool ``[B, n]``, prompt columns that are text (no image, padding or answer).
        slots: where the images are.
        last: column of the last prompt token, in all rows.
        allowed: bool ``[B, n, n]`` which column may attend to which, for models that are not
            causal over the prompt; None is causal.
    """

    family: Family
    layer: int
    hidden: Tensor
    embeds: Tensor
    rope: tuple[Tensor, Tensor] | None
    live: Tensor
    words: Tensor
    slots: ImageSlots
    last: int
    allowed: Tensor | None = None

    def gather(self, values: Tensor) -> Tensor:
        """Values ``[B, n, …]`` of the columns at the visual tokens: ``[I, V, …]``."""
        return self.slots.gather(values)

    def words_after(self) -> Tensor:
        """Text columns behind the last image of their row, bool ``[B, n]``."""
        rows, length = self.live.shape
        image = self.slots.image_columns(length, rows)
        behind = image.long().flip(1).cumsum(1).flip(1) == 0
        return self.words & behind

    def keys(self) -> Tensor:
        """Keys of the visual tokens at this layer, ``[I, N, V, E]``, after rotary embedding."""
        keys = self.family.text_keys(self.layer, self.hidden, self._rope())
        return self.slots.gather(keys.transpose(1, 2)).transpose(1, 2)

    def attention(self, rows: Tensor, chunk: int = 128) -> Tensor:
        """Mean attention that query columns pay to the visual tokens of their batch row.

        Softmax over every column a query may attend to; causal, or as the model's mask says.

        Args:
            rows: bool ``[B, n]`` query columns; at least one in each batch row with an image.
            chunk: query columns worked on at a time; bounds the memory, not the result.

        Returns:
            ``[I, N, V]``, at least float32.
        """
        rope = self._rope()
        keys = self.family.text_keys(self.layer, self.hidden, rope)
        count = rows.sum(1)
        width = int(count.amax())
        # The columns asked for first, in their order; shorter rows are filled up and not counted.
        columns = (~rows).long().argsort(dim=1, stable=True)[:, :width]
        real = torch.arange(width, device=rows.device) < count[:, None]
        total = torch.zeros((), device=keys.device)
        for here, counts in zip(
            torch.split(columns, chunk, 1), torch.split(real, chunk, 1), strict=True
        ):
            paid = self._pay(here, keys, rope)
            total = total + (paid * counts[:, None, :, None]).sum(2)
        mean = total / count.clamp_min(1)[:, None, None]
        return self.slots.gather(mean.transpose(1, 2)).transpose(1, 2)

    def _pay(self, columns: Tensor, keys: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Attention ``[B, N, R, n]`` of the query columns ``[B, R]``."""
        query = self.family.text_queries(self.layer, self.hidden, rope, columns)
        logits = query @ keys.transpose(2, 3)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits * self.family.text_scaling(self.layer)
        cap = self.family.text_softcap(self.layer)
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        visible = self.visible(columns)
        return logits.masked_fill(~visible[:, None], torch.finfo(logits.dtype).min).softmax(-1)

    def visible(self, columns: Tensor) -> Tensor:
        """Columns that query columns ``[B, R]`` may attend to: bool ``[B, R, n]``."""
        length = self.live.shape[1]
        if self.allowed is not None:
            wide = columns[:, :, None].expand(*columns.shape, length)
            return self.allowed.gather(1, wide) & self.live[:, None]
        causal = torch.arange(length, device=columns.device) <= columns[..., None]
        return causal & self.live[:, None]

    def _rope(self) -> tuple[Tensor, Tensor]:
        if self.rope is None:
            raise RuntimeError("attention of the language model exists at its layers only")
        return self.rope
