"""OPERA: beams that lean on one summary token are penalised, and taken back if they go on so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from defenses.base import AdaptiveRoute
from defenses.decoding import OFF, DecodingDefense
from targets.decoding import AttentionCall, AttentionRule, Step
from targets.decoding.attention import softmax
from targets.decoding.search import Back, Ends, Walk

_NEVER = -1.0e9


@dataclass(frozen=True, kw_only=True)
class OPERA(DecodingDefense):
    """Beam search with an over-trust penalty and retrospection-allocation.

    Paper: Huang et al., "OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via
    Over-Trust Penalty and Retrospection-Allocation" (CVPR 2024, arXiv 2311.17911); code
    shikiw/OPERA, whose rules are these. For each hypothesis the `num_attn_candidates` likeliest
    tokens are run. With w the last layer's attention, maximum over heads, renormalised, and t the
    candidate's place in the answer:

    1. Among the tokens of the answer, column j has ``φ_j = 1e-7 · Π_{i=j..t} σ w_ij``; the logit of
       the candidate falls by ``α max_j φ_j``. For the first `first_tokens` of an answer it rises by
       α times the candidate's attention to visual tokens instead.
    2. Candidates are chosen by beam search over the softmax of these logits.
    3. If one column has been the arg max at more than `threshold` places of every open hypothesis,
       all go back to the place behind that column, where what had been chosen is ruled out.

    It was made against hallucination in long descriptions: an answer of a few words sees the reward
    of attention to the picture alone. It acts behind the prefill, so that nothing a compressor
    dropped comes back, and attention to visual tokens is attention to those that are left: where an
    attack chose them, the reward is expected to favour the attack [inferred].

    Args:
        scale_factor: σ > 0.
        threshold: places a column may be the arg max of, ≥ 1.
        num_attn_candidates: tokens that are run for each hypothesis, ≥ 1.
        penalty_weights: α ≥ 0; 0 without `rollbacks` is plain beam search (`BeamSearch`).
        first_tokens: tokens of an answer that are rewarded, ≥ 0; also the first place that a
            hypothesis may be taken back to, less one.
        rollbacks: how often hypotheses may be taken back to one place, ≥ 0; when this is used up,
            to the place before it, and then no more. 0 never.
        damping: factor on the product, in (0, 1]; 1 is the paper's formula, 1e-7 the code's.
        beams: width of the search.
        length_penalty: see `DecodingDefense`.

    Each token costs a forward of beams · candidates rows, each step back the tokens in front of it
    again; samples of a batch are searched one after another.

    Scoring a given answer uses the model's own distribution: penalty and steps back are control
    flow of the search, without a gradient. An adaptive attack is the teacher-forced one on plain
    decoding, tried on the search (transfer). No robustness may be claimed from that the search does
    not show up in the loss.

    *Differs from the paper in …*: arg max and penalty are worked out in logarithms, where the
    code's float16 rounds most products to 0; a penalty is at most 1000 nats. Which columns have
    been the arg max is counted along each hypothesis (the code counts by its place in the beam).
    Behind a step back, candidates are penalised as ever (the code then takes any token but those
    ruled out); a hypothesis goes back with its cache worked out anew, as in the code. Columns of
    images are those that are left in the last layer. The code's limit of steps back is its number
    of candidates; with one candidate (its fast setting: threshold 25) give `rollbacks` 1 for that.
    """

    name: ClassVar[str] = "opera"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.DIFFERENTIABLE

    scale_factor: Annotated[float, Gt(0)] = 50.0
    threshold: Annotated[int, Ge(1)] = 15
    num_attn_candidates: Annotated[int, Ge(1)] = 5
    penalty_weights: Annotated[float, Ge(0)] = 1.0
    first_tokens: Annotated[int, Ge(0)] = 10
    rollbacks: Annotated[int, Ge(0)] = 5
    damping: Annotated[float, Interval(gt=0, le=1)] = 1.0e-7
    beams: Annotated[int, Ge(1)] = 5

    @property
    def acts(self) -> bool:
        """Whether this is anything but plain beam search."""
        return self.penalty_weights > 0 or self.rollbacks > 0

    def attention(self) -> AttentionRule | None:
        """Notes on the last layer's attention, which stays as it is."""
        return Trail(self.scale_factor) if self.acts else None

    def logits(self, step: Step) -> Tensor:
        """The model's own; see `search`."""
        return step.logits

    def search(self, walk: Walk, ends: Ends) -> Tensor | None:
        """Sample by sample: steps back leave samples at different places."""
        trail = walk.rule
        if not isinstance(trail, Trail):
            return None
        logits = walk.start()
        back = walk.mark()
        found = []
        for row in range(len(logits)):
            back()
            walk.select(torch.tensor([row], device=logits.device))
            found.append(Retrospection(self, walk, trail, ends).answer(logits[row : row + 1]))
        width = max(map(len, found))
        rows = [ids + [ends.pad] * (width - len(ids)) for ids in found]
        return torch.tensor(rows, device=logits.device)

    def penalty(self, trail: Trail, length: int) -> tuple[Tensor, Tensor]:
        """What the logits of the tokens run last fall by, and the column each leans on.

        Args:
            trail: whose rows are those tokens.
            length: tokens of the answer, these included.

        Returns:
            float32 ``[n]`` and long ``[n]``.
        """
        best, column = trail.products.max(-1)
        if length <= self.first_tokens:
            return -trail.seen, column
        # A product of hundreds of factors leaves what floats hold; the arg max is found before.
        over = (best + torch.tensor(self.damping, dtype=best.dtype).log()).clamp(max=_log(OFF))
        return over.exp().float(), column


def _log(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).log())


class Trail(AttentionRule):
    """Notes, for each row, how much its answer leans on each of its tokens.

    Only while answering token by token; attention itself stays as it is.

    Args:
        scale: σ on attention.

    Attributes:
        products: float64 ``[n, t]`` of n rows with t tokens of an answer, ``Σ_i log σ w_ij`` over i
            from j on.
        seen: ``[n]`` attention of the last token to visual ones.
    """

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self.products = torch.zeros(0, 0, dtype=torch.float64)
        self.seen = torch.zeros(0)

    def layers(self, depth: int) -> Iterable[int]:
        """The last."""
        return (depth - 1,)

    def select(self, rows: Tensor) -> None:
        """Follow the cache."""
        if len(self.products):
            self.products, self.seen = self.products[rows], self.seen[rows]

    @torch.no_grad()
    def note(self, weights: Tensor, visual: Tensor, generated: int) -> None:
        """Take in the attention of one more token of each row.

        Args:
            weights: ``[n, N, columns]``, the last of which is the token's own.
            visual: bool ``[n, columns]``.
            generated: t, tokens of the answer; of a cache that forgets, fewer columns than these
                may be left, and what is gone is attended to no more.
        """
        most = weights.amax(1)
        most = most / most.sum(-1, keepdim=True)
        self.seen = (most * visual).sum(-1)
        own = most[:, -min(generated, most.shape[1]) :].double()
        own = torch.nn.functional.pad(own, (generated - own.shape[1], 0))
        before = self.products
        if generated == 1:
            before = own.new_zeros(len(own), 0)
        # Tiny instead of 0, so that products stay apart and no −∞ meets another.
        tiny = torch.finfo(torch.float64).tiny
        factors = (own * self._scale).clamp_min(tiny).log()
        self.products = torch.nn.functional.pad(before, (0, 1)) + factors

    def __call__(self, call: AttentionCall) -> Tensor:
        """The model's own attention."""
        if call.query.shape[2] == 1 and call.generated:
            logits = call.scaled(call.dots(call.answers()))
            weights = softmax(logits, call.answers_added())[:, :, 0]
            self.note(weights, call.columns.visual, call.generated)
        return call.kernel(call.mask)


@dataclass(slots=True)
class _Stand:
    """Where a search of W open hypotheses is, in front of their next token.

    Attributes:
        said: W answers so far.
        score: float ``[W]`` their log-probabilities.
        columns: of each, which column every one of its tokens leaned on.
        finished: ended hypotheses and their scores, the best first.
    """

    said: list[list[int]]
    score: Tensor
    columns: list[list[int]]
    finished: list[tuple[float, list[int]]]


@dataclass(slots=True)
class Retrospection:
    """The search for one sample's answer; its row is the only one that `walk` has.

    Attributes:
        method: options.
        walk: the branches, behind the prompt.
        trail: notes on attention, of the same rows.
        ends: where answers end.
        taken_back: places that hypotheses were taken back to, in order.
    """

    method: OPERA
    walk: Walk
    trail: Trail
    ends: Ends
    taken_back: list[int] = field(default_factory=list)
    _home: Back = field(init=False)
    _stands: list[_Stand] = field(default_factory=list)
    _chosen: list[list[tuple[int, int]]] = field(default_factory=list)
    _out: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def answer(self, logits: Tensor) -> list[int]:
        """Ids of the best hypothesis, its end token included where it has one.

        Args:
            logits: ``[1, vocabulary]`` of the first token.
        """
        self._home = self.walk.mark()
        first = logits
        now = _Stand([[]], torch.zeros(1, device=logits.device), [[]], [])
        while True:
            place = len(now.said[0])
            self._stands[place:] = [now]
            ruled = self._ruled_out(logits, self._out.get(place, ()))
            scores, tokens = ruled.topk(min(self.method.num_attn_candidates, ruled.shape[1]))
            after = self._run(tokens)
            penalty, columns = self.method.penalty(self.trail, place + 1)
            columns = columns.view(tokens.shape)
            back = self._place_back(now, columns, place)
            if back is not None:
                logits, now = self._return(back, first), self._stands[back]
                continue
            scores = scores - self.method.penalty_weights * penalty.view(tokens.shape)
            spread = torch.full_like(logits, _NEVER).scatter(1, tokens, scores)
            total = spread.log_softmax(-1).gather(1, tokens) + now.score[:, None]
            now, rows = self._grow(now, total, tokens, columns, place)
            if not rows:
                return now.finished[0][1]
            keep = torch.tensor(rows, device=logits.device)
            self.walk.select(keep)
            logits = after[keep]

    def _run(self, tokens: Tensor) -> Tensor:
        """Logits behind each candidate ``[W, C]`` of each row: ``[W · C, vocabulary]``."""
        rows = torch.arange(len(tokens), device=tokens.device)
        self.walk.select(rows.repeat_interleave(tokens.shape[1]))
        return self.walk.advance(tokens.flatten())

    @staticmethod
    def _ruled_out(logits: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """Logits with some tokens of some rows far below the rest, finite all the same."""
        if not pairs:
            return logits.float()
        made = logits.float().clone()
        index = torch.tensor(pairs, device=made.device)
        made[index[:, 0], index[:, 1]] -= OFF
        return made

    def _grow(
        self, now: _Stand, total: Tensor, tokens: Tensor, columns: Tensor, place: int
    ) -> tuple[_Stand, list[int]]:
        """The best hypotheses that are one token longer; no rows where the search has ended.

        Args:
            now: those there are.
            total: ``[W, C]`` log-probabilities of the longer ones.
            tokens: ``[W, C]``.
            columns: ``[W, C]``, what each leans on: a hypothesis takes the commonest of its row.
            place: of these tokens.

        Returns:
            The hypotheses, and the candidates among ``W · C`` that they are.
        """
        width, ends, length = self.method.beams, self.ends, place + 1
        number = min(max(2, 1 + len(ends.tokens)) * width, total.numel())
        best, index = total.flatten().topk(number)
        divisor = length**self.method.length_penalty
        finished, rows = list(now.finished), []
        leans = _commonest(columns)
        for rank, row in enumerate(index.tolist()):
            token = int(tokens.flatten()[row])
            if token not in ends.tokens and length < ends.most:
                rows.append(row)
            elif rank < width:
                ids = [*now.said[row // tokens.shape[1]], token]
                finished.append((float(best[rank] / divisor), ids))
        rows = rows[:width]
        finished = sorted(finished, key=lambda one: -one[0])[:width]
        parents = [row // tokens.shape[1] for row in rows]
        chosen = [int(tokens.flatten()[row]) for row in rows]
        self._chosen[place:] = [list(zip(parents, chosen, strict=True))]
        grown = _Stand(
            [[*now.said[one], token] for one, token in zip(parents, chosen, strict=True)],
            total.flatten()[rows],
            [[*now.columns[one], leans[one]] for one in parents],
            finished,
        )
        full = len(finished) == width
        if rows and full and float(grown.score[0] / divisor) <= finished[-1][0]:
            rows = []
        return grown, rows

    def _place_back(self, now: _Stand, columns: Tensor, place: int) -> int | None:
        """The place to go back to; None to go on."""
        if not self.method.rollbacks:
            return None
        leans = _commonest(columns)
        (column, _), *_ = Counter(sorted(leans)).most_common(1)
        counts = [
            [*past, lean].count(column) for past, lean in zip(now.columns, leans, strict=True)
        ]
        if column < self.method.first_tokens or min(counts) <= self.method.threshold:
            return None
        used = Counter(self.taken_back)
        for back in (column + 1, column):
            # What was chosen there is to be ruled out, so it must have been chosen.
            if back < place and used[back] < self.method.rollbacks:
                return back
        return None

    def _return(self, place: int, first: Tensor) -> Tensor:
        """Go back in front of a place, where what was chosen is out; its logits ``[W, …]``."""
        self.taken_back.append(place)
        self._out = {at: pairs for at, pairs in self._out.items() if at <= place}
        self._out.setdefault(place, []).extend(self._chosen[place])
        said = torch.tensor(self._stands[place].said, device=first.device)
        self._home()
        rows = torch.zeros(len(said), dtype=torch.long, device=first.device)
        self.walk.select(rows)
        logits = first[rows]
        for column in said.unbind(1):
            logits = self.walk.advance(column.long())
        return logits


def _commonest(columns: Tensor) -> list[int]:
    """Of each row ``[W, C]`` the commonest entry; of equally common ones the smallest."""
    return [Counter(sorted(row)).most_common(1)[0][0] for row in columns.tolist()]
