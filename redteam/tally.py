"""Sums over clean answers, block by block, so that a data set never has to fit into memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from redteam.batching import Failure
from redteam.datasets.scoring import Scored, scored, summarise
from redteam.diagnosis import Bools, Floats, Places, jaccard
from redteam.evaluation import Asker, Reply, Shot
from reports.measurement import Overlap, Setting


@dataclass(slots=True)
class Tally:
    """What is known so far of one setting.

    Attributes:
        target: label.
        compression: label; "" for all tokens.
        method: the compression without its budget.
    """

    target: str
    compression: str
    method: str
    right: int = 0
    agrees: int = 0
    left: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    evidence: list[float] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    errors: int = 0
    error: str | None = None
    often: Floats | None = None
    grids: set[tuple[object, ...]] = field(default_factory=set)

    def add(self, asker: Asker, shots: Mapping[int, Shot], replies: Mapping[int, Any]) -> None:
        """Count the answers of a block."""
        for index, reply in replies.items():
            if isinstance(reply, Failure):
                self.fail(reply.error.message)
                continue
            self._count(asker, shots[index], reply)

    def fail(self, message: str) -> None:
        """Count a sample that could not be measured; the first message is kept."""
        self.errors += 1
        self.error = self.error or message[:500]

    def compare(self, replies: Mapping[int, Any], full: Mapping[int, Any]) -> None:
        """Count the answers that are those with all tokens."""
        for index, reply in replies.items():
            other = full.get(index)
            if isinstance(reply, Reply) and isinstance(other, Reply):
                self.agrees += reply.answer.text == other.answer.text

    def _count(self, asker: Asker, shot: Shot, reply: Reply) -> None:
        places = asker.places(shot)
        size = len(places.boxes)
        self.right += bool(reply.answer.correct)
        self.tokens.append(size)
        self.left.append(size if reply.left is None else reply.left)
        self.kept.append(size if reply.kept is None else int(reply.kept.kept.sum()))
        self.scored.append(scored(reply.answer.text, shot.sample))
        if reply.kept is None:
            return
        self._place(places, reply.kept.kept)
        evidence = asker.evidence(shot)
        # Of methods that make all their tokens anew there is nothing to be said.
        if evidence is not None and evidence.any() and reply.kept.kept.any():
            self.evidence.append(float((evidence & reply.kept.kept).sum() / evidence.sum()))

    def _place(self, places: Places, kept: Bools) -> None:
        self.grids.add((places.grid, places.size, len(places.boxes), places.plain))
        if len(self.grids) == 1:
            here = kept.astype(np.float64)
            self.often = here if self.often is None else self.often + here

    def setting(self) -> Setting:
        """The sums as a record."""
        n = len(self.tokens)
        return Setting(
            target=self.target,
            compression=self.compression,
            method=self.method,
            n=n,
            right=self.right,
            agrees=self.agrees if self.compression else None,
            left=mean(self.left),
            kept=mean(self.kept),
            tokens=mean(self.tokens),
            evidence_kept=mean(self.evidence) if self.evidence else None,
            scores=summarise(self.scored),
            errors=self.errors,
            error=self.error,
            **self._frequency(n),
        )

    def _frequency(self, n: int) -> dict[str, Any]:
        """How often each position was kept, if all pictures have one plain grid."""
        if len(self.grids) != 1 or self.often is None:
            return {}
        ((grid, _, _, plain),) = self.grids
        return {"grid": grid, "frequency": (self.often / n).round(4).tolist()} if plain else {}


@dataclass(slots=True)
class Pairs:
    """Mean Jaccard index of what two settings keep of the same pictures."""

    sums: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def add(self, kept: Mapping[str, Mapping[int, Bools]]) -> None:
        """Count a block: kept sets by setting and sample."""
        names = list(kept)
        for place, first in enumerate(names):
            for second in names[place + 1 :]:
                for index in kept[first].keys() & kept[second].keys():
                    one, other = kept[first][index], kept[second][index]
                    # Two methods that make all their tokens anew are not alike for that.
                    if one.any() and other.any():
                        found = self.sums.setdefault((first, second), [0.0, 0.0])
                        found[0] += jaccard(one, other)
                        found[1] += 1

    def overlaps(self, target: str) -> list[Overlap]:
        """The means as records."""
        return [
            Overlap(target=target, first=first, second=second, jaccard=round(total / count, 4))
            for (first, second), (total, count) in self.sums.items()
        ]


def kept_of(replies: Mapping[int, Any]) -> dict[int, Bools]:
    """What was kept of each sample that was answered under compression."""
    return {
        index: reply.kept.kept
        for index, reply in replies.items()
        if isinstance(reply, Reply) and reply.kept is not None
    }


def mean(values: Sequence[float]) -> float:
    """The mean; 0 of nothing."""
    return float(np.mean(values)) if len(values) else 0.0
