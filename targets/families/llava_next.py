"""LLaVA-NeXT: LLaVA-1.5 on the tiles of a picture, their tokens packed row by row."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from targets.compression.base import Compressor
from targets.errors import CompressionError, TargetError
from targets.families.base import Family
from targets.families.llava import Llava
from targets.families.vision import FeaturesReached, LayerPass, VisionPass, padded
from targets.preprocessing.anyres import PackedLayout, Packing
from targets.preprocessing.layout import Layout, Preprocessing
from targets.preprocessing.llava_next import LlavaNextPreprocessor

_ENCODED: Final = "get_image_features"


@dataclass(frozen=True, slots=True)
class MixedPass(VisionPass):
    """A pass some of whose tokens are mixed from several patches with unequal weights.

    Attention, keys, hidden states and features of a token are the weighted mean of its patches'.
    The model mixes behind the projector, so mixed features are not what makes the token. [inferred]

    Attributes:
        weights: ``[I, V, r]``, how much of each patch; rows of tokens sum to 1.
    """

    weights: Tensor = field(kw_only=True)

    def per_token(self, values: Tensor) -> Tensor:
        """Values ``[G, P, …]`` of patches, mixed by token: ``[I, V, 1, …]``."""
        found = values.flatten(0, 1)[self.patches_of]
        weights = self.weights.to(found).view(*self.weights.shape, *(1,) * (found.dim() - 3))
        return (found * weights).sum(2, keepdim=True)


class LlavaNext(Llava):
    """Adapter for `LlavaNextForConditionalGeneration`.

    A picture is one view of the whole and tiles of it, each a run of the tower. Row separators
    (newlines) are placeholders without a token: they are never ranked.

    Raises:
        TargetError: for a tower, text model or feature selection it has not been written for.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_next",)
    why_whole: ClassVar[str] = (
        "tiles are put together by the place of each patch, their padding cut off and their rows "
        "separated"
    )

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - transformers is untyped
        super().__init__(model)
        self.encoder = None
        self.packing = Packing.of(model.config)
        self._mixes = False

    def fixed_tokens(self) -> int:
        """0: it depends on the picture."""
        return 0

    def refuses(self, compressor: Compressor) -> str | None:
        """Whatever shortens the tower from inside: tiles are packed by their full grids."""
        return Family.refuses(self, compressor)

    # Pictures -----------------------------------------------------------------------------------

    def preprocessing(self, processor: Any) -> Preprocessing:  # noqa: ANN401 - untyped
        """A view of the whole picture and tiles of it."""
        return LlavaNextPreprocessor.of(processor.image_processor, self.model.config)

    def images(self, placeholders: Tensor, inputs: dict[str, Any]) -> Sequence[Layout]:
        """Layouts by the sizes of the pictures, which `generate` keeps to itself (`attach`)."""
        given = self._sizes(inputs)
        sizes = given.get("image_sizes")
        if sizes is None:
            if bool(placeholders.any()):
                raise TargetError(
                    f"{self.model_types[0]}: image_sizes are not among the arguments, so nobody "
                    "knows how the pictures were cut; pass image_sizes beside pixel_values or "
                    "encoder outputs"
                )
            return []
        return self.layouts([(int(high), int(wide)) for high, wide in sizes.tolist()], given)

    def layouts(
        self, sizes: Sequence[tuple[int, int]], inputs: dict[str, Any]
    ) -> list[PackedLayout]:
        """Layouts of pictures of these heights and widths, in reading order."""
        del inputs
        return [self.packing.layout(size) for size in sizes]

    def _sizes(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments that say how pictures were cut: given, or noted when they were encoded."""
        if inputs.get("image_sizes") is not None:
            return inputs
        encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
        noted: dict[str, Any] = getattr(encoded, "redteam_sizes", {})
        return noted

    # Vision tower -------------------------------------------------------------------------------

    def arrange(
        self, captured: dict[int, LayerPass], layouts: Sequence[Layout], inputs: dict[str, Any]
    ) -> VisionPass:
        """A token is a patch of one of the tiles, or mixed from several."""
        del inputs
        hidden = captured[self.feature_layer].hidden
        patches = hidden.shape[1] - int(self.has_cls)
        runs = [len(one.shapes) for one in layouts]
        if sum(runs) != len(hidden):
            raise TargetError(
                f"{self.model_types[0]}: the vision tower ran on {len(hidden)} tiles, but the "
                f"pictures have {runs} of them"
            )
        parts, weights, base, before = [], [], [], 0
        width = max(_packed(one).patches.shape[1] for one in layouts)
        for one in map(_packed, layouts):
            pad = (0, width - one.patches.shape[1])
            places = torch.nn.functional.pad(one.patches, pad).to(hidden.device)
            parts.append(places + before * patches)
            weights.append(torch.nn.functional.pad(one.weights, pad).to(hidden.device))
            base.append(before + one.base)
            before += len(one.shapes)
        places, present = padded(parts)
        runs_of_base = torch.tensor(base, device=hidden.device)
        common = (captured, self.feature_layer, self.scaling, self.has_cls)
        self._mixes = False
        if width == 1:
            return VisionPass(*common, places, present, runs_of_base)
        self._mixes = True
        mixed, _ = padded(weights)
        return MixedPass(*common, places, present, runs_of_base, weights=mixed)

    def project_tokens(self, features: Tensor) -> Tensor:
        """Through the two-layer perceptron, for tokens that are not mixed behind it.

        Raises:
            CompressionError: for pictures whose tokens are.
        """
        if self._mixes:
            raise CompressionError(
                f"{self.model_types[0]}: a picture has more tokens than the model's limit "
                f"({self.packing.limit} tiles' worth), so the model interpolates them behind the "
                "projector; tokens merged before the projector would not be the model's. Use "
                "smaller pictures, or a method that does not merge or acts at the language model"
            )
        return super().project_tokens(features)

    def run_tower(self, inputs: dict[str, Tensor]) -> Any:  # noqa: ANN401 - of transformers
        """The tower alone, on the tiles that are no filling."""
        given = self.cast(inputs)
        tiles = given["pixel_values"]
        if tiles.dim() == 5:
            counts = [len(one.shapes) for one in self._given_layouts(inputs)]
            tiles = torch.cat([row[:n] for row, n in zip(tiles, counts, strict=True)])
        return self.tower(tiles)

    def encoded(self, inputs: dict[str, Tensor]) -> Any:  # noqa: ANN401 - of transformers
        """Runs the tower no further than the feature layer; the model packs."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        tap = self.tap(stop=True)
        with tap, contextlib.suppress(FeaturesReached):
            self.run_tower(inputs)
        captured = tap.latest
        if captured is None:
            raise TargetError("the vision tower ran without passing its feature layer")
        hidden = captured[self.feature_layer].hidden
        projected = self.projector(hidden[:, 1:] if self.has_cls else hidden)
        counts = [len(one.shapes) for one in self._given_layouts(inputs)]
        packed = self.pack(projected.split(counts), inputs["image_sizes"])
        return _noted(BaseModelOutputWithPooling(pooler_output=packed), inputs)

    def note(self, encoded: Any, inputs: Mapping[str, Any]) -> None:  # noqa: ANN401
        """How the pictures were cut."""
        _noted(encoded, inputs)

    def pack(self, features: Sequence[Tensor], sizes: Tensor) -> Any:  # noqa: ANN401
        """Projected features ``[tiles, P, D]`` of each picture as one row of tokens each."""
        packed, _ = self.core.pack_image_features(
            features,
            sizes,
            vision_feature_select_strategy=self.model.config.vision_feature_select_strategy,
            image_newline=self.core.image_newline,
        )
        return packed

    def _given_layouts(self, inputs: dict[str, Any]) -> list[PackedLayout]:
        sizes = [(int(high), int(wide)) for high, wide in inputs["image_sizes"].tolist()]
        return self.layouts(sizes, inputs)

    def attach(self, current: Any) -> Sequence[Any]:  # noqa: ANN401 - a function without arguments
        """`generate` encodes pictures first and then forgets their sizes: note them."""
        del current
        return (_Noting(self.core),)


class _Noting:
    """Notes the sizes of pictures on what a model encodes them to, until removed."""

    def __init__(self, core: Any) -> None:  # noqa: ANN401 - transformers is untyped
        self._core = core
        self._before = core.__dict__.get(_ENCODED)
        original: Callable[..., Any] = getattr(core, _ENCODED)

        @functools.wraps(original)  # `generate` looks at the signature
        def encode(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            names = ("pixel_values", "image_sizes")
            return _noted(original(*args, **kwargs), {**dict(zip(names, args)), **kwargs})  # noqa: B905

        core.__dict__[_ENCODED] = encode

    def remove(self) -> None:
        """Leave the model as it was."""
        if self._before is None:
            self._core.__dict__.pop(_ENCODED, None)
        else:
            self._core.__dict__[_ENCODED] = self._before


def _noted(encoded: Any, inputs: Mapping[str, Any]) -> Any:  # noqa: ANN401 - of transformers
    """Encoder output that remembers how its pictures were cut."""
    names = ("image_sizes", "batch_num_images")
    encoded.redteam_sizes = {name: inputs[name] for name in names if inputs.get(name) is not None}
    return encoded


def _packed(layout: Layout) -> PackedLayout:
    if not isinstance(layout, PackedLayout):
        raise TargetError(
            "a layout of tiles does not say which patches its tokens are made of; take it from "
            "the family's preprocessing"
        )
    return layout
