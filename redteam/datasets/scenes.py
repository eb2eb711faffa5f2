"""The drawn scenes the embedded LVLM was trained on; its test split was never trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Interval

from redteam.datasets.base import Sample


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Drawn scenes with questions and exact ground truth; nothing is downloaded.

    Args:
        split: disjoint streams of scenes; report on ``test``, tune on ``validation``.
        samples: number of questions; in multiples of five the kinds are balanced.
        start: number of the first scene, to continue where another run ended.
        filter: keep what every target gets right at full tokens (clean_right), and of these what
            it gets wrong on a black image (sighted); null keeps all.
    """

    name: ClassVar[str] = "scenes"

    split: Literal["train", "validation", "test"] = "test"
    samples: Annotated[int, Interval(ge=1, le=100_000)] = 64
    start: Annotated[int, Ge(0)] = 0
    filter: Literal["sighted", "clean_right"] | None = None

    def open(self) -> Drawn:
        """Draw all scenes; hundreds a second."""
        from targets.scenes import world

        choices = {
            "exists": ("yes", "no"),
            "colour": tuple(world.COLOURS),
            "shape": world.SHAPES,
            "count": world.NUMBERS,
        }
        return Drawn(
            tuple(
                Sample(
                    id=one.id,
                    image_id=one.image_id,
                    image=one.image,
                    question=one.question,
                    answer=one.answer,
                    kind=one.kind,
                    evidence=one.evidence,
                    choices=choices.get(one.kind, ()),
                )
                for one in world.samples(self.split, self.samples, start=self.start)
            )
        )


class Drawn:
    """Samples in memory; see `redteam.datasets.base.Samples`."""

    def __init__(self, samples: tuple[Sample, ...]) -> None:
        self._samples = samples

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of all samples, in order."""
        return tuple(sample.id for sample in self._samples)

    @property
    def identity(self) -> str:
        """Hash over pictures, questions and answers: another numpy may draw other noise."""
        total = hashlib.sha256()
        for one in self._samples:
            total.update(f"{one.id}\0{one.question}\0{one.answer}\0".encode())
            total.update(one.image.tobytes())
        return total.hexdigest()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)
