"""Scores of shifted pictures, each ranked by itself and moved back by the middle of two tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tiny
import torch
from torch import Tensor

from defenses.translation_consensus import translated
from targets.base import Knowledge
from targets.compression.base import Compressor
from targets.lvlm import LVLM


def shifted_scores(
    target: LVLM, plain: Compressor, images: Tensor, questions: Sequence[str]
) -> list[Tensor]:
    """``[B, V]`` for no shift, half a token right, half a token down, and both."""
    view: Any = target.view(Knowledge.COMPRESSED, plain)
    side, half = 6, tiny.PATCH // 2
    found = []
    for down, right in ((0, 0), (0, half), (half, 0), (half, half)):
        moved = torch.stack([translated(image, down, right) for image in images])
        score = view.rank(moved, questions).score.view(len(images), side, side)
        if down:
            score = (score + torch.cat([score[:, 1:], score[:, -2:-1]], 1)) / 2
        if right:
            score = (score + torch.cat([score[:, :, 1:], score[:, :, -2:-1]], 2)) / 2
        found.append(score.flatten(1))
    return found
