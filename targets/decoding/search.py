"""Greedy and beam search over whatever says the next token's log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from targets.decoding.attention import AttentionRule

Start = Callable[[], Tensor]
"""Logits ``[B, vocabulary]`` of the first token."""
Advance = Callable[[Tensor], Tensor]
"""Tokens ``[n]`` → logits ``[n, vocabulary]`` of what follows."""
Select = Callable[[Tensor], None]
"""Go on with these rows, long ``[m]``."""
Back = Callable[[], None]
"""Go back to where a continuation stood; may be called again and again."""

_NEVER = -1.0e9


@dataclass(frozen=True, slots=True)
class Ends:
    """Where an answer ends.

    Attributes:
        tokens: ids of end tokens, at least one.
        pad: id that fills up shorter answers.
        most: tokens of an answer at most, ≥ 1.
    """

    tokens: tuple[int, ...]
    pad: int
    most: int


@dataclass(frozen=True, slots=True)
class Walk:
    """What a search of a method's own may do (`Decoding.search`).

    Attributes:
        start: runs the prompts, once and first.
        advance: runs one token of each row there is.
        select: repeats, reorders and leaves out rows.
        mark: remembers where all rows stand now; what it returns goes back there.
        rule: the attention rule of the main pass, which may have taken notes; None without one.
    """

    start: Start
    advance: Advance
    select: Select
    mark: Callable[[], Back]
    rule: AttentionRule | None = None


@torch.no_grad()
def greedy(start: Start, advance: Advance, ends: Ends) -> Tensor:
    """The likeliest token each time, ids ``[B, ≤ most]`` padded at the right."""
    logits = start()
    stops = torch.tensor(ends.tokens, device=logits.device)
    open_rows = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    found: list[Tensor] = []
    while True:
        tokens = logits.argmax(-1).masked_fill(~open_rows, ends.pad)
        found.append(tokens)
        open_rows = open_rows & ~torch.isin(tokens, stops)
        if len(found) == ends.most or not bool(open_rows.any()):
            return torch.stack(found, 1)
        logits = advance(tokens)


@torch.no_grad()
def beams(
    start: Start, advance: Advance, select: Select, ends: Ends, width: int, length_penalty: float
) -> Tensor:
    """The best of `width` hypotheses a sample, ids ``[B, ≤ most]`` padded at the right.

    As in transformers with ``early_stopping=False``: hypotheses that end among the best `width` of
    a step are put aside with ``log p / length ** length_penalty``; a sample is done once its best
    open hypothesis, scored by its present length, cannot beat the worst of `width` put aside.
    Samples do not depend on each other.

    Args:
        start: runs the prompts.
        advance: runs one token of each of B · width rows.
        select: repeats and reorders rows; those of a sample stand together.
        ends: where answers end.
        width: W ≥ 1.
        length_penalty: see above.
    """
    logits = start()
    batch, device = len(logits), logits.device
    rows = torch.arange(batch, device=device).repeat_interleave(width)
    select(rows)
    book = _Book.empty(batch, width, ends, device)
    score = torch.full((batch, width), _NEVER, device=device)
    score[:, 0] = 0  # all start alike: only one of them may go on
    logits = logits[rows]
    said = torch.full((batch, width, ends.most), ends.pad, device=device)
    for length in range(1, ends.most + 1):
        total = logits.float().log_softmax(-1).view(batch, width, -1) + score[..., None]
        # Enough candidates for `width` to stay open, whatever ends.
        number = min(max(2, 1 + len(ends.tokens)) * width, total[0].numel())
        best, place = total.flatten(1).topk(number, 1)
        parent, token = place // total.shape[2], place % total.shape[2]
        grown = said.gather(1, parent[..., None].expand(-1, -1, ends.most)).clone()
        grown[:, :, length - 1] = token
        stops = torch.isin(token, book.stops) | (length == ends.most)
        running = (best + stops * _NEVER).topk(width, 1)
        book.put_aside(grown, best / length**length_penalty, stops)
        score = running.values
        said = grown.gather(1, running.indices[..., None].expand(-1, -1, ends.most))
        book.close(score[:, 0] / length**length_penalty)
        if length == ends.most or bool(book.done.all()):
            break
        chosen = parent.gather(1, running.indices)
        first = torch.arange(batch, device=device)[:, None] * width
        select((chosen + first).flatten())
        logits = advance(said[:, :, length - 1].flatten())
    return book.answers()


@dataclass(slots=True)
class _Book:
    """Finished hypotheses: ids ``[B, W, most]`` and scores ``[B, W]``, best first."""

    ids: Tensor
    score: Tensor
    done: Tensor  # bool [B]
    stops: Tensor
    ends: Ends

    @staticmethod
    def empty(batch: int, width: int, ends: Ends, device: torch.device) -> _Book:
        return _Book(
            torch.full((batch, width, ends.most), ends.pad, device=device),
            torch.full((batch, width), _NEVER, device=device),
            torch.zeros(batch, dtype=torch.bool, device=device),
            torch.tensor(ends.tokens, device=device),
            ends,
        )

    def put_aside(self, grown: Tensor, score: Tensor, stops: Tensor) -> None:
        """Keep the best of what has ended, of the first `width` candidates only."""
        width = self.score.shape[1]
        counts = stops & (torch.arange(stops.shape[1], device=stops.device) < width)
        fresh = score.masked_fill(~counts | self.done[:, None], 2 * _NEVER)
        merged = torch.cat([self.score, fresh], 1).topk(width, 1)
        ids = torch.cat([self.ids, grown], 1)
        self.score = merged.values
        self.ids = ids.gather(1, merged.indices[..., None].expand(-1, -1, ids.shape[2]))

    def close(self, reachable: Tensor) -> None:
        """Samples whose open hypotheses, at best `reachable` ``[B]``, can win nothing."""
        full = self.score[:, -1] > _NEVER / 2
        self.done = self.done | (full & (reachable <= self.score[:, -1]))

    def answers(self) -> Tensor:
        """The best of each sample, without columns that are padding throughout."""
        best = self.ids[:, 0]
        ended = torch.isin(best, self.stops).long()
        real = ended.cumsum(1) - ended == 0
        best = best.masked_fill(~real, self.ends.pad)
        return best[:, : int(real.sum(1).amax())]
