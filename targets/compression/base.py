"""The base of all compressors: score live, select hard.

A compressor is a value: its dataclass fields are its options. Where it acts is named by `stage` and
`layer`; how it is installed in a model is the business of `targets.compression.session`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from targets.compression.scoring import top_k_mask
from targets.errors import CompressionError

if TYPE_CHECKING:
    from targets.families.vision import VisionPass


class Stage(StrEnum):
    """Where visual tokens are dropped or merged."""

    VISION = "vision"
    """Vision tower output, before the projector (S2)."""
    INPUT = "input"
    """Projected tokens, before the language model (S3)."""
    LAYER = "layer"
    """Inside the language model, at the input of a layer (S4)."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a compressor sees of I images when it ranks; every tensor is live.

    Attributes:
        features: ``[I, V, D]`` visual tokens at the ranking point.
        count: tokens to keep of each image, 1 ≤ count ≤ V.
        seeds: one per image, for compressors that draw.
        attention: ``[I, N, V]`` attention of the scoring query to the visual tokens, softmax over
            everything that query attends to; None at stages without one.
        query: ``[I, N, E]`` that query; None without one.
        keys: ``[I, N, V, E]`` keys of the visual tokens at the scoring layer.
        vision: the pass of the vision tower, at Stage.VISION.
    """

    features: Tensor
    count: int
    seeds: tuple[int, ...]
    attention: Tensor | None = None
    query: Tensor | None = None
    keys: Tensor | None = None
    vision: VisionPass | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """Importance of the visual tokens.

    Attributes:
        score: ``[I, V]``, larger is more important, live.
        log_score: ``[I, V]``, its logarithm for probabilities, else standardised.
        attends: whether the score is an attention, so that query and keys explain it.
        chosen: bool ``[I, V]``, where the method chooses while it scores; else None.
    """

    score: Tensor
    log_score: Tensor
    attends: bool = False
    chosen: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """A hard selection; can be forced upon another image, which is the swap test.

    Attributes:
        kept: bool ``[I, V]``.
        targets: ``[I, C]`` tokens that others are merged into; None without merging.
        assignment: ``[I, V]`` place in `targets` each merged token goes to, −1 for none.
    """

    kept: Tensor
    targets: Tensor | None = None
    assignment: Tensor | None = None

    def row(self, index: int) -> Selection:
        """The selection of one image, as a selection of I = 1."""
        here = slice(index, index + 1)
        targets = None if self.targets is None else self.targets[here]
        assignment = None if self.assignment is None else self.assignment[here]
        return Selection(self.kept[here], targets, assignment)

    @staticmethod
    def stack(rows: Sequence[Selection]) -> Selection:
        """Selections of several images as one.

        Raises:
            CompressionError: if only some of them merge, or they merge into different numbers.
        """
        kept = torch.cat([row.kept for row in rows])
        targets = [row.targets for row in rows if row.targets is not None]
        assignment = [row.assignment for row in rows if row.assignment is not None]
        if not targets and not assignment:
            return Selection(kept)
        widths = {t.shape[1] for t in targets}
        if len(targets) != len(rows) or len(assignment) != len(rows) or len(widths) != 1:
            raise CompressionError(
                "these selections cannot be stacked: they merge tokens into different numbers of "
                f"targets ({sorted(widths)}); take them from one compressor"
            )
        return Selection(kept, torch.cat(targets), torch.cat(assignment))


@dataclass(frozen=True, slots=True)
class Merged:
    """Tokens as a merging compressor hands them to the projector.

    Attributes:
        features: ``[I, S, D]``.
        valid: bool ``[I, S]``; rows with fewer tokens end in False.
        source: ``[I, S]`` visual token whose place in the image each one has.
        dominant: bool ``[I, S]``, tokens taken over as they are because of their own score.
    """

    features: Tensor
    valid: Tensor
    source: Tensor
    dominant: Tensor


class Compressor(ABC):
    """Base of all compressors. Subclasses are ``@dataclass(frozen=True, kw_only=True)``.

    Attributes:
        name: the technique.
        stage: where it acts; a property where that is an option.
        retention: kept ÷ all, in (0, 1]; None if `keep_tokens` is given.
        keep_tokens: tokens kept of each image, ≥ 1; None if `retention` is given.
        positions: ``keep`` the position ids tokens had, or ``reindex`` them without gaps.

    Raises:
        CompressionError: unless exactly one of retention and keep_tokens is given, in its range.
    """

    name: ClassVar[str]
    retention: float | None
    keep_tokens: int | None

    @property
    @abstractmethod
    def stage(self) -> Stage:
        """Where it acts."""

    @property
    def prunes_at(self) -> int | None:
        """Language-model layer at whose input tokens are dropped; None before the model."""
        return None

    @property
    def looks_at(self) -> int | None:
        """Language-model layer at whose input it ranks; None before the model."""
        return self.prunes_at

    @property
    def attends(self) -> bool:
        """Whether it needs the attention at the ranking point."""
        return False

    @property
    def reindexes(self) -> bool:
        """Whether kept tokens get new position ids without gaps."""
        return getattr(self, "positions", "keep") == "reindex"

    @property
    def merges(self) -> bool:
        """Whether it also makes new tokens (`merge`)."""
        return False

    def __post_init__(self) -> None:
        """Check the budget; subclasses that extend this call it first."""
        given = {"retention": self.retention, "keep_tokens": self.keep_tokens}
        if (self.retention is None) == (self.keep_tokens is None):
            raise CompressionError(
                f"compressor {self.name}: give exactly one of retention (kept ÷ all, in (0, 1]) "
                f"and keep_tokens (a count, at least 1), not {given}"
            )
        if self.retention is not None and not 0 < self.retention <= 1:
            raise CompressionError(
                f"compressor {self.name}: retention is {self.retention!r}; it is the share of "
                "tokens kept, in (0, 1]"
            )
        if self.keep_tokens is not None and self.keep_tokens < 1:
            raise CompressionError(
                f"compressor {self.name}: keep_tokens is {self.keep_tokens!r}; keep at least 1"
            )

    def budget(self, tokens: int) -> int:
        """Tokens kept of an image that has `tokens`; at least 1.

        Raises:
            CompressionError: if keep_tokens is more than there are.
        """
        if self.keep_tokens is None:
            return max(1, round((self.retention or 1.0) * tokens))
        if self.keep_tokens > tokens:
            raise CompressionError(
                f"compressor {self.name}: keep_tokens is {self.keep_tokens}, but an image has "
                f"{tokens} visual tokens"
            )
        return self.keep_tokens

    @abstractmethod
    def score(self, seen: Seen) -> Scores:
        """Rank the visual tokens, differentiably where the method allows it."""

    def select(self, scores: Scores, seen: Seen) -> Selection:
        """Choose hard: the `seen.count` best of each image unless the method says otherwise."""
        kept = scores.chosen if scores.chosen is not None else top_k_mask(scores.score, seen.count)
        return self.complete(kept, seen)

    def complete(self, kept: Tensor, seen: Seen) -> Selection:
        """A selection around a given kept set, bool ``[I, V]``."""
        del seen
        return Selection(kept)

    def merge(self, selection: Selection, seen: Seen) -> Merged:
        """Tokens for the projector; only compressors at Stage.VISION that merge have this."""
        del selection, seen
        raise CompressionError(f"compressor {self.name} does not merge tokens")
