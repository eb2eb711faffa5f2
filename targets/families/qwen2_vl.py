"""Qwen2-VL, and what it shares with Qwen2.5-VL and Qwen3-VL.

Pictures keep their size: the tower takes the patches of all of them as one packed sequence, and a
merger makes one token of every 2 × 2 patches. Tokens have three position ids (time, row, column).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from targets.errors import TargetError
from targets.families.base import Family
from targets.families.packed import PackedPass, PackedTap
from targets.families.vision import LayerPass, VisionPass, VisionTap, padded
from targets.preprocessing import Layout, Preprocessing
from targets.preprocessing.qwen_vl import QwenPreprocessor

_AXES: Final = 3
"""Time, row and column: the position ids of one token."""
_SUITS: Final = 8
"""Tokens along the side of a picture that suits the model, which takes any."""
_NOTE: Final = "redteam_grids"
"""Attribute of encoder outputs that holds the grids of their pictures."""


class QwenVL(Family):
    """What the adapters of Qwen2-VL, Qwen2.5-VL and Qwen3-VL share.

    The towers have no CLS; attention is the mean a patch receives from all patches of its picture,
    and that of a token the mean over its four patches [inferred].

    Under ``reindex`` the kept tokens get consecutive position ids, the same on all three axes, as
    text has them; rows and columns of the picture are lost to the language model then [inferred].

    Raises:
        TargetError: for a text model with a sliding window.
    """

    any_size: ClassVar[bool] = True
    why_whole: ClassVar[str] = (
        "all pictures run through it in one row, with positions by row and column, and each square "
        "of neighbouring patches is merged into one token"
    )

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - transformers is untyped
        config = model.config
        kinds = getattr(config.text_config, "layer_types", None) or ()
        if "sliding_attention" in kinds:
            raise TargetError(
                f"{config.model_type}: text models with a sliding attention window are not "
                "supported, because the window would count pruned tokens; load one with "
                "use_sliding_window false"
            )
        self.model, self.core = model, model.model
        self.tower, self.projector = self.core.visual, self.core.visual.merger
        self.text, self.layers = self.core.language_model, self.core.language_model.layers
        self.image_token_id = int(config.image_token_id)
        self.merge = int(config.vision_config.spatial_merge_size)
        side = _SUITS * self.merge * int(config.vision_config.patch_size)
        self.image_size = (side, side)
        self.tower_depth = len(self.tower.blocks)
        self.feature_layer = self.tower_depth - 1

    # Pictures -----------------------------------------------------------------------------------

    def preprocessing(self, processor: Any) -> Preprocessing:  # noqa: ANN401 - untyped
        """Smart resize and flat patches."""
        return QwenPreprocessor.of(processor.image_processor, self.model.config.vision_config)

    def images(self, placeholders: Tensor, inputs: dict[str, Any]) -> Sequence[Layout]:
        """Every picture has its own grid of tokens, in ``image_grid_thw``."""
        kind = self.model.config.model_type
        if inputs.get("pixel_values_videos") is not None:
            raise TargetError(
                f"{kind}: videos are not supported under compression; give still pictures"
            )
        if not bool(placeholders.any()):
            return []
        grids = self._grids(inputs)
        layouts = [Layout.grid(shape) for shape in grids]
        wanted, found = sum(one.tokens for one in layouts), int(placeholders.sum())
        if wanted != found:
            raise TargetError(
                f"{kind}: image_grid_thw asks for {wanted} image placeholders (token grids "
                f"{grids}), the prompts have {found}"
            )
        return layouts

    def _grids(self, inputs: dict[str, Any]) -> list[tuple[int, int]]:
        """Rows and columns of tokens of each picture."""
        grids = inputs.get("image_grid_thw")
        if grids is None:
            encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
            grids = getattr(encoded, _NOTE, None)
        if grids is None:
            raise TargetError(
                f"{self.model.config.model_type}: the model was called without image_grid_thw, so "
                "it is unknown how many tokens each image has; pass it along with the pixel_values "
                "or encoder outputs"
            )
        return [
            (int(rows) // self.merge, int(columns) // self.merge)
            for _, rows, columns in grids.tolist()
        ]

    def extras(self, ids: Tensor, mask: Tensor, answers: int | None = None) -> dict[str, Tensor]:
        """Which tokens are pictures, from which the model counts its position ids."""
        del mask
        return {"mm_token_type_ids": (ids == self.image_token_id).int()}

    # Vision tower -------------------------------------------------------------------------------

    def note(self, encoded: Any, inputs: Mapping[str, Any]) -> None:  # noqa: ANN401
        """The grids of the pictures."""
        setattr(encoded, _NOTE, inputs["image_grid_thw"])

    def tap(self, layers: Sequence[int] = (), *, stop: bool = False) -> VisionTap:
        """Hooks at the last block and others."""
        wanted = sorted({self.feature_layer, *layers})
        return PackedTap(self.tower, {n: self.tower.blocks[n] for n in wanted}, stop=stop)

    def arrange(
        self, captured: dict[int, LayerPass], layouts: Sequence[Layout], inputs: dict[str, Any]
    ) -> VisionPass:
        """A token is the patches that follow one another, merge² of them."""
        del inputs
        device = captured[self.feature_layer].hidden.device
        grids = [one.shapes[0] for one in layouts]
        order = self.token_order(grids).to(device)
        # Place in the packed sequence of the first patch of each token.
        place = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=device))
        block = self.merge**2
        patches = place[:, None] * block + torch.arange(block, device=device)
        counts = [rows * columns for rows, columns in grids]
        patches_of, present = padded(torch.split(patches, counts))
        return PackedPass(
            layers=captured,
            feature_layer=self.feature_layer,
            scaling=float(self.tower.blocks[self.feature_layer].attn.scaling),
            has_cls=False,
            patches_of=patches_of,
            present=present,
            base=torch.zeros(len(grids), dtype=torch.long, device=device),
            segments={number: self.segments(number, grids) for number in captured},
            sizes=tuple(count * block for count in counts),
        )

    def token_order(self, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Which token, counted over all pictures, stands where in the packed sequence."""
        return torch.arange(sum(rows * columns for rows, columns in grids))

    def segments(self, layer: int, grids: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """Lengths of the runs of patches that a block attends within: whole pictures."""
        del layer
        return tuple(rows * columns * self.merge**2 for rows, columns in grids)

    def project_tokens(self, features: Tensor) -> Tensor:
        """Through the merger, which joins the patches of a token."""
        patches = features.reshape(-1, features.shape[-1] // self.merge**2)
        projected: Tensor = self.projector(patches)
        return projected.view(*features.shape[:-1], -1)

    # Language model -----------------------------------------------------------------------------

    def positions(self, mask: Tensor) -> dict[str, Tensor]:
        """The model counts them from the grids."""
        del mask
        return {}

    def rope(self, hidden: Tensor, positions: Tensor, layer: int) -> Any:  # noqa: ANN401
        """Cosine and sine of position ids ``[3, B, n]``, or of ``[B, n]`` on all axes."""
        del layer
        cosine, sine = self.text.rotary_emb(hidden, position_ids=without_text(positions))
        return cosine, sine

    def attach(self, current: Any) -> Sequence[Any]:  # noqa: ANN401 - a function
        """Keeps what sessions need to know of `generate`, which hands only part of it on."""
        del current
        return [
            self.tower.register_forward_hook(_note_grids, with_kwargs=True),
            # In front of the session's own hook, whichever was installed first.
            self.text.register_forward_pre_hook(_drop_text, with_kwargs=True, prepend=True),
        ]


class Qwen2VL(QwenVL):
    """Adapter for `Qwen2VLForConditionalGeneration`.

    Raises:
        TargetError: for a text model with a sliding window.
    """

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)


def without_text(positions: Tensor) -> Tensor:
    """Position ids without the row of text positions in front of the three axes."""
    stacked = positions.dim() == _AXES and len(positions) == _AXES + 1
    return positions[1:] if stacked else positions


def _note_grids(
    module: object,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,  # noqa: ANN401 - of transformers
) -> None:
    """Write the grids onto the tower's output: `generate` encodes first and forgets them."""
    del module
    grids = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
    if not isinstance(output, tuple):
        setattr(output, _NOTE, grids)


def _drop_text(
    module: object, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Take away the row that `generate` puts above the three axes of position ids.

    It only tells packed sequences apart, which a 2-D mask does already; as it counts columns, it
    runs ahead of the axes and must not be shifted along with them.
    """
    del module
    positions = kwargs.get("position_ids")
    if positions is not None:
        kwargs = {**kwargs, "position_ids": without_text(positions)}
    return args, kwargs
