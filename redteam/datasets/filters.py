"""The two published filters: samples on which an attack can show something."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from redteam.datasets.base import Sample, Samples

Filter = Literal["sighted", "clean_right"]
"""``clean_right``: right at full tokens. ``sighted``: that, and wrong on a black image, so that the
answer comes from the picture and not from the question alone."""


def why_left_out(rule: Filter, clean: bool, black: bool | None = None) -> str:
    """Why a filter leaves a sample out; "" if it keeps it.

    Args:
        rule: the filter.
        clean: whether the answer on the clean image, at full tokens, is right.
        black: whether it is right on a black image; None where the rule does not ask.

    Raises:
        ValueError: if the rule needs the answer on a black image, and there is none.
    """
    if not clean:
        return "wrong at full tokens"
    if rule == "clean_right":
        return ""
    if black is None:
        raise ValueError("the filter sighted needs the answer on a black image")
    return "right on a black image" if black else ""


@dataclass(frozen=True, slots=True)
class Kept:
    """Samples without those that were left out; see `redteam.datasets.base.Samples`.

    Attributes:
        samples: all of them.
        indices: of those that are kept, ascending.
    """

    samples: Samples
    indices: tuple[int, ...]

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the kept samples, in order."""
        every = self.samples.ids
        return tuple(every[index] for index in self.indices)

    @property
    def identity(self) -> str:
        """That of all samples: the filter is part of the scenario."""
        return self.samples.identity

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[self.indices[index]]

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


def without(samples: Samples, left_out: Collection[str]) -> Kept:
    """The samples but for those whose ids are given."""
    return Kept(samples, tuple(i for i, name in enumerate(samples.ids) if name not in left_out))
