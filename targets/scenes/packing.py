"""Training batches: several questions about a picture packed behind one image prefix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from targets.scenes import build, world

PACK: Final = 44
"""Text tokens of a pack: five questions with answers and end marks need at most 40."""
QUESTIONS: Final = 5
PREFIX: Final = 1 + world.GRID**2
IGNORE: Final = -100


@dataclass(frozen=True, slots=True)
class Packed:
    """Scenes ready for training; every tensor has the scene as its first dimension.

    Attributes:
        images: uint8 ``[S, 3, 96, 96]``.
        tokens: text ids ``[S, PACK]``, padded with 0.
        targets: next-token labels ``[S, PACK]``; only answers and end marks count, else IGNORE.
        block: which question a text token belongs to, ``[S, PACK]``, -1 for padding.
        positions: position id of each text token, restarting for every question, ``[S, PACK]``.
        asks: index of each question's last prompt token, ``[S, QUESTIONS]``, -1 if none.
        kinds: index in `world.KINDS` of each question, -1 if none.
        evidence: bool ``[S, QUESTIONS, V]``, tokens that answer each question.
        patches: dense labels ``[S, V, 3]``, see `world.patch_labels`.
    """

    images: Tensor
    tokens: Tensor
    targets: Tensor
    block: Tensor
    positions: Tensor
    asks: Tensor
    kinds: Tensor
    evidence: Tensor
    patches: Tensor

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self.images)

    def take(self, index: Tensor, device: torch.device | str = "cpu") -> Packed:
        """The scenes at these places, moved to a device."""
        return Packed(*(getattr(self, f)[index].to(device) for f in self.__slots__))


def pack(split: world.Split, start: int, count: int) -> Packed:
    """Draw and pack `count` scenes of a split, from scene number `start` on."""
    ids = {word: i for i, word in enumerate(build.vocabulary())}
    rows = [_pack_one(world.scene(split, start + i), ids) for i in range(count)]
    columns = zip(*rows, strict=True)
    return Packed(*(torch.from_numpy(np.stack(column)) for column in columns))


def concatenate(parts: list[Packed]) -> Packed:
    """Join packed scenes drawn in pieces."""
    return Packed(*(torch.cat([getattr(p, f) for p in parts]) for f in Packed.__slots__))


def _pack_one(one: world.Scene, ids: dict[str, int]) -> tuple[npt.NDArray[np.generic], ...]:
    tokens = np.zeros(PACK, dtype=np.int64)
    targets = np.full(PACK, IGNORE, dtype=np.int64)
    block = np.full(PACK, -1, dtype=np.int64)
    positions = np.full(PACK, PREFIX, dtype=np.int64)
    asks = np.full(QUESTIONS, -1, dtype=np.int64)
    kinds = np.full(QUESTIONS, -1, dtype=np.int64)
    evidence = np.zeros((QUESTIONS, world.GRID**2), dtype=bool)
    at = 0
    for i, q in enumerate(one.questions):
        prompt = [ids[w] for w in q.text.split()]
        answer = [ids[w] for w in q.answer.split()]
        line = [*prompt, *answer]
        end = at + len(line)
        tokens[at:end] = line
        block[at:end] = i
        positions[at:end] = PREFIX + np.arange(len(line))
        last = at + len(prompt) - 1
        targets[last:end] = [*answer, ids["</s>"]]
        asks[i], kinds[i] = last, world.KINDS.index(q.kind)
        evidence[i] = world.tokens_of(q.evidence)
        at = end
    image = np.ascontiguousarray(one.image.transpose(2, 0, 1))
    labels = world.patch_labels(one)
    return image, tokens, targets, block, positions, asks, kinds, evidence, labels
