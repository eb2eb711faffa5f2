"""Defences that act on which visual tokens are kept: one definition for evaluation and attack.

A selection defence wraps a compressor into another compressor. Sessions, views, gradients, the swap
test and traces then work as with any compressor, and an attack that knows the defence is simply
given the protected compressor.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from defenses.base import Defense, DefenseError, DefenseKind
from targets.compression.base import Compressor, Preview, Scores, Seen, Selection, Stage
from targets.compression.pipeline import Pipeline
from targets.compression.scoring import precise, ranks, standardised
from targets.compression.wrapped import Wrapped
from targets.errors import CompressionError
from targets.preprocessing import Layout

_DEEP = 64
"""Language-model layers imagined when a compressor is asked how often it cuts."""
SOFTNESS = 0.5
"""Width of the sigmoid of a soft rank, in standard deviations of the score."""

Align = Callable[[Tensor], Tensor]
"""Puts values ``[B, V]`` of a view's tokens where the picture itself has them."""


@dataclass(frozen=True, slots=True)
class View:
    """Another picture of each sample that is ranked beside it.

    Attributes:
        images: ``[B, 3, H, W]`` in [0, 1], live.
        align: where its tokens belong.
    """

    images: Tensor
    align: Align


class SelectionDefense(Defense):
    """Base of defences that change the ranking, or the kept set, at an equal number of tokens.

    Subclasses override `combine`, after `look_again` or `tower_layers`, or `keep`, or both.

    Attributes:
        clean_ranking: whether the evaluation imposes the clean picture's own selection on the
            attacked one; only an upper bound does.
        looks_again: whether the vision tower runs on other pictures too (`look_again`), so that an
            attack which knows the tower alone can go through it.
        restores: whether what it changes about the kept set is of interest further on, to a method
            that asks for `Columns.restored`.
    """

    kind: ClassVar[DefenseKind] = DefenseKind.SELECTION
    clean_ranking: ClassVar[bool] = False
    looks_again: ClassVar[bool] = False
    restores: ClassVar[bool] = False

    @property
    def looks(self) -> int:
        """How many other pictures of a sample are ranked, and so how many passes that costs."""
        return 0

    def refuses(self, compressor: Compressor) -> str | None:
        """Why it has no meaning for a compressor; None if it has.

        Any needs one point at which tokens are kept as they are, a number that does not depend on
        the values of the scores.
        """
        if isinstance(compressor, Pipeline):
            return "it is made of several compressors; a defence protects one"
        if compressor.stage not in (Stage.VISION, Stage.INPUT, Stage.LAYER):
            return f"it works at stage {compressor.stage.value}, where no kept set is chosen"
        cuts = [cut for cut in compressor.cuts(_DEEP) if cut.drops]
        if len(cuts) != 1:
            return f"it drops tokens at {len(cuts)} points; a defence protects one"
        if compressor.count_varies:
            return "how many tokens it keeps follows from the values of its scores"
        if compressor.merges and type(compressor).complete is Compressor.complete:
            return "what it merges is its own choice, which no other kept set can take the place of"
        return None

    def look_again(
        self, images: Tensor, layout: Layout, generators: Sequence[torch.Generator]
    ) -> Sequence[View]:
        """Other pictures to rank, the same number whatever the batch; none here.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1], live.
            layout: where the tokens of these pictures lie.
            generators: one CPU generator per sample, the only allowed source of randomness.

        Raises:
            CompressionError: for a layout it has no meaning for.
        """
        del images, layout, generators
        return ()

    def tower_layers(self, layers: int, feature_layer: int) -> tuple[int, ...]:
        """Tower layers `combine` looks at in ``seen.vision``; none here."""
        del layers, feature_layer
        return ()

    def combine(self, own: Scores, others: Sequence[Scores], seen: Seen) -> Scores:
        """The score to choose by; the compressor's own here.

        Args:
            own: of the compressor on the picture itself, ``[I, V]``.
            others: of the compressor on each of the views, aligned.
            seen: what the compressor sees of the picture itself.
        """
        del others, seen
        return own

    def keep(
        self, kept: Tensor, scores: Scores, seen: Seen, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """The set to keep, as large as the compressor's; the compressor's own here.

        Args:
            kept: bool ``[I, V]`` what the compressor would keep by `combine`'s score.
            scores: that score.
            seen: what the compressor sees.
            generators: one CPU generator per image.
        """
        del scores, seen, generators
        return kept

    @final
    def protect(self, compressor: Compressor, salt: int = 0) -> Compressor:
        """The compressor with the defence in it.

        Args:
            compressor: what drops tokens.
            salt: told apart draws of the defence's randomness; a deployment has its own, secret
                one.

        Raises:
            DefenseError: where the defence has no meaning for the compressor.
        """
        reason = self.refuses(compressor)
        if reason is not None:
            raise DefenseError(
                f"defence {self.name} does not go with compressor {compressor.name}: {reason}"
            )
        return Protected(base=compressor, defense=self, salt=salt)


@dataclass(frozen=True, kw_only=True)
class Protected(Wrapped):
    """A compressor under a selection defence; made by `SelectionDefense.protect`.

    Args:
        defense: what changes the ranking or the set.
        salt: of its random draws.
        foreseen: the base's aligned scores of the views of one batch; None before `foresee`.
    """

    defense: SelectionDefense
    salt: int = 0
    foreseen: tuple[Scores, ...] | None = field(default=None, compare=False, repr=False)

    @property
    def sees_tower(self) -> bool:
        """If the compressor or the defence does."""
        return self.base.sees_tower or bool(self.defense.tower_layers(_DEEP, _DEEP - 1))

    def tower_layers(self, layers: int, feature_layer: int) -> tuple[int, ...]:
        """Of the compressor and of the defence."""
        own = self.base.tower_layers(layers, feature_layer)
        return tuple(sorted({*own, *self.defense.tower_layers(layers, feature_layer)}))

    def foresee(self, preview: Preview, images: Tensor, seeds: Sequence[int]) -> Compressor:
        """Itself, with the views of these pictures ranked in one batch."""
        ready = self.base.foresee(preview, images, seeds)
        views = self.defense.look_again(images, preview.layout, self._generators(seeds))
        if not views:
            return replace(self, base=ready, foreseen=())
        ranking = preview.rank(torch.cat([view.images for view in views]), self.base)
        parts = zip(
            views,
            ranking.score.chunk(len(views)),
            ranking.log_score.chunk(len(views)),
            strict=True,
        )
        found = tuple(Scores(v.align(score), v.align(log)) for v, score, log in parts)
        return replace(self, base=ready, foreseen=found)

    def score(self, seen: Seen) -> Scores:
        """The compressor's score as the defence combines it with those of the views.

        Raises:
            CompressionError: if the views of these pictures have not been ranked.
        """
        own = self.base.score(seen)
        if self.foreseen is None:
            raise CompressionError(
                f"defence {self.defense.name} has not looked at these pictures; a session of your "
                "own opens with targets.passes.Passes.ready(images, questions, compressor)"
            )
        if self.foreseen and len(self.foreseen[0].score) != len(own.score):
            raise CompressionError(
                f"defence {self.defense.name} ranked views of {len(self.foreseen[0].score)} "
                f"pictures, and {len(own.score)} are to be compressed; one picture a prompt"
            )
        return self.defense.combine(own, self.foreseen, seen)

    def select(self, scores: Scores, seen: Seen) -> Selection:
        """The compressor's choice by that score, as the defence changes it."""
        selection = self.base.select(scores, seen)
        kept = self.defense.keep(selection.kept, scores, seen, self._generators(seen.seeds))
        if torch.equal(kept, selection.kept):
            return selection
        if not torch.equal(kept.sum(1), selection.kept.sum(1)):
            raise CompressionError(
                f"defence {self.defense.name} keeps {kept.sum(1).tolist()} tokens where the "
                f"compressor keeps {selection.kept.sum(1).tolist()}; an equal number is a duty"
            )
        return self.base.complete(kept, seen)

    def restored(self, scores: Scores, selection: Selection, seen: Seen) -> Tensor | None:
        """Kept tokens that the compressor would not have kept, of an imposed selection too."""
        if not self.defense.restores or torch.equal(selection.kept, seen.valid):
            return self.base.restored(scores, selection, seen)
        return selection.kept & ~self.base.select(scores, seen).kept

    def _generators(self, seeds: Sequence[int]) -> list[torch.Generator]:
        return [
            torch.Generator().manual_seed(drawn(self.defense.name, self.salt, seed))
            for seed in seeds
        ]


def drawn(what: object, *numbers: int) -> int:
    """A seed in [0, 2**63) that depends on these and nothing else."""
    text = "/".join(map(str, (what, *numbers))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


class ViewConsensus(SelectionDefense):
    """Base of defences that rank several views of a picture and choose by what they agree on."""

    looks_again: ClassVar[bool] = True

    def refuses(self, compressor: Compressor) -> str | None:
        """Also what does not choose by an attention: its ranking would not follow the views."""
        if not compressor.attends:
            return "its choice does not follow the attention to a picture, so views say nothing"
        return super().refuses(compressor)

    @abstractmethod
    def reduce(self, own: Tensor, others: Sequence[Tensor]) -> Tensor:
        """One ``[I, V]`` out of the picture's own values and those of its views, one at least."""

    def combine(self, own: Scores, others: Sequence[Scores], seen: Seen) -> Scores:
        """Rank quantiles, reduced; backward, soft ranks of the standardised log-scores."""
        self.check_choice(own)
        if not others:
            return own
        hard = self.reduce(
            rank_quantiles(own.score, seen.valid),
            [rank_quantiles(one.score, seen.valid) for one in others],
        )
        soft = self.reduce(
            soft_quantiles(own.log_score, seen.valid),
            [soft_quantiles(one.log_score, seen.valid) for one in others],
        )
        # Ranks have no gradient: forward they decide, exactly, so that ties fall to the first;
        # backward their relaxation stands for them.
        score = hard + (soft - soft.detach())
        return Scores(score, standardised(soft, seen.valid), own.attends)

    def check_choice(self, own: Scores) -> None:
        """Refuse what chooses while it scores: a set does not follow from a consensus of scores.

        Raises:
            CompressionError: naming the defence.
        """
        if own.chosen is not None:
            raise CompressionError(
                f"defence {self.name} does not go with a compressor that chooses tokens one after "
                "another: its scores say when a token was taken, not how important it is"
            )


def rank_quantiles(score: Tensor, valid: Tensor) -> Tensor:
    """``1 − (r − 1) / (N − 1)`` of each token, r its rank from 1: 1 the best, 0 the last.

    Args:
        score: ``[I, V]``.
        valid: bool ``[I, V]``; N are the valid ones, the others get 0.

    Returns:
        float32 ``[I, V]`` without gradient; 1 where N = 1.
    """
    place = ranks(score, valid).float()
    last = (valid.sum(1, keepdim=True) - 1).clamp_min(1)
    return (1 - place / last).masked_fill(~valid, 0)


def soft_quantiles(score: Tensor, valid: Tensor, softness: float = SOFTNESS) -> Tensor:
    """Differentiable rank quantiles: the mean of ``sigmoid((z_i − z_j) / softness)`` over j ≠ i.

    Like a rank it saturates: what leads in one view gains nothing by leading further. [inferred]

    Args:
        score: ``[I, V]``, live; z is its standardised form.
        valid: bool ``[I, V]``; the others neither count nor get anything.
        softness: of the sigmoid, in standard deviations, > 0.
    """
    z = standardised(precise(score), valid)
    wins = torch.sigmoid((z[:, :, None] - z[:, None]) / softness)
    itself = torch.eye(score.shape[1], dtype=torch.bool, device=score.device)
    wins = wins.masked_fill(itself | ~valid[:, None], 0).sum(2)
    others = (valid.sum(1, keepdim=True) - 1).clamp_min(1)
    return (wins / others).masked_fill(~valid, 0)


def single_grid(layout: Layout, name: str) -> tuple[int, int, float, float]:
    """Rows and columns of the tokens of a picture, and pixels from one to the next.

    Raises:
        CompressionError: for pictures of several tiles, or tokens that are no full grid.
    """
    rows, columns = layout.shapes[layout.base]
    reading = torch.arange(layout.tokens)
    full = len(layout.shapes) == 1 and layout.tokens == rows * columns
    if not full or not torch.equal(layout.row * columns + layout.column, reading):
        raise CompressionError(
            f"defence {name} aligns the scores of shifted pictures on one grid, and this one has "
            f"{len(layout.shapes)} tiles with {layout.tokens} tokens; use a model that sees a "
            "picture as one tile, row by row"
        )
    top, left, bottom, right = (float(one) for one in layout.boxes[0])
    return rows, columns, bottom - top, right - left
