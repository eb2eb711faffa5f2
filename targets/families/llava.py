"""LLaVA-1.5 and models of its architecture: CLIP or SigLIP tower, MLP, Llama-like text model."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from targets.compression.base import Compressor
from targets.errors import TargetError
from targets.families.base import Family, alike
from targets.families.vision import (
    FeaturesReached,
    LayerPass,
    TappedLayer,
    TowerEncoder,
    VisionPass,
    VisionTap,
    whole_runs,
)
from targets.preprocessing import Layout, Preprocessing, Preprocessor

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
        self.tower_depth = int(vision.num_hidden_layers)
        self.feature_layer = feature_layer_of(config.vision_feature_layer, self.tower_depth)
        self.encoder = encoder_of(self.tower, self.feature_layer, self.has_cls, self.grid)
        self.scaling = float(clip_layers(self.tower)[self.feature_layer].self_attn.scale)

    def fixed_tokens(self) -> int:
        """The grid."""
        return int(self.grid[0] * self.grid[1])

    def refuses(self, compressor: Compressor) -> str | None:
        """Nothing: one picture is one run of a tower without windows."""
        del compressor
        return None

    def preprocessing(self, processor: Any) -> Preprocessing:  # noqa: ANN401 - untyped
        """A centre crop or a fixed size."""
        made = Preprocessor.of(processor.image_processor, tokens=self.grid)
        if made.size != self.image_size:
            raise TargetError(
                f"the processor makes {made.size} pictures, the vision tower takes "
                f"{self.image_size}; load the processor that belongs to the model"
            )
        return made

    def images(self, placeholders: Tensor, inputs: dict[str, Any]) -> Sequence[Layout]:
        """Every picture has one grid of tokens."""
        del inputs
        return alike(placeholders, Layout.grid(self.grid))

    def tap(self, layers: Sequence[int] = (), *, stop: bool = False) -> VisionTap:
        """Hooks at the feature layer and others; `clip_layers`."""
        blocks = clip_layers(self.tower)
        wanted = sorted({self.feature_layer, *layers})
        return VisionTap(self.tower, {n: tapped(blocks[n]) for n in wanted}, stop=stop)

    def arrange(
        self, captured: dict[int, LayerPass], layouts: Sequence[Layout], inputs: dict[str, Any]
    ) -> VisionPass:
        """A token is a patch."""
        del inputs, layouts
        hidden = captured[self.feature_layer].hidden
        runs = whole_runs(len(hidden), hidden.shape[1] - int(self.has_cls), hidden.device)
        return VisionPass(captured, self.feature_layer, self.scaling, self.has_cls, *runs)

    def run_tower(self, inputs: dict[str, Tensor]) -> Any:  # noqa: ANN401 - of transformers
        """The tower alone."""
        return self.tower(**self.cast(inputs))

    def encoded(self, inputs: dict[str, Tensor]) -> Any:  # noqa: ANN401 - of transformers
        """Runs the tower no further than the feature layer."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        tap = self.tap(stop=True)
        with tap, contextlib.suppress(FeaturesReached):
            self.run_tower(inputs)
        captured = tap.latest
        if captured is None:
            raise TargetError("the vision tower ran without passing its feature layer")
        hidden = captured[self.feature_layer].hidden
        projected = self.projector(hidden[:, 1:] if self.has_cls else hidden)
        return BaseModelOutputWithPooling(pooler_output=list(projected))

    def project_tokens(self, features: Tensor) -> Tensor:
        """Through the two-layer perceptron."""
        projected: Tensor = self.projector(features)
        return projected


def clip_layers(tower: Any) -> Any:  # noqa: ANN401 - modules of transformers are untyped
    """Encoder layers of a CLIP or SigLIP tower."""
    return getattr(tower, "vision_model", tower).encoder.layers


def encoder_of(
    tower: Any,  # noqa: ANN401
    feature_layer: int,
    has_cls: bool,
    grid: tuple[int, int],
) -> TowerEncoder:
    """The inside of a CLIP or SigLIP tower."""
    module = getattr(tower, "vision_model", tower).encoder
    return TowerEncoder(module, tuple(module.layers), feature_layer, has_cls, grid)


def tapped(layer: Any) -> TappedLayer:  # noqa: ANN401
    """What a tap listens to in a layer of CLIP or SigLIP."""
    a = layer.self_attn
    return TappedLayer(layer, a.q_proj, a.k_proj, int(a.num_heads), a.v_proj, a.out_proj)


def feature_layer_of(index: object, layers: int) -> int:
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
