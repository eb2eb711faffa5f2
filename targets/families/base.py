"""What the rest of the package may know of a model: where its parts live and how they are called.

A family of models is one file with one subclass of `Family`. Everything a session or a view needs
from a model goes through it; nobody else touches module names.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from targets.caches import cache_name
from targets.compression.base import Stage
from targets.errors import TargetError
from targets.families.vision import (
    FeaturesReached,
    LayerPass,
    TowerEncoder,
    VisionPass,
    VisionTap,
)
from targets.preprocessing.layout import Layout, Preprocessing

if TYPE_CHECKING:
    from targets.compression.base import Compressor
    from targets.compression.layout import Group


class Family(ABC):
    """An adapter around one loaded model.

    Attributes:
        model_types: values of ``config.model_type`` it serves.
        known_weak: compressors known to do badly on this family, with the reason.
        any_size: whether pictures go in as large as they are, so that smaller ones have fewer
            tokens.
        why_whole: why the tower has to give all patches, where it cannot be shortened inside.
        model: the model; core: the part below the language-model head.
        tower: vision tower. projector: from vision to text width. text: the language model.
        layers: decoder layers of `text`. image_token_id: the placeholder.
        feature_layer: tower layer (0-based) whose output are the features.
        tower_depth: number of tower layers.
        image_size: height and width of a picture that suits the model.
        encoder: the tower's layers, where compressors may shorten it from inside; else None.
    """

    model_types: ClassVar[tuple[str, ...]]
    known_weak: ClassVar[dict[str, str]] = {}
    any_size: ClassVar[bool] = False
    why_whole: ClassVar[str] = "what follows the tower has to be given all of them"

    model: Any
    core: Any
    tower: Any
    projector: Any
    text: Any
    layers: Any
    image_token_id: int
    feature_layer: int
    tower_depth: int
    image_size: tuple[int, int] = (224, 224)
    encoder: TowerEncoder | None = None

    @classmethod
    def attention(cls, config: Any) -> str | None:  # noqa: ANN401 - of transformers
        """The attention implementation `auto` has to take; None leaves the choice.

        Args:
            config: of the model, before it is loaded.
        """
        del config
        return None

    # Pictures -----------------------------------------------------------------------------------

    @abstractmethod
    def preprocessing(self, processor: Any) -> Preprocessing:  # noqa: ANN401 - untyped
        """The differentiable twin of this model's image processor.

        Args:
            processor: the model's processor, with an ``image_processor``.

        Raises:
            TargetError: if it does not belong to the model, or has settings without a twin.
        """

    @abstractmethod
    def images(self, placeholders: Tensor, inputs: dict[str, Any]) -> Sequence[Layout]:
        """Layouts of the images of a forward, in reading order.

        Args:
            placeholders: bool ``[B, L]``, where the prompt has image placeholders.
            inputs: the arguments of the model's ``forward``; boxes need not be right, since the
                size of the original picture may not be among them.

        Raises:
            TargetError: if the arguments do not say how many tokens each image has.
        """

    def expand(self, text: str, image: str, layout: Layout) -> str:
        """Prompt text with its one image placeholder written out for a picture.

        Args:
            text: with `image` in it once.
            image: the processor's placeholder.
            layout: of the picture.
        """
        return text.replace(image, image * layout.placeholders)

    def fixed_tokens(self) -> int:
        """Visual tokens of every picture, where all have the same number; else 0."""
        return 0

    def refuses(self, compressor: Compressor) -> str | None:
        """Why a compressor cannot work on this family, in plain words; None if it can."""
        if compressor.stage is Stage.TOWER:
            return (
                f"it leaves the vision tower with fewer patches, but {self.why_whole}; use one "
                "that acts behind the tower"
            )
        return None

    def extras(self, ids: Tensor, mask: Tensor, answers: int | None = None) -> dict[str, Tensor]:
        """Further arguments of ``forward`` and ``generate`` made from the token ids.

        Args:
            ids: ``[B, L]``.
            mask: ``[B, L]``.
            answers: trailing columns that are answers; None where nobody knows.
        """
        del ids, mask, answers
        return {}

    # Vision tower -------------------------------------------------------------------------------

    @abstractmethod
    def tap(self, layers: Sequence[int] = (), *, stop: bool = False) -> VisionTap:
        """Hooks that capture the feature layer and further `layers` (0-based) of the tower.

        Args:
            layers: further ones.
            stop: raise `FeaturesReached` behind the last one captured.
        """

    @abstractmethod
    def arrange(
        self, captured: dict[int, LayerPass], layouts: Sequence[Layout], inputs: dict[str, Any]
    ) -> VisionPass:
        """What a tap captured, token by token.

        Args:
            captured: layers by number.
            layouts: of the images, in reading order.
            inputs: the image arguments of the forward, where it had them.
        """

    def encode(
        self,
        inputs: dict[str, Tensor],
        layouts: Sequence[Layout],
        layers: Sequence[int] = (),
        *,
        features: bool = True,
    ) -> VisionPass:
        """Run the tower as far as the feature layer and `layers` go.

        Args:
            inputs: what `Preprocessing.inputs` made.
            layouts: of the images.
            layers: further ones to capture, 0-based.
            features: capture the feature layer; without it the pass has `layers` alone and may end
                in front of it.
        """
        tap = self.tap(layers, stop=True)
        with tap if features else tap.only(layers), contextlib.suppress(FeaturesReached):
            self.run_tower(inputs)
        captured = tap.latest
        if captured is None:
            raise TargetError("the vision tower ran without passing the layers that were asked for")
        # All layers have one shape, and that is what the arrangement of the tokens follows from.
        shown = {self.feature_layer: captured[max(captured)]} | captured
        vision = self.arrange(shown, layouts, inputs)
        return vision if features else replace(vision, layers=captured, features=None)

    def final_norm(self) -> Callable[[Tensor], Tensor] | None:
        """The normalisation behind the tower's last layer, patch by patch; None without one."""
        homes = (self.tower, getattr(self.tower, "vision_model", None))
        for home in homes:
            for name in ("post_layernorm", "layernorm"):
                found: Callable[[Tensor], Tensor] | None = getattr(home, name, None)
                if found is not None:
                    return found
        return None

    def run_tower(self, inputs: dict[str, Tensor]) -> Any:  # noqa: ANN401 - of transformers
        """Run whatever of the model runs the tower; hooks see it."""
        return self.core.get_image_features(**self.cast(inputs))

    def encoded(self, inputs: dict[str, Tensor]) -> Any:  # noqa: ANN401 - of transformers
        """Encoder output that ``forward`` takes as ``mm_encoder_outputs["image"]``."""
        return self.run_tower(inputs)

    def note(self, encoded: Any, inputs: Mapping[str, Any]) -> None:  # noqa: ANN401, B027
        """Write onto encoder output what `images` will want to know of its inputs.

        Args:
            encoded: of the model or of `encoded`.
            inputs: what it was encoded from.
        """

    @abstractmethod
    def project_tokens(self, features: Tensor) -> Tensor:
        """Token features ``[…, r · D]`` (`VisionPass.patches`) to the width of the text model."""

    def cast(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Image arguments in the dtype of the weights."""
        return {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in inputs.items()
        }

    # Language model -----------------------------------------------------------------------------

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

    def run(
        self,
        ids: Tensor,
        mask: Tensor,
        encoded: Any,  # noqa: ANN401 - of transformers
        inputs: dict[str, Tensor],
        answers: int = 0,
        cache: Any = None,  # noqa: ANN401 - a cache of transformers
    ) -> Tensor:
        """Last hidden states ``[B, n, D]`` of prompts whose images are already encoded.

        Args:
            ids: ``[B, L]`` with all placeholders.
            mask: ``[B, L]`` 0 for padding.
            encoded: from `encoded`; None for prompts without images.
            inputs: what the images were encoded from.
            answers: trailing columns that are answers.
            cache: an empty one to fill; None keeps nothing.
        """
        sizes = {name: value for name, value in inputs.items() if not name.startswith("pixel")}
        output = self.core(
            input_ids=ids,
            attention_mask=mask,
            mm_encoder_outputs=None if encoded is None else {"image": encoded},
            use_cache=cache is not None,
            **({} if cache is None else {cache_name(): cache}),
            **self.positions(mask),
            **sizes,
            **self.extras(ids, mask, answers),
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def positions(self, mask: Tensor) -> dict[str, Tensor]:
        """Position ids of left-padded prompts, as an argument of ``forward``; {} if it counts."""
        return {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}

    def step(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:  # noqa: ANN401
        """Last hidden states ``[B, 1, D]`` of one more token of each row.

        Args:
            tokens: ``[B, 1]``.
            mask: ``[B, L]`` of all tokens so far, these included.
            positions: ``[B, 1]`` their position ids, the same on all axes.
            cache: of everything before.
        """
        output = self.core(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{cache_name(): cache},
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def prompt_state(self) -> object:
        """What the adapter remembers of the prompt prefilled last, for `resume`."""
        return None

    def resume(self, state: object) -> None:  # noqa: B027 - most adapters remember nothing
        """Go on decoding an earlier prompt, after others have been prefilled.

        Args:
            state: what `prompt_state` said after its prefill.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits of hidden states, as the model makes them."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits

    def text_keys(self, layer: int, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Keys of all columns after rotary embedding; grouped keys are repeated.

        Args:
            layer: decoder layer, 0-based.
            hidden: ``[B, n, D]`` its input.
            rope: cosine and sine, ``[B, n, R]``.

        Returns:
            ``[B, N, n, E]``.
        """
        attention = self.layers[layer].self_attn
        here, (hidden, *turn) = hidden.device, self._at(layer, hidden, *rope)
        normed = self.layers[layer].input_layernorm(hidden)
        keys = attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim))
        if hasattr(attention, "k_norm"):
            keys = attention.k_norm(keys)
        cosine, sine = (part.unsqueeze(1) for part in turn)
        keys = rotate(keys.transpose(1, 2), cosine, sine)
        heads = attention.q_proj.out_features // attention.head_dim
        return keys.repeat_interleave(heads // keys.shape[1], dim=1).to(here)

    def _at(self, layer: int, *values: Tensor) -> list[Tensor]:
        """Values on the device of a layer; models may be spread over several."""
        home = self.layers[layer].self_attn.q_proj.weight.device
        return [value.to(home) for value in values]

    def text_queries(
        self, layer: int, hidden: Tensor, rope: tuple[Tensor, Tensor], columns: Tensor
    ) -> Tensor:
        """Queries of some columns ``[B, R]`` after rotary embedding, ``[B, N, R, E]``."""
        attention = self.layers[layer].self_attn
        here, (hidden, columns, *turn) = hidden.device, self._at(layer, hidden, columns, *rope)
        picked = hidden.gather(1, columns[..., None].expand(*columns.shape, hidden.shape[-1]))
        normed = self.layers[layer].input_layernorm(picked)
        query = attention.q_proj(normed).unflatten(-1, (-1, attention.head_dim))
        if hasattr(attention, "q_norm"):
            query = attention.q_norm(query)
        turns = [
            part.expand(len(hidden), -1, -1).gather(
                1, columns[..., None].expand(*columns.shape, part.shape[-1])
            )[:, None]
            for part in turn
        ]
        return rotate(query.transpose(1, 2), turns[0], turns[1]).to(here)

    def text_scaling(self, layer: int) -> float:
        """Factor on query · key of a decoder layer."""
        return float(self.layers[layer].self_attn.scaling)

    def text_softcap(self, layer: int) -> float | None:
        """Cap on attention logits of a decoder layer, where the model has one."""
        cap = getattr(self.layers[layer].self_attn, "attn_logit_softcapping", None)
        return None if cap is None else float(cap)

    def allowed(self, given: Any, group: Group, layer: int) -> Tensor | None:  # noqa: ANN401
        """Which column may attend to which, bool ``[B, n, n]``; None where attention is causal.

        Args:
            given: the mask the language model was given at prefill, in the form it has there.
            group: the columns.
            layer: the layer asked about.
        """
        del given, group, layer
        return None

    def form(self, layer: int) -> object:
        """Layers of one form take the same mask and rotary embedding; hashable."""
        del layer
        return None

    def rope(self, hidden: Tensor, positions: Tensor, layer: int) -> Any:  # noqa: ANN401
        """Rotary embedding of position ids ``[…, B, n]`` in the form a layer takes."""
        del layer
        cosine, sine = self.text.rotary_emb(hidden, position_ids=positions)
        return cosine, sine

    def layer_mask(
        self,
        hidden: Tensor,
        group: Group,
        cache: Any,  # noqa: ANN401 - a cache of transformers
        layer: int,
        given: Any,  # noqa: ANN401 - its form depends on the model
        *,
        explicit: bool = False,
    ) -> Any:  # noqa: ANN401 - its form depends on the attention implementation
        """The mask a layer of this model takes for a group of columns.

        Args:
            hidden: ``[B, n, D]`` the layer's input.
            group: its 2-D mask ``[B, m]`` is over cached and new columns.
            cache: key-value cache or None.
            layer: whose cache counts; layers may have caches of different lengths.
            given: the mask the language model was given at prefill, where that is no 2-D one.
            explicit: never leave it out, even where the kernel knows causality itself.
        """
        from transformers.masking_utils import create_causal_mask

        del given
        return create_causal_mask(
            config=self.text.config,
            inputs_embeds=hidden,
            attention_mask=group.mask,
            **{cache_name(): cache},
            layer_idx=layer if cache is not None else None,
            allow_is_causal_skip=not explicit,
        )

    def plain_mask(self, given: Any, group: Group) -> Any:  # noqa: ANN401 - form of the model
        """What the language model is given as attention mask at prefill, once columns are cut.

        Args:
            given: what it would have been given, if that is no 2-D mask; else None.
            group: the columns that are left.
        """
        del given
        return group.mask

    def shorten(  # noqa: B027 - most families give their text model nothing else
        self, kwargs: dict[str, Any], group: Group
    ) -> None:
        """Cut what else the language model is given column by column; `kwargs` in place."""

    def attach(self, current: Any) -> Sequence[Any]:  # noqa: ANN401 - a function without arguments
        """Hooks the family needs under a session; handles with ``remove``.

        Args:
            current: returns the `TextPass` that is running, with its `groups`.
        """
        del current
        return ()


def alike(placeholders: Tensor, one: Layout) -> list[Layout]:
    """The layouts of images that all have `one`, from their placeholders, bool ``[B, L]``.

    Raises:
        TargetError: if a row's placeholders are no multiple of its tokens.
    """
    counts = placeholders.sum(1)
    if bool((counts % one.tokens != 0).any()):
        raise TargetError(
            f"rows hold {counts.tolist()} image placeholders; every image has {one.tokens} of them"
        )
    return [one] * (int(counts.sum()) // one.tokens)


def rotate(values: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout; dimensions past the table stay as they are."""
    width = cosine.shape[-1]
    turned, rest = values[..., :width], values[..., width:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cosine + torch.cat([-second, first], -1) * sine
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned
