"""Idefics3: a SigLIP-like tower over tiles, pixel shuffle, Llama; text between an image's tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Final

from torch import Tensor

from targets.errors import TargetError
from targets.families.shuffled import Shuffled, refuse_text, runs_of
from targets.families.vision import LayerPass, TappedLayer, VisionPass
from targets.preprocessing.idefics3 import Idefics3Preprocessor
from targets.preprocessing.layout import Layout, Preprocessing
from targets.preprocessing.tiles import canvas_of

_TEXTS: Final = ("llama",)


class Idefics3(Shuffled):
    """Adapter for `Idefics3ForConditionalGeneration`.

    A token is a block of r × r patches (r = ``scale_factor``); scores of patches are averaged over
    it. The tower has no CLS. Text between the tiles of an image (where a tile lies) is never
    dropped.

    Raises:
        TargetError: for a text model or tiles it has not been written for.
    """

    model_types: ClassVar[tuple[str, ...]] = ("idefics3",)
    name = "idefics3"
    texts: ClassVar[tuple[str, ...]] = _TEXTS

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - transformers is untyped
        config = model.config
        refuse_text(self.name, config.text_config, self.texts)
        self.set_tiles(config, int(config.scale_factor))
        self.model, self.core = model, model.model
        self.tower = self.core.vision_model
        # The connector shuffles pixels first; behind that, tokens are projected one by one.
        self.projector = self.core.connector.modality_projection
        self.text, self.layers = self.core.text_model, self.core.text_model.layers
        self.image_token_id = int(config.image_token_id)
        self.tower_depth = int(config.vision_config.num_hidden_layers)
        self.feature_layer = self.tower_depth - 1

    def preprocessing(self, processor: Any) -> Preprocessing:  # noqa: ANN401 - untyped
        """Whole tiles, and one of the whole picture."""
        made = Idefics3Preprocessor.of(processor, self.model.config)
        self.remember(processor)
        return made

    def images(self, placeholders: Tensor, inputs: dict[str, Any]) -> Sequence[Layout]:
        """Tiles are runs of placeholders; an image ends with the tile of the whole picture.

        That tile is known by the text in front of it, which every row has before its last run: what
        stands between the token that closes an image and the run.

        Raises:
            TargetError: without token ids, or for runs that are no tile.
        """
        runs = runs_of(placeholders)
        if not runs:
            return []
        ids = inputs.get("input_ids")
        if ids is None:
            raise TargetError(
                f"{self.name}: the tiles of an image are told apart by the text between them; call "
                "the model with input_ids"
            )
        rows: dict[int, list[tuple[int, int]]] = {}
        for row, start, end in runs:
            self._check_run(row, end - start)
            rows.setdefault(row, []).append((start, end))
        return [
            self.layout_of(count)
            for row, found in rows.items()
            for count in _tile_counts(ids[row].tolist(), found)
        ]

    def arrange(
        self, captured: dict[int, LayerPass], layouts: Sequence[Layout], inputs: dict[str, Any]
    ) -> VisionPass:
        """Blocks of patches, tile by tile.

        Raises:
            TargetError: for tiles that are partly padding, whose attention would have a mask; the
                model's processor makes none.
        """
        mask = inputs.get("pixel_attention_mask")
        if mask is not None:
            filled = mask.flatten(2).bool()
            if bool((filled.any(2) != filled.all(2)).any()):
                raise TargetError(
                    f"{self.name}: pixel_attention_mask hides a part of a tile; scores of the "
                    "vision tower are defined for whole tiles only, as the processor makes them"
                )
        return super().arrange(captured, layouts, inputs)

    @property
    def blocks(self) -> Sequence[Any]:
        """Layers of the tower."""
        found: Sequence[Any] = self.tower.encoder.layers
        return found

    def tapped(self, block: Any) -> TappedLayer:  # noqa: ANN401 - modules of transformers
        """As in SigLIP."""
        a = block.self_attn
        return TappedLayer(block, a.q_proj, a.k_proj, int(a.num_heads), a.v_proj, a.out_proj)

    def scaling(self, block: Any) -> float:  # noqa: ANN401 - modules of transformers
        """Factor on query · key."""
        return float(block.self_attn.scale)

    def normalised(self, hidden: Tensor) -> Tensor:
        """Through the tower's last normalisation."""
        out: Tensor = self.tower.post_layernorm(hidden)
        return out

    def project_tokens(self, features: Tensor) -> Tensor:
        """Through the connector's one linear map."""
        projected: Tensor = self.projector(features)
        return projected

    def written(self, layout: Layout) -> str:
        """Placeholders tile by tile, with the place of each in front."""
        rows, columns = canvas_of(layout) if len(layout.shapes) > 1 else (0, 0)
        text: str = self._processor.replace_image_token({"rows": [[rows]], "cols": [[columns]]}, 0)
        return text

    def _check_run(self, row: int, length: int) -> None:
        if length != self.tile_tokens:
            raise TargetError(
                f"{self.name}: row {row} has {length} image placeholders in a run; every tile has "
                f"{self.tile_tokens}, with text in front"
            )


def _tile_counts(ids: list[int], runs: list[tuple[int, int]]) -> list[int]:
    """Tiles of each image of a row, from its token ids and the runs of placeholders in it."""
    last_end = runs[-1][1]
    closing = ids[last_end] if last_end < len(ids) else None
    tags = []
    for start, _ in runs:
        before = ids[:start]
        # The same token opens every tile's tag and closes the image.
        opened = next((i for i in range(start - 1, -1, -1) if before[i] == closing), -1)
        tags.append(tuple(before[opened + 1 :]))
    counts, tiles = [], 0
    for tag in tags:
        tiles += 1
        if tag == tags[-1]:
            counts.append(tiles)
            tiles = 0
    return counts
