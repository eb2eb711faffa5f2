"""InternVL (2.5, 3, 3.5) as transformers has it: InternViT, pixel shuffle, Qwen-like text model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Final

from torch import Tensor

from targets.errors import TargetError
from targets.families.llava import feature_layer_of
from targets.families.shuffled import Shuffled, refuse_text, runs_of
from targets.families.vision import TappedLayer
from targets.preprocessing.internvl import InternVLPreprocessor, shrink_of
from targets.preprocessing.layout import Layout, Preprocessing

_TEXTS: Final = ("qwen2", "qwen3", "llama")
_WEAK: Final = (
    "ranks by the attention of CLS, which InternVL was not trained to read out: on InternVL2 such "
    "pruning is reported at half of FastV's retained score"
)


class InternVL(Shuffled):
    """Adapter for `InternVLForConditionalGeneration`.

    A token is a block of r × r patches (r = 1 / ``downsample_ratio``, usually 2); scores of patches
    are averaged over it. InternViT has a CLS token, but pruning by its attention is known to be
    weak here (`known_weak`) [secondary: reported for InternVL2, not measured by us].

    Raises:
        TargetError: for a tower, text model or feature selection it has not been written for.
    """

    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    known_weak: ClassVar[dict[str, str]] = dict.fromkeys(
        ("visionzip", "fastervlm", "vispruner", "prumerge", "hired"), _WEAK
    )
    name = "internvl"
    has_cls = True

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - transformers is untyped
        config = model.config
        vision = config.vision_config
        if vision.model_type != "internvl_vision":
            raise TargetError(
                f"internvl: vision tower {vision.model_type!r} is not supported; only "
                "internvl_vision is"
            )
        refuse_text(self.name, config.text_config, _TEXTS)
        strategy = config.vision_feature_select_strategy
        if strategy != "default":
            raise TargetError(
                f"internvl: vision_feature_select_strategy is {strategy!r}; it has to be "
                "'default', so that features are patches without CLS"
            )
        self.set_tiles(config, shrink_of(config))
        self.model, self.core = model, model.model
        self.tower, self.projector = self.core.vision_tower, self.core.multi_modal_projector
        self.text, self.layers = self.core.language_model, self.core.language_model.layers
        self.image_token_id = int(config.image_token_id)
        self.tower_depth = int(vision.num_hidden_layers)
        self.feature_layer = feature_layer_of(config.vision_feature_layer, self.tower_depth)

    def preprocessing(self, processor: Any) -> Preprocessing:  # noqa: ANN401 - untyped
        """Tiles over the nearest aspect, and a thumbnail."""
        made = InternVLPreprocessor.of(processor, self.model.config)
        self.remember(processor)
        return made

    def images(self, placeholders: Tensor, inputs: dict[str, Any]) -> Sequence[Layout]:
        """Each unbroken run of placeholders is an image; the processor puts text around them.

        Raises:
            TargetError: for runs of no whole number of tiles.
        """
        del inputs
        layouts = []
        for row, start, end in runs_of(placeholders):
            tiles, rest = divmod(end - start, self.tile_tokens)
            if rest:
                raise TargetError(
                    f"internvl: row {row} has {end - start} image placeholders in a run; it has to "
                    f"be a multiple of {self.tile_tokens}, the tokens of a tile"
                )
            layouts.append(self.layout_of(tiles))
        return layouts

    @property
    def blocks(self) -> Sequence[Any]:
        """Layers of InternViT."""
        found: Sequence[Any] = self.tower.encoder.layer
        return found

    def tapped(self, block: Any) -> TappedLayer:  # noqa: ANN401 - modules of transformers
        """Queries and keys behind their normalisation, where the model has one."""
        a = block.attention
        heads = int(a.num_heads)
        return TappedLayer(block, a.q_norm, a.k_norm, heads, a.v_proj, a.projection_layer)

    def scaling(self, block: Any) -> float:  # noqa: ANN401 - modules of transformers
        """Factor on query · key."""
        return float(block.attention.scale)

    def normalised(self, hidden: Tensor) -> Tensor:
        """Through the tower's last normalisation, if features are its last output."""
        if self.model.config.vision_feature_layer != -1:
            return hidden
        out: Tensor = self.tower.layernorm(hidden)
        return out

    def project_tokens(self, features: Tensor) -> Tensor:
        """Through the normalised two-layer perceptron."""
        projected: Tensor = self.projector(features)
        return projected

    def written(self, layout: Layout) -> str:
        """Placeholders of all tiles between a start and an end token."""
        text: str = self._processor.replace_image_token({"num_patches": [len(layout.shapes)]}, 0)
        return text
