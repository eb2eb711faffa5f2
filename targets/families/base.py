"""What the rest of the package may know of a model: where its parts live and how they are called.

A family of models is one file with one subclass of `Family`. Everything a session or a view needs
from a model goes through it; nobody else touches module names.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from targets.families.vision import FeaturesReached, VisionPass, VisionTap


class Family(ABC):
    """An adapter around one loaded model.

    Attributes:
        model_types: values of ``config.model_type`` it serves.
        model: the model; core: the part below the language-model head.
        tower: vision tower. projector: from vision to text width. text: the language model.
        layers: decoder layers of `text`. image_token_id: the placeholder.
        grid: rows and columns of visual tokens. image_size: height and width the tower takes.
    """

    model_types: ClassVar[tuple[str, ...]]

    model: Any
    core: Any
    tower: Any
    projector: Any
    text: Any
    layers: Any
    image_token_id: int
    grid: tuple[int, int]
    image_size: tuple[int, int]

    @property
    def tokens(self) -> int:
        """V, visual tokens of one image."""
        return self.grid[0] * self.grid[1]

    @abstractmethod
    def tap(self, *, stop: bool = False) -> VisionTap:
        """Hooks that capture what the tower computes at the feature layer."""

    def encode(self, pixel_values: Tensor) -> VisionPass:
        """Run the tower up to the feature layer on normalised images ``[I, 3, H, W]``."""
        tap = self.tap(stop=True)
        with tap, contextlib.suppress(FeaturesReached):
            self.tower(pixel_values.to(self.dtype))
        seen = tap.latest
        if seen is None:
            raise RuntimeError("the vision tower ran without passing its feature layer")
        return seen

    def project(self, vision: VisionPass) -> Tensor:
        """Visual tokens of a pass as the language model receives them, ``[I, V, D]``."""
        projected: Tensor = self.projector(vision.patches)
        return projected

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        dtype: torch.dtype = next(self.tower.parameters()).dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        device: torch.device = next(self.tower.parameters()).device
        return device

    def run(self, ids: Tensor, mask: Tensor, positions: Tensor, projected: Tensor | None) -> Tensor:
        """Last hidden states ``[B, n, D]`` of prompts whose images are already projected.

        Args:
            ids: ``[B, L]`` with V placeholders an image.
            mask: ``[B, L]`` 0 for padding.
            positions: ``[B, L]`` position ids.
            projected: ``[I, V, D]``; None for prompts without images.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        encoded = None
        if projected is not None:
            encoded = {"image": BaseModelOutputWithPooling(pooler_output=list(projected))}
        output = self.core(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            mm_encoder_outputs=encoded,
            use_cache=False,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits of hidden states."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits

    def text_query_keys(
        self, layer: int, hidden: Tensor, rope: tuple[Tensor, Tensor], column: int
    ) -> tuple[Tensor, Tensor]:
        """Query of one column and keys of all, after rotary embedding, from a layer's input.

        Args:
            layer: decoder layer, 0-based.
            hidden: ``[B, L, D]`` its input.
            rope: cosine and sine, ``[B, L, R]``.
            column: the column whose query is wanted.

        Returns:
            ``[B, N, E]`` and ``[B, N, L, E]``; grouped keys are repeated.
        """
        module = self.layers[layer]
        attention = module.self_attn
        normed = module.input_layernorm(hidden)
        width = attention.head_dim
        query = attention.q_proj(normed[:, column]).unflatten(-1, (-1, 1, width))  # [B, N, 1, E]
        keys = attention.k_proj(normed).unflatten(-1, (-1, width)).transpose(1, 2)
        if hasattr(attention, "q_norm"):
            query, keys = attention.q_norm(query), attention.k_norm(keys)
        cosine, sine = (part.unsqueeze(1) for part in rope)
        query = rotate(query, cosine[:, :, column, None], sine[:, :, column, None]).squeeze(2)
        keys = rotate(keys, cosine, sine)
        return query, keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)

    def text_scaling(self, layer: int) -> float:
        """Factor on query · key of a decoder layer."""
        return float(self.layers[layer].self_attn.scaling)

    def text_softcap(self, layer: int) -> float | None:
        """Cap on attention logits of a decoder layer, where the model has one."""
        cap = getattr(self.layers[layer].self_attn, "attn_logit_softcapping", None)
        return None if cap is None else float(cap)

    def rope(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of position ids ``[B, n]``, ``[B, n, R]`` each."""
        cosine, sine = self.text.rotary_emb(hidden, position_ids=positions)
        return cosine, sine

    def causal_mask(
        self,
        hidden: Tensor,
        mask: Tensor,
        cache: Any,  # noqa: ANN401 - a cache of transformers
        layer: int,
        *,
        explicit: bool = False,
    ) -> Any:  # noqa: ANN401 - its form depends on the attention implementation
        """The mask a layer of this model takes, from a 2-D one over its own columns.

        Args:
            hidden: ``[B, n, D]`` the layer's input.
            mask: ``[B, m]`` over cached and new columns.
            cache: key-value cache or None.
            layer: whose cache counts; layers may have caches of different lengths.
            explicit: never leave it out, even where the kernel knows causality itself.
        """
        from transformers.masking_utils import create_causal_mask

        return create_causal_mask(
            config=self.text.config,
            inputs_embeds=hidden,
            attention_mask=mask,
            past_key_values=cache,
            layer_idx=layer if cache is not None else None,
            allow_is_causal_skip=not explicit,
        )


def rotate(values: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout; dimensions past the table stay as they are."""
    width = cosine.shape[-1]
    turned, rest = values[..., :width], values[..., width:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cosine + torch.cat([-second, first], -1) * sine
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned
