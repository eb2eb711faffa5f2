"""LLaVA-OneVision on pictures: a SigLIP tower on tiles, large grids interpolated down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from targets.errors import TargetError
from targets.families.llava_next import LlavaNext
from targets.preprocessing.anyres import PackedLayout
from targets.preprocessing.layout import Layout, Preprocessing
from targets.preprocessing.llava_onevision import LlavaOnevisionPreprocessor


class LlavaOnevision(LlavaNext):
    """Adapter for `LlavaOnevisionForConditionalGeneration`; no videos.

    A picture that is the only one of its prompt is cut into tiles; of several each is one tile.
    Grids of more than the model's limit of tokens are interpolated behind the projector: a token
    is then mixed from up to four patches, and its scores are mixed with the same weights.
    [inferred]

    Raises:
        TargetError: for a tower, text model or feature selection it has not been written for.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    why_whole: ClassVar[str] = (
        "tiles are put together by the place of each patch and interpolated as one picture"
    )

    def preprocessing(self, processor: Any) -> Preprocessing:  # noqa: ANN401 - untyped
        """A view of the whole picture and tiles of it."""
        return LlavaOnevisionPreprocessor.of(processor.image_processor, self.model.config)

    def images(self, placeholders: Tensor, inputs: dict[str, Any]) -> Sequence[Layout]:
        """Layouts by the sizes of the pictures; see `LlavaNext.images`."""
        encoded = inputs.get("mm_encoder_outputs") or {}
        if inputs.get("pixel_values_videos") is not None or encoded.get("video") is not None:
            raise TargetError("llava_onevision: videos are not supported; pass pictures only")
        return super().images(placeholders, inputs)

    def layouts(
        self, sizes: Sequence[tuple[int, int]], inputs: dict[str, Any]
    ) -> list[PackedLayout]:
        """Layouts of pictures of these heights and widths, in reading order."""
        prompts = inputs.get("batch_num_images")
        counts = [1] * len(sizes) if prompts is None else prompts.tolist()
        alone = [count == 1 for count in counts for _ in range(count)]
        return [
            self.packing.layout(size) if whole else self.packing.single(size)
            for size, whole in zip(sizes, alone, strict=True)
        ]

    def pack(self, features: Sequence[Tensor], sizes: Tensor) -> Any:  # noqa: ANN401
        """Projected features ``[tiles, P, D]`` of each picture as one row of tokens each."""
        packed, _ = self.core.pack_image_features(
            features,
            sizes,
            image_newline=self.core.image_newline,
            vision_aspect_ratio=self.model.config.vision_aspect_ratio,
        )
        return packed
