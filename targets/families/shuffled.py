"""What families have in common whose tokens are blocks of patches, joined by a pixel shuffle.

A vision tower sees square tiles. Each block of r × r patches becomes one token: their features one
after the other, row by row, go through the projector.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from targets.compression.base import Compressor, Stage
from targets.errors import TargetError
from targets.families.base import Family
from targets.families.vision import LayerPass, TappedLayer, VisionPass, VisionTap, padded
from targets.preprocessing.layout import Layout
from targets.preprocessing.tiles import layout_of_tiles, square_edge, token_grid


class Shuffled(Family):
    """Base of adapters to such models.

    Attributes:
        name: of the family, for messages.
        shrink: r, patches along a token's edge.
        side: patches along a tile's edge.
        shape: rows and columns of the tokens of a tile.
        has_cls: whether position 0 of a run of the tower is CLS.
    """

    name: str
    shrink: int
    side: int
    shape: tuple[int, int]
    has_cls: bool = False
    _processor: Any = None

    def set_tiles(self, config: Any, shrink: int) -> None:  # noqa: ANN401 - transformers is untyped
        """Read the geometry of tiles and tokens.

        Raises:
            TargetError: if tiles do not divide into tokens.
        """
        vision = config.vision_config
        self.shrink = shrink
        pixels = square_edge(self.name, vision, "image_size")
        self.side = pixels // square_edge(self.name, vision, "patch_size")
        self.shape = token_grid(self.name, config, pixels, shrink)

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile."""
        return self.shape[0] * self.shape[1]

    def layout_of(self, tiles: int) -> Layout:
        """The layout of an image of so many tiles; its boxes are on the unit square.

        Raises:
            TargetError: for two tiles, which no picture has: one of the whole follows several.
        """
        if tiles == 2:
            raise TargetError(
                f"{self.name}: an image seems to have two tiles, which no picture gets; images of "
                "a prompt have to be told apart by text, as the model's own processor does"
            )
        return layout_of_tiles(self.shape, (1, max(tiles - 1, 1)), (1, 1))

    @property
    @abstractmethod
    def blocks(self) -> Sequence[Any]:
        """Layers of the tower."""

    @abstractmethod
    def tapped(self, block: Any) -> TappedLayer:  # noqa: ANN401 - modules of transformers
        """What a tap listens to in a layer of the tower."""

    @abstractmethod
    def normalised(self, hidden: Tensor) -> Tensor:
        """The feature layer's output as the pixel shuffle gets it, CLS still in front."""

    @abstractmethod
    def scaling(self, block: Any) -> float:  # noqa: ANN401 - modules of transformers
        """Factor on query · key of a layer of the tower."""

    def refuses(self, compressor: Compressor) -> str | None:
        """Those that change the tower work patch by patch, and a token is a block of them."""
        if compressor.stage is Stage.TOWER:
            return (
                "it changes the vision tower from inside, patch by patch, which is not supported "
                f"where a token is a block of {self.shrink} × {self.shrink} patches, as in "
                f"{self.name}; use one that acts behind the tower"
            )
        return super().refuses(compressor)

    def tap(self, layers: Sequence[int] = (), *, stop: bool = False) -> VisionTap:
        """Hooks at the feature layer and others."""
        wanted = sorted({self.feature_layer, *layers})
        return VisionTap(self.tower, {n: self.tapped(self.blocks[n]) for n in wanted}, stop=stop)

    def arrange(
        self, captured: dict[int, LayerPass], layouts: Sequence[Layout], inputs: dict[str, Any]
    ) -> VisionPass:
        """Blocks of patches, tile by tile.

        Raises:
            TargetError: if the tower saw another number of tiles than the layouts have.
        """
        del inputs
        hidden = captured[self.feature_layer].hidden
        tiles = [len(one.shapes) for one in layouts]
        if sum(tiles) != len(hidden):
            raise TargetError(
                f"{self.name}: the vision tower saw {len(hidden)} tiles, but the images of the "
                f"prompt have {tiles}"
            )
        parts, base, first = [], [], 0
        patches = self.token_patches(hidden.device)
        for one, count in zip(layouts, tiles, strict=True):
            runs = torch.arange(first, first + count, device=hidden.device)
            parts.append((runs[:, None, None] * self.side**2 + patches).flatten(0, 1))
            base.append(first + one.base)
            first += count
        patches_of, present = padded(parts)
        entering = self.normalised(hidden)
        entering = entering[:, 1:] if self.has_cls else entering
        return VisionPass(
            captured,
            self.feature_layer,
            self.scaling(self.blocks[self.feature_layer]),
            self.has_cls,
            patches_of,
            present,
            torch.tensor(base, device=hidden.device),
            entering.flatten(0, 1)[patches_of].flatten(2),
        )

    def token_patches(self, device: torch.device) -> Tensor:
        """Patches of each token of a tile in the order of the pixel shuffle: long ``[T, r²]``."""
        numbers = torch.arange(self.side**2, device=device).view(self.side, self.side)
        rows, columns = self.shape
        cut = numbers.view(rows, self.shrink, columns, self.shrink).transpose(1, 2)
        return cut.reshape(rows * columns, self.shrink**2)

    def remember(self, processor: Any) -> None:  # noqa: ANN401 - transformers is untyped
        """Keep the processor, whose text around images `expand` writes."""
        self._processor = processor

    def expand(self, text: str, image: str, layout: Layout) -> str:
        """Prompt text with its image placeholder written out as the model's processor does.

        Raises:
            TargetError: before `preprocessing` was called with a whole processor.
        """
        if not hasattr(self._processor, "replace_image_token"):
            raise TargetError(
                f"{self.name}: the text around tiles is written by the model's processor, which is "
                "not known yet; call preprocessing(processor) with a whole processor first"
            )
        return text.replace(image, self.written(layout))

    @abstractmethod
    def written(self, layout: Layout) -> str:
        """What the processor writes for a picture."""


def runs_of(placeholders: Tensor) -> list[tuple[int, int, int]]:
    """Row, first column and column behind the last of each unbroken run in bool ``[B, L]``."""
    steps = torch.nn.functional.pad(placeholders.long(), (1, 1)).diff(dim=1)
    starts, ends = ((steps == step).nonzero() for step in (1, -1))
    return [
        (int(row), int(start), int(end))
        for (row, start), end in zip(starts.tolist(), ends[:, 1].tolist(), strict=True)
    ]


def refuse_text(name: str, text: Any, allowed: tuple[str, ...]) -> None:  # noqa: ANN401
    """Refuse language models an adapter has not been written for.

    Raises:
        TargetError: for another type, or a sliding attention window.
    """
    if text.model_type not in allowed:
        raise TargetError(
            f"{name}: text model {text.model_type!r} is not supported; one of {', '.join(allowed)}"
        )
    kinds = getattr(text, "layer_types", None) or ()
    if any("sliding" in kind for kind in kinds):
        raise TargetError(
            f"{name}: text models with a sliding attention window are not supported, because the "
            "window would count pruned tokens; load one with full attention"
        )
