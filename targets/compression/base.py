"""The base of all compressors: score live, select hard, merge where the method makes new tokens.

A compressor is a value: its dataclass fields are its options. Where it acts is named by its cuts;
how they are installed in a model is the business of `targets.compression.session`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from targets.compression.scoring import top_k_mask
from targets.errors import CompressionError

if TYPE_CHECKING:
    from targets.base import Ranking
    from targets.compression.layout import Lattice
    from targets.compression.sight import TextSight
    from targets.families.base import Family
    from targets.families.vision import VisionPass
    from targets.preprocessing import Layout


class Stage(StrEnum):
    """Where visual tokens are dropped or merged."""

    PIXELS = "pixels"
    """The picture itself, before the processor (S0)."""
    TOWER = "tower"
    """Inside the vision tower, which then gives fewer tokens (S1)."""
    VISION = "vision"
    """Vision tower output, before the projector (S2)."""
    INPUT = "input"
    """Projected tokens, before the language model (S3)."""
    LAYER = "layer"
    """Inside the language model, at the input of a layer (S4)."""
    ATTENTION = "attention"
    """Inside attention layers; the sequence stays as long as it is (S5)."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One point at which a compressor looks at the tokens, and usually drops some.

    Attributes:
        stage: VISION, INPUT or LAYER.
        layer: language-model layer whose input is shortened; None before the model.
        looks_at: language-model layer at whose input it ranks; ≤ layer. None is `layer`.
        attends: whether `Seen.attention`, `query` and `keys` are wanted: CLS attention at
            Stage.VISION, the last prompt token's attention at Stage.LAYER.
        number: which of its compressor's cuts, from 0.
        drops: False for a look that only remembers something (`Compressor.look`).
        by: whose cut it is; filled in by the session.
    """

    stage: Stage
    layer: int | None = None
    looks_at: int | None = None
    attends: bool = False
    number: int = 0
    drops: bool = True
    by: Compressor | None = None

    @property
    def reads(self) -> int | None:
        """The layer at whose input it ranks."""
        return self.layer if self.looks_at is None else self.looks_at


@dataclass(frozen=True, slots=True)
class Seen:
    """What a compressor sees of I images when it ranks; every tensor is live.

    V is the number of *places* an image has in the uncompressed prompt (the most of any image).
    Images may have fewer, and at a later cut some are gone: only entries where `valid` count, the
    others hold anything and may not influence a result.

    Attributes:
        features: ``[I, V, D]`` visual tokens at the ranking point: tower features that enter the
            projector (VISION), projected tokens (INPUT), the layer's input (LAYER).
        counts: long ``[I]`` tokens to keep of each image, 0 ≤ count ≤ valid ones.
        seeds: one per image, for compressors that draw.
        valid: bool ``[I, V]``, places that hold a token now.
        totals: long ``[I]`` tokens each image had before any cut.
        cut: where this is.
        lattice: tile, row and column of each place.
        rows: ``[I]`` batch row of each image.
        attention: ``[I, N, V]`` attention of the scoring query to the visual tokens, softmax over
            everything that query attends to; None unless the cut `attends`.
        query: ``[I, N, E]`` that query; None without one.
        keys: ``[I, N, V, E]`` keys of the visual tokens at the scoring layer.
        vision: the pass of the vision tower; None unless the compressor `sees_tower`.
        projected: ``[I, V, D]`` projected tokens, where `vision` is given and they exist already.
        text: the prompt around the images; None at Stage.VISION.
        memory: shared by all cuts of one compressor in one forward pass.
        deepest: number of layers of the language model; 0 where unknown.
        family: the model's adapter; None where tokens are ranked without a model.
    """

    features: Tensor
    counts: Tensor
    seeds: tuple[int, ...]
    valid: Tensor
    totals: Tensor
    cut: Cut
    lattice: Lattice
    rows: Tensor
    attention: Tensor | None = None
    query: Tensor | None = None
    keys: Tensor | None = None
    vision: VisionPass | None = None
    projected: Tensor | None = None
    text: TextSight | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    deepest: int = 0
    family: Family | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """Importance of the visual tokens.

    Attributes:
        score: ``[I, V]``, larger is more important, live; anything finite where not valid.
        log_score: ``[I, V]``, its logarithm for probabilities, else standardised, of distances and
            gains that span orders of magnitude the standardised logarithm.
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
        targets: ``[I, C]`` places that others are merged into, −1 for none; None without merging.
        assignment: ``[I, V]`` entry of `targets` each merged token goes to, −1 for none.
        later: selections of the cuts that follow, in order.
    """

    kept: Tensor
    targets: Tensor | None = None
    assignment: Tensor | None = None
    later: tuple[Selection, ...] = ()

    def row(self, index: int) -> Selection:
        """The selection of one image, as a selection of I = 1."""
        here = slice(index, index + 1)
        targets = None if self.targets is None else self.targets[here]
        assignment = None if self.assignment is None else self.assignment[here]
        later = tuple(one.row(index) for one in self.later)
        return Selection(self.kept[here], targets, assignment, later)

    @staticmethod
    def stack(rows: Sequence[Selection]) -> Selection:
        """Selections of several images as one.

        Raises:
            CompressionError: if they come from different compressors: only some of them merge, or
                they have different numbers of cuts.
        """
        later = _stack_later(rows)
        kept = torch.cat(_even([row.kept for row in rows], False))
        targets = [row.targets for row in rows if row.targets is not None]
        assignment = [row.assignment for row in rows if row.assignment is not None]
        if not targets and not assignment:
            return Selection(kept, later=later)
        if len(targets) != len(rows) or len(assignment) != len(rows):
            raise CompressionError(
                "these selections cannot be stacked: only some of them merge tokens; take them "
                "from one compressor"
            )
        joined = torch.cat(_even(targets, -1)), torch.cat(_even(assignment, -1))
        return Selection(kept, *joined, later)


def _stack_later(rows: Sequence[Selection]) -> tuple[Selection, ...]:
    cuts = {len(row.later) for row in rows}
    if len(cuts) > 1:
        raise CompressionError(
            f"these selections cannot be stacked: they have {sorted(cuts)} further cuts; take them "
            "from one compressor"
        )
    parts = zip(*(row.later for row in rows), strict=True)
    return tuple(Selection.stack(part) for part in parts)


def _even(parts: Sequence[Tensor], value: float) -> list[Tensor]:
    """Pad ``[1, n]`` parts on the right to the longest."""
    width = max(part.shape[1] for part in parts)
    return [
        torch.nn.functional.pad(part, (0, width - part.shape[1]), value=value) for part in parts
    ]


@dataclass(frozen=True, slots=True)
class Merged:
    """Tokens as a merging compressor makes them, at the stage of its cut.

    They take the first living places of their image, in this order.

    Attributes:
        features: ``[I, S, D]``, of the kind of `Seen.features`; already projected if `projected`.
        valid: bool ``[I, S]``; rows with fewer tokens end in False.
        source: ``[I, S]`` place whose spot in the image each one has.
        dominant: bool ``[I, S]``, tokens taken over as they are because of their own score.
        projected: whether `features` have the width of the language model already (only used at
            Stage.VISION).
    """

    features: Tensor
    valid: Tensor
    source: Tensor
    dominant: Tensor
    projected: bool = False


class Preview(Protocol):
    """A model and a batch of B questions, as `Compressor.foresee` may use them."""

    @property
    def layout(self) -> Layout:
        """The visual tokens of a picture of the batch."""
        ...

    def rank(self, images: Tensor, compressor: Compressor) -> Ranking:
        """Rank the tokens of other pictures under the same questions.

        Args:
            images: ``[n · B, 3, H, W]`` in [0, 1]: n pictures of the first sample's question at
                every B-th place from 0, and so on.
            compressor: what ranks.
        """
        ...


class Compressor(ABC):
    """Base of all compressors. Subclasses are ``@dataclass(frozen=True, kw_only=True)``.

    A method with one cut names its `stage` (and `prunes_at`, `looks_at`, `attends` at a layer); one
    with several overrides `cuts`.

    Attributes:
        name: the technique.
        stage: where it acts first.
        retention: kept ÷ all, in (0, 1]; None if `keep_tokens` is given.
        keep_tokens: tokens kept of each image, ≥ 1; None if `retention` is given.
        positions: ``keep`` the position ids tokens had, or ``reindex`` them without gaps.

    Raises:
        CompressionError: unless exactly one of retention and keep_tokens is given, in its range.
    """

    name: ClassVar[str]
    budget_optional: ClassVar[bool] = False
    """Whether it finds out by itself how many tokens to keep, if it is given no budget."""
    retention: float | None
    keep_tokens: int | None

    @property
    @abstractmethod
    def stage(self) -> Stage:
        """Where it acts first."""

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

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """Its cuts in the order they happen, for a language model of `layers` layers."""
        del layers
        return (Cut(self.stage, self.prunes_at, self.looks_at, self.attends),)

    @property
    def sees_tower(self) -> bool:
        """Whether it looks at the vision tower (`Seen.vision`)."""
        return self.stage in (Stage.VISION, Stage.TOWER)

    def tower_layers(self, layers: int, feature_layer: int) -> tuple[int, ...]:
        """Tower layers it looks at besides the feature layer; 0-based, of `layers`."""
        del layers, feature_layer
        return ()

    @property
    def reindexes(self) -> bool:
        """Whether kept tokens get new position ids without gaps."""
        return getattr(self, "positions", "keep") == "reindex"

    @property
    def merges(self) -> bool:
        """Whether it also makes new tokens (`merge`)."""
        return False

    @property
    def drops_separators(self) -> bool:
        """Whether image placeholders that are no token (row separators of tiles) go as well."""
        return False

    def refuses(self, family: Family) -> str | None:
        """Why it cannot work on this family of models; None if it can."""
        del family
        return None

    def watches(self, layers: int) -> tuple[int, ...]:
        """Language-model layers of which `watch` wants to see attention and MLP."""
        del layers
        return ()

    def watch(  # noqa: B027 - most methods watch nothing
        self, layer: int, module: str, before: Tensor, after: Tensor, seen: Seen
    ) -> None:
        """See a module of a watched layer at work; results go into ``seen.memory``.

        Args:
            layer: of the language model.
            module: ``attention`` or ``mlp``.
            before: ``[I, V, D]`` its (normalised) input at the visual tokens.
            after: ``[I, V, D]`` its output before the residual connection.
            seen: valid places, memory and the like; `features` are `before`.
        """

    def shrink(self, images: Tensor) -> Tensor:
        """Pictures ``[B, 3, H, W]`` in [0, 1] as it hands them on (Stage.PIXELS shrinks them)."""
        return images

    @property
    def draws(self) -> bool:
        """Whether what it keeps depends on the seeds it is given."""
        return False

    def foresee(self, preview: Preview, images: Tensor, seeds: Sequence[int]) -> Compressor:
        """Itself, ready for these pictures.

        Called before the session that works on them opens, so that a compressor which ranks by
        other pictures too can look at them.

        Args:
            preview: ranks other pictures.
            images: ``[B, 3, H, W]`` in [0, 1], live.
            seeds: one per picture.
        """
        del preview, images, seeds
        return self

    def restored(self, scores: Scores, selection: Selection, seen: Seen) -> Tensor | None:
        """Kept tokens that were put back by a defence, bool ``[I, V]``; None if nothing does that.

        Args:
            scores: at its cut.
            selection: there; of its own, or imposed.
            seen: there.
        """
        del scores, selection, seen
        return None

    def install(self, family: Family, memory: dict[str, Any]) -> Sequence[Any]:
        """Hooks of its own (stages TOWER and ATTENTION).

        Args:
            family: the model's adapter.
            memory: the `Seen.memory` of its cuts; emptied at each prefill.

        Returns:
            Handles with a method ``remove``, called when the session ends, whatever happens.
        """
        del family, memory
        return ()

    def emerge(self, features: Tensor, memory: dict[str, Any]) -> Merged:
        """Which tokens came out of a tower it has shortened (only Stage.TOWER).

        Args:
            features: ``[I, S, D]`` what enters the projector.
            memory: as in `install`.
        """
        del features, memory
        raise CompressionError(f"compressor {self.name} does not act inside the vision tower")

    def unmerge(self, features: Tensor, memory: dict[str, Any]) -> Tensor:
        """For each patch ``[I, V, D]``, what its token carries (only Stage.TOWER).

        Args:
            features: ``[I, V, D]`` tokens that came out of the tower, first, then anything.
            memory: as in `install`.
        """
        del memory
        return features

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
        """Tokens left of an image that has `tokens`, after the last cut; at least 1.

        Where images differ in size, `keep_tokens` is the most that is kept of each.
        """
        if self.keep_tokens is None:
            return max(1, round((self.retention or 1.0) * tokens))
        return min(self.keep_tokens, tokens)

    def count(self, cut: Cut, tokens: int, layers: int) -> int:
        """Tokens left after one of its cuts of an image that had `tokens` before any.

        Args:
            cut: one of `cuts`.
            tokens: of the uncompressed image.
            layers: of the language model.
        """
        del cut, layers
        return self.budget(tokens)

    @property
    def count_varies(self) -> bool:
        """Whether how many tokens are kept depends on what the picture shows.

        Its size, and how a fixed budget is shared out, do not count.
        """
        return False

    def soft_count(self, scores: Scores, seen: Seen) -> Tensor | None:
        """Differentiable relaxation of how many tokens are kept, ``[I]``; None if that is fixed.

        It has not to be as large as the number itself, but to rise and fall with it.
        """
        del scores, seen
        return None

    @abstractmethod
    def score(self, seen: Seen) -> Scores:
        """Rank the visual tokens, differentiably where the method allows it."""

    def look(self, seen: Seen) -> None:  # noqa: B027 - most methods only cut
        """Remember something at a cut that drops nothing, in ``seen.memory``."""

    def select(self, scores: Scores, seen: Seen) -> Selection:
        """Choose hard: the `seen.counts` best of each image unless the method says otherwise."""
        if scores.chosen is not None:
            return self.complete(scores.chosen, seen)
        return self.complete(top_k_mask(scores.score, seen.counts, seen.valid), seen)

    def complete(self, kept: Tensor, seen: Seen) -> Selection:
        """A selection around a given kept set, bool ``[I, V]``."""
        del seen
        return Selection(kept)

    def merge(self, selection: Selection, seen: Seen) -> Merged | None:
        """New tokens in place of the kept ones; None leaves them as they are."""
        del selection, seen
        return None


def numbered(cuts: Sequence[Cut]) -> tuple[Cut, ...]:
    """Cuts with their `number` filled in."""
    return tuple(replace(cut, number=index) for index, cut in enumerate(cuts))
