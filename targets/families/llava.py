"""LLaVA-1.5 and models of its architecture: CLIP or SigLIP tower, MLP, Llama-like text model."""

from __future__ import annotations

from typing import Any, ClassVar

from targets.errors import TargetError
from targets.families.base import Family
from targets.families.vision import VisionTap

_TOWERS = {"clip_vision_model": True, "siglip_vision_model": False}
"""Tower types, and whether they have a CLS token."""
_TEXTS = ("llama", "mistral", "qwen2")


class Llava(Family):
    """Adapter for `LlavaForConditionalGeneration`.

    Raises:
        TargetError: for a tower, text model or feature selection it has not been written for.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava",)

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - transformers is untyped
        config = model.config
        vision, text = config.vision_config, config.text_config
        _refuse("vision tower", vision.model_type, tuple(_TOWERS))
        _refuse("text model", text.model_type, _TEXTS)
        if _slides(text):
            raise TargetError(
                "llava: text models with a sliding attention window are not supported, because "
                "the window would count pruned tokens; load one with full attention"
            )
        self.has_cls = _TOWERS[vision.model_type]
        strategy = config.vision_feature_select_strategy
        wanted = "default" if self.has_cls else "full"
        if strategy != wanted:
            raise TargetError(
                f"llava: vision_feature_select_strategy is {strategy!r}; with a "
                f"{vision.model_type} it has to be {wanted!r}, so that features are patches"
            )
        self.model, self.core = model, model.model
        self.tower, self.projector = self.core.vision_tower, self.core.multi_modal_projector
        self.text, self.layers = self.core.language_model, self.core.language_model.layers
        self.image_token_id = int(config.image_token_id)
        side = vision.image_size // vision.patch_size
        self.grid, self.image_size = (side, side), (vision.image_size, vision.image_size)
        self.feature_layer = _feature_layer(config.vision_feature_layer, vision.num_hidden_layers)

    def tap(self, *, stop: bool = False) -> VisionTap:
        """Hooks at the layer whose output are the features; its attention makes the scores."""
        tower = getattr(self.tower, "vision_model", self.tower)
        layer = tower.encoder.layers[self.feature_layer]
        attention = layer.self_attn
        return VisionTap(
            self.tower,
            layer,
            attention.q_proj,
            attention.k_proj,
            heads=int(attention.num_heads),
            scaling=float(attention.scale),
            has_cls=self.has_cls,
            stop=stop,
        )


def _feature_layer(index: object, layers: int) -> int:
    """The 0-based layer whose output is ``hidden_states[index]``, of `layers` + 1 of them."""
    if isinstance(index, list | tuple) and len(index) == 1:
        index = index[0]
    if not isinstance(index, int):
        raise TargetError(
            f"llava: vision_feature_layer is {index!r}; features joined from several layers are "
            "not supported, only one index is"
        )
    place = index if index >= 0 else layers + 1 + index
    if not 1 <= place <= layers:
        raise TargetError(
            f"llava: vision_feature_layer {index} names no layer's output; with {layers} layers "
            f"it is 1 to {layers}, or −{layers} to −1"
        )
    return place - 1


def _refuse(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise TargetError(f"llava: {what} {value!r} is not supported; one of {', '.join(allowed)}")


def _slides(text: Any) -> bool:  # noqa: ANN401 - a configuration of transformers
    if getattr(text, "use_sliding_window", True) is False:
        return False
    return getattr(text, "sliding_window", None) is not None
