"""All visual tokens removed at a layer: the lower bound, and the test of where they count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge

from targets.compression.base import Compressor, Cut, Scores, Seen, Stage


@dataclass(frozen=True, kw_only=True)
class DropAll(Compressor):
    """Remove every visual token at the input of layer K; what is left is what text has taken in.

    Paper: Lin et al., "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for
    Rapid Inference" (AAAI 2025, arXiv 2405.05803). With K = 0 the model never sees the picture.

    Args:
        layer: K, 0-based; layers 0 … K−1 see all tokens.
        positions: ``keep`` leaves the position ids of the text behind the image as they are.

    *Differs from the paper in …*: K is given, not found by the divergence of the answers;
    `targets.evidence.find_horizon` finds it by the answer's probability.
    """

    name: ClassVar[str] = "drop_all"

    layer: Annotated[int, Ge(0)]
    positions: Literal["keep", "reindex"] = "keep"
    # It has no budget; the base asks for both names.
    retention: ClassVar[None] = None  # type: ignore[misc]
    keep_tokens: ClassVar[None] = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        """There is no budget to check."""

    @property
    def stage(self) -> Stage:
        """Inside the language model."""
        return Stage.LAYER

    @property
    def prunes_at(self) -> int:
        """K."""
        return self.layer

    def budget(self, tokens: int) -> int:
        """None."""
        del tokens
        return 0

    def count(self, cut: Cut, tokens: int, layers: int) -> int:
        """None."""
        del cut, tokens, layers
        return 0

    def score(self, seen: Seen) -> Scores:
        """Nothing is ranked: zero for all, ``[I, V]``."""
        zero = torch.zeros_like(seen.features[..., 0], dtype=torch.float32)
        return Scores(zero, zero)
