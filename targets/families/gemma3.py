"""Gemma 3: SigLIP tower, average pooling, and image tokens that see their whole block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from targets.errors import TargetError
from targets.families.gemma import GemmaFamily
from targets.preprocessing.gemma import GemmaPreprocessing
from targets.preprocessing.layout import Layout

_WHOLE = "Here is the original image {} and here are some crops to help you see better "


class Gemma3(GemmaFamily):
    """Adapter for `Gemma3ForConditionalGeneration`.

    A visual token is the mean of a square of patches. Layers of two types have their own rotary
    embedding and mask. The prompt does not say which pictures are crops of another (pan and scan);
    where `preprocessing` has seen the processor, they are known by the words between them and
    belong to one picture, with one budget. Otherwise each crop counts as a picture. (A picture
    without crops that stands one space behind one with crops reads like another crop of it.)

    Raises:
        TargetError: for a tower, text model or attention implementation it is not written for.
    """

    model_types: ClassVar[tuple[str, ...]] = ("gemma3",)
    texts: ClassVar[tuple[str, ...]] = ("gemma3_text",)
    why_whole: ClassVar[str] = (
        "a token of gemma3 is the mean of a square of patches of a whole grid"
    )

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - transformers is untyped
        super().__init__(model)
        if self.text.config.use_bidirectional_attention:
            raise TargetError(
                "gemma3: use_bidirectional_attention is set; an encoder gives no answers, load a "
                "model that generates"
            )
        self._picture: str | None = None
        self._gaps: tuple[list[int], list[int]] | None = None

    def _token_grid(self) -> tuple[int, int]:
        side = int(self.model.config.mm_tokens_per_image**0.5)
        return side, side

    # Pictures -----------------------------------------------------------------------------------

    def fixed_tokens(self) -> int:
        """The grid; pictures with crops have several."""
        return 0 if self._gaps is not None else super().fixed_tokens()

    def preprocessing(self, processor: Any) -> GemmaPreprocessing:  # noqa: ANN401 - untyped
        """One square, and crops with pan and scan; also learns how a picture is written."""
        made = super().preprocessing(processor)
        self._picture = getattr(processor, "full_image_sequence", None)
        self._gaps = None
        if made.scan is not None and self._picture is not None:
            self._gaps = self._gaps_of(processor.tokenizer)
        return made

    def expand(self, text: str, image: str, layout: Layout) -> str:
        """The picture, or the words around it and its crops, as the processor writes them."""
        if self._picture is None:
            raise TargetError(
                "gemma3: how a picture is written is not known yet; call preprocessing with the "
                "model's processor first"
            )
        return text.replace(image, self._written(len(layout.shapes) - 1))

    def _written(self, crops: int) -> str:
        if not crops:
            return str(self._picture)
        return _WHOLE.format(self._picture) + " ".join([str(self._picture)] * crops)

    def _gaps_of(self, tokenizer: Any) -> tuple[list[int], list[int]]:  # noqa: ANN401
        """Ids between a picture and its first crop, and between two crops."""
        ids = tokenizer(self._written(2), add_special_tokens=False)["input_ids"]
        runs = _runs(torch.tensor(ids) == self.image_token_id)
        (_, first), (second, third), (fourth, _) = runs
        return ids[first:second], ids[third:fourth]

    def images(self, placeholders: Tensor, inputs: dict[str, Any]) -> Sequence[Layout]:
        """One grid for each picture, and for each of its crops."""
        grids = super().images(placeholders, inputs)
        ids = inputs.get("input_ids")
        if self._gaps is None or ids is None:
            return grids
        found: list[Layout] = []
        for row, hits in zip(ids.tolist(), placeholders, strict=True):
            found += [tiled(grids[0], tiles) for tiles in self._tiles(row, _runs(hits))]
        return found

    def _tiles(self, ids: list[int], runs: list[tuple[int, int]]) -> list[int]:
        """Runs of the tower of each picture in a row."""
        tiles: list[int] = []
        if self._gaps is None:
            return [1] * len(runs)
        for number, (start, _) in enumerate(runs):
            gap = ids[runs[number - 1][1] : start] if number else None
            crop = gap == self._gaps[0] or (bool(tiles) and tiles[-1] > 1 and gap == self._gaps[1])
            if crop:
                tiles[-1] += 1
            else:
                tiles.append(1)
        return tiles

    def extras(self, ids: Tensor, mask: Tensor, answers: int | None = None) -> dict[str, Tensor]:
        """Token types: 1 for image tokens, which see their whole block."""
        del mask
        return {"token_type_ids": (ids == self.image_token_id).long()}

    # Projector and language model ---------------------------------------------------------------

    def project_tokens(self, features: Tensor) -> Tensor:
        """The mean over the patches of a token, normalised and projected."""
        rows, columns = self.grid
        patches = self.patches**2 // (rows * columns)
        pooled = features.unflatten(-1, (patches, -1)).mean(-2)  # type: ignore[no-untyped-call]
        normed = self.projector.mm_soft_emb_norm(pooled)
        projected: Tensor = normed @ self.projector.mm_input_projection_weight
        return projected.type_as(features)

    def text_softcap(self, layer: int) -> float | None:
        """None: Gemma 3 has the option but does not use it."""
        del layer
        return None

    def rope(self, hidden: Tensor, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """From the table of the layer's type."""
        cosine, sine = self.text.rotary_emb(hidden, positions, self.layer_type(layer))
        return cosine, sine


def tiled(grid: Layout, tiles: int) -> Layout:
    """A picture of several tiles of one grid, the whole first; the boxes are those of the grid."""
    if tiles == 1:
        return grid
    count = grid.tokens * tiles
    return Layout(
        boxes=grid.boxes.repeat(tiles, 1),
        tile=torch.arange(tiles).repeat_interleave(grid.tokens),
        row=grid.row.repeat(tiles),
        column=grid.column.repeat(tiles),
        shapes=grid.shapes * tiles,
        base=0,
        columns=torch.arange(count),
        placeholders=count,
    )


def _runs(hits: Tensor) -> list[tuple[int, int]]:
    """First column of each run of True, and the one behind it."""
    steps = torch.diff(torch.nn.functional.pad(hits.long(), (1, 1)))
    starts, ends = (steps == 1).nonzero().flatten(), (steps == -1).nonzero().flatten()
    return list(zip(starts.tolist(), ends.tolist(), strict=True))
