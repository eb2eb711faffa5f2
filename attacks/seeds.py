"""Random numbers that belong to a sample, not to the batch it happens to be in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class SeedBank:
    """One generator per sample; every draw has the samples first, ``[B, *shape]``.

    Numbers are drawn on the CPU and then moved, so that a sample's numbers are the same on every
    device and in every batch.

    Args:
        seeds: one seed per sample, non-negative integers below 2**63.
        device: where the drawn tensors live.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seeds = tuple(int(seed) for seed in seeds)
        self.device = torch.device(device)
        self._generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]

    def __len__(self) -> int:
        return len(self.seeds)

    def uniform(self, shape: Sequence[int], low: float = 0.0, high: float = 1.0) -> Tensor:
        """Float32 ``[B, *shape]``, uniform in [low, high)."""
        draw = self._draw(lambda generator: torch.rand(tuple(shape), generator=generator))
        return draw * (high - low) + low

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Float32 ``[B, *shape]``, standard normal."""
        return self._draw(lambda generator: torch.randn(tuple(shape), generator=generator))

    def signs(self, shape: Sequence[int]) -> Tensor:
        """Float32 ``[B, *shape]`` of −1 and +1, equally likely."""
        return self._draw(
            lambda generator: torch.randint(0, 2, tuple(shape), generator=generator).float() * 2 - 1
        )

    def child(self, label: str) -> SeedBank:
        """A bank of its own for one purpose, the same however much this one has drawn already."""
        return SeedBank([_derive(seed, label) for seed in self.seeds], self.device)

    def _draw(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(generator) for generator in self._generators]).to(self.device)


def _derive(seed: int, label: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{label}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
