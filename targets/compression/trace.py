"""What a session remembers of a prefill, and the choice every ranking ends in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from targets.base import Ranking
from targets.compression.base import Compressor, Scores, Seen, Selection
from targets.errors import CompressionError

Forced = Tensor | Selection | Sequence[Selection] | None
"""A selection imposed from outside: bool ``[I, V]``, or what an earlier trace holds."""


@dataclass(slots=True)
class Trace:
    """What happened in the last prefill; tensors of I images, live.

    Attributes:
        scores: importance of the visual tokens; None without images.
        selection: the hard choice.
        seen: what the compressor saw; its `features` are those at the ranking point.
        rows: ``[I]`` batch row of each image.
        lengths: sequence length in each language-model layer, those run.
        seconds: spent ranking and choosing.
    """

    scores: Scores | None = None
    selection: Selection | None = None
    seen: Seen | None = None
    rows: Tensor | None = None
    lengths: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def score(self) -> Tensor | None:
        """``[I, V]``, in the graph."""
        return None if self.scores is None else self.scores.score

    @property
    def kept(self) -> Tensor | None:
        """The hard choice, bool ``[I, V]``."""
        return None if self.selection is None else self.selection.kept

    def ranking(self) -> Ranking:
        """The ranking in the words of `targets.base`.

        Raises:
            CompressionError: if nothing was ranked.
        """
        if self.scores is None or self.selection is None or self.seen is None:
            raise CompressionError("nothing was ranked: the prompt held no image")
        return ranking_of(self.scores, self.selection, self.seen)


def ranking_of(scores: Scores, selection: Selection, seen: Seen) -> Ranking:
    """Put what a compressor saw and chose into the words of `targets.base`."""
    return Ranking(
        score=scores.score,
        log_score=scores.log_score,
        query=seen.query if scores.attends else None,
        keys=seen.keys if scores.attends and seen.query is not None else None,
        features=seen.features,
        kept=selection.kept,
    )


def choose(compressor: Compressor, seen: Seen, forced: Forced = None) -> tuple[Scores, Selection]:
    """Score and select; the whole budget keeps everything as it is.

    Raises:
        CompressionError: if the forced selection has another shape than the scores.
    """
    scores = compressor.score(seen)
    if forced is not None:
        return scores, _imposed(compressor, seen, scores, forced)
    if seen.count == scores.score.shape[1]:
        return scores, Selection(torch.ones_like(scores.score, dtype=torch.bool))
    return scores, compressor.select(scores, seen)


def _imposed(compressor: Compressor, seen: Seen, scores: Scores, forced: Forced) -> Selection:
    if isinstance(forced, Tensor):
        selection = Selection(forced.to(device=scores.score.device, dtype=torch.bool))
    elif isinstance(forced, Selection):
        selection = forced
    else:
        selection = Selection.stack(list(forced or ()))
    if selection.kept.shape != scores.score.shape:
        raise CompressionError(
            f"the forced selection is {list(selection.kept.shape)}, but there are "
            f"{list(scores.score.shape)} images × visual tokens to choose from"
        )
    if bool((~selection.kept.any(1)).any()):
        raise CompressionError("the forced selection keeps no token of some image; keep at least 1")
    if compressor.merges and selection.targets is None and not bool(selection.kept.all()):
        return compressor.complete(selection.kept, seen)
    return selection


def column_bias(scores: Scores, kept: Tensor, temperature: float) -> Tensor:
    """Log-gate of the kept tokens: zero forward, a sigmoid relaxation of the top-k backward.

    With s the log-scores and θ the live midpoint between the last kept and the first dropped of
    each image, a kept token's gate is ``m = sigmoid((s − θ) / temperature)``; what is added to the
    attention logits of its column is ``log m`` minus its own value.

    Args:
        scores: of ``[I, V]`` tokens.
        kept: bool ``[I, V]``.
        temperature: width of the relaxation in units of the log-score, > 0.

    Returns:
        ``[I, V]``, zero everywhere; gradient only through kept tokens and θ.
    """
    if bool(kept.all()):
        return torch.zeros_like(scores.log_score)
    score = scores.log_score
    worst = score.masked_fill(~kept, torch.inf).amin(1, keepdim=True)
    best = score.masked_fill(kept, -torch.inf).amax(1, keepdim=True)
    bar = torch.where(kept.all(1, keepdim=True), worst, (worst + best.clamp_min(-1e4)) / 2)
    gate = torch.nn.functional.logsigmoid((score - bar) / temperature)
    return ((gate - gate.detach()) * kept).to(score.dtype)
