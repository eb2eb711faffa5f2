"""Run a decoding method: its branches side by side, token by token or all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from targets.compression.scoring import precise
from targets.decoding.base import Decoding, Step
from targets.decoding.branch import Branch, Reading
from targets.decoding.search import Back, Ends, Walk, beams, greedy
from targets.errors import TargetError
from targets.families.base import Family
from targets.prompts import Dialogue
from targets.soundness import FiniteLogits


@dataclass(slots=True)
class DecodingRun:
    """A method at work on one batch.

    Attributes:
        method: the rule.
        family: the model's adapter.
        branches: the main pass first, then one for each view.
        seeds: one for each sample.
    """

    method: Decoding
    family: Family
    branches: Sequence[Branch]
    seeds: tuple[int, ...]
    _rows: tuple[int, ...] = field(init=False)
    _said: int = 0
    _finite: FiniteLogits = field(default_factory=FiniteLogits)

    def __post_init__(self) -> None:
        """Begin with one row a sample."""
        self._rows = tuple(range(len(self.seeds)))

    @property
    def dialogue(self) -> Dialogue:
        """The prompts with the answers that are scored.

        Raises:
            TargetError: where answers are generated.
        """
        prompt = self.branches[0].prompt
        if not isinstance(prompt, Dialogue):
            raise TargetError("this run was given no answers to score")
        return prompt

    def generate(self, ends: Ends) -> Tensor:
        """Answers as ids ``[B, ≤ most]``, padded at the right.

        Raises:
            NonFiniteError: if a token would have been chosen by NaN or infinity.
        """
        found = self._search(ends)
        self._finite.require()
        return found

    def _search(self, ends: Ends) -> Tensor:
        with torch.no_grad():
            rule = self.branches[0].rule
            walk = Walk(self._start, self._advance, self._select, self._mark, rule)
            found = self.method.search(walk, ends)
            if found is not None:
                return found
            if self.method.beams == 1:
                return greedy(self._start, self._advance, ends)
            method = self.method
            return beams(
                self._start,
                self._advance,
                self._select,
                ends,
                method.beams,
                method.length_penalty,
            )

    def forced(self) -> Tensor:
        """Log-probabilities ``[B, A, vocabulary]`` of the answers behind the prompts, live."""
        logits = self._logits([branch.forced() for branch in self.branches])
        return logits.float().log_softmax(-1)

    def _start(self) -> Tensor:
        return self._logits([branch.start() for branch in self.branches])[:, -1]

    def _advance(self, tokens: Tensor) -> Tensor:
        self._said += 1
        return self._logits([branch.step(tokens) for branch in self.branches])[:, -1]

    def _select(self, rows: Tensor) -> None:
        places = rows.tolist()
        if places == list(range(len(self._rows))):
            return
        chosen = tuple(self._rows[row] for row in places)
        for branch in self.branches:
            if chosen == self._rows:
                branch.exchange(rows)
            else:
                branch.select(rows)
        self._rows = chosen

    def _mark(self) -> Back:
        backs = [branch.mark() for branch in self.branches]
        rows, said = self._rows, self._said

        def back() -> None:
            for one in backs:
                one()
            self._rows, self._said = rows, said

        return back

    def _logits(self, readings: Sequence[Reading]) -> Tensor:
        main = self.branches[0]
        wanted = self.method.depths(len(self.family.layers))
        hidden = {depth: readings[0].depths[depth] for depth in wanted}
        logits, *others = self._heads([*(one.hidden for one in readings), *hidden.values()])
        views = len(readings) - 1
        for one in (logits, *others[:views]):
            self._finite(None, one[:, -1])
        return self.method.logits(
            Step(
                logits=logits,
                views=tuple(others[:views]),
                first=self._said,
                hidden=hidden,
                early=dict(zip(hidden, others[views:], strict=True)),
                entered=main.entered,
                visual=main.visual,
                head=self._head,
                seeds=tuple(self.seeds[row] for row in self._rows),
            )
        )

    def _heads(self, states: Sequence[Tensor]) -> Sequence[Tensor]:
        """Logits of several hidden states of one shape; the head's weights are read once."""
        if len(states) == 1:
            return (self._head(states[0]),)
        home = states[0].device
        joined = torch.cat([one.to(home) for one in states], 1)
        return self._head(joined).chunk(len(states), 1)

    def _head(self, hidden: Tensor) -> Tensor:
        return precise(self.family.logits(hidden))
