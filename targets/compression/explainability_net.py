"""The small convolutional network that compression by explainability ranks with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from targets.compression.scoring import TINY

CHANNELS: Final = (32, 64, 128, 256, 512)
"""Of the paper."""
_FLOOR: Final = 0.05
"""Of the mean attention: what is below makes little difference."""


class RelevanceNet(nn.Module):
    """Five depthwise-separable 1-D convolutions from attention to a distribution over tokens.

    Args:
        channels: output channels of each convolution.
        kernel: places each one sees, odd.
    """

    def __init__(self, channels: Sequence[int] = CHANNELS, kernel: int = 7) -> None:
        super().__init__()
        widths = [1, *channels]
        pairs = list(itertools.pairwise(widths))
        self.across = nn.ModuleList(
            nn.Conv1d(before, before, kernel, padding=kernel // 2, groups=before)
            for before, _ in pairs
        )
        self.point = nn.ModuleList(nn.Linear(before, after) for before, after in pairs)
        # Behind the first convolution each place is one number, of which a norm leaves the sign.
        self.norm = nn.ModuleList(
            nn.LayerNorm(width) if place else nn.Identity() for place, width in enumerate(channels)
        )
        self.head = nn.Linear(widths[-1], 1)

    def forward(self, attention: Tensor, valid: Tensor) -> Tensor:
        """Logarithm of the distribution.

        Args:
            attention: ``[I, V]``, not negative.
            valid: bool ``[I, V]``, places that count; at least one in each row.

        Returns:
            ``[I, V]`` log-probabilities, 0 where not valid.
        """
        there = valid[..., None].to(attention.dtype)
        number = valid.sum(1, keepdim=True).clamp_min(1)
        attention = attention.masked_fill(~valid, 0)
        # How much attention goes to text and start token differs between models and prompts.
        mean = attention.sum(1, keepdim=True) / number
        values = (attention / mean.clamp_min(TINY) + _FLOOR).log()[..., None]
        for across, point, norm in zip(self.across, self.point, self.norm, strict=True):
            # Absent places are zero, as beyond the ends of the row: padding changes nothing.
            values = across((values * there).transpose(1, 2)).transpose(1, 2)
            values = nn.functional.gelu(norm(point(values)))
        logits = self.head(values)[..., 0].masked_fill(~valid, torch.finfo(values.dtype).min)
        logs: Tensor = logits.log_softmax(1).masked_fill(~valid, 0)
        return logs
