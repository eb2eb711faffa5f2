"""OPERA's penalty and its search against slow ones written from the formulas, without any cache."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from defenses.base import DefenseError
from defenses.decoding import OFF
from defenses.opera import OPERA, Retrospection, Trail
from targets.decoding.search import Ends, Walk

PROMPT, WORDS, HEADS = 5, 14, 3
VISUAL = (1, 2, 3)


def drawn(said: list[int], what: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash((what, *said)) % 2**31)


class Speaker:
    """A model that is a table: what it says and attends to follows from the tokens alone."""

    def __init__(self, seed: int, leaning: int | None, end: float = -2.0) -> None:
        self.seed, self.leaning, self.end = seed, leaning, end

    def logits(self, said: list[int]) -> Tensor:
        found = torch.randn(WORDS, generator=drawn(said, 2 * self.seed)) * 2
        found[0] += self.end
        return found

    def attention(self, said: list[int]) -> Tensor:
        """Of the last token, ``[heads, columns]``; on column `leaning` of the answer, mostly."""
        found = torch.rand(HEADS, PROMPT + len(said), generator=drawn(said, 2 * self.seed + 1))
        if self.leaning is not None and len(said) > self.leaning:
            found[:, PROMPT + self.leaning] += 6
        return found / found.sum(1, keepdim=True)


class Rows:
    """The same model as a walk: rows that grow, are repeated, left out and taken back."""

    def __init__(self, speaker: Speaker, method: OPERA) -> None:
        self.speaker, self.rows = speaker, [[]]  # type: ignore[var-annotated]
        self.trail = Trail(method.scale_factor)
        self.walk = Walk(self.start, self.advance, self.select, self.mark, self.trail)

    def start(self) -> Tensor:
        return torch.stack([self.speaker.logits(row) for row in self.rows])

    def advance(self, tokens: Tensor) -> Tensor:
        self.rows = [[*row, token] for row, token in zip(self.rows, tokens.tolist(), strict=True)]
        weights = torch.stack([self.speaker.attention(row) for row in self.rows])
        visual = torch.zeros(len(self.rows), weights.shape[2], dtype=torch.bool)
        visual[:, VISUAL] = True
        self.trail.note(weights, visual, len(self.rows[0]))
        return self.start()

    def select(self, rows: Tensor) -> None:
        self.rows = [self.rows[row] for row in rows.tolist()]
        self.trail.select(rows)

    def mark(self) -> Callable[[], None]:
        rows, notes = self.rows, self.trail.mark()

        def back() -> None:
            self.rows = rows
            notes()

        return back


def slow_penalty(speaker: Speaker, method: OPERA, said: list[int]) -> tuple[float, int]:
    """What the last token's logit falls by, and the column: products written out."""
    rows = []
    for length in range(1, len(said) + 1):
        most = speaker.attention(said[:length]).amax(0)
        rows.append((most / most.sum()).tolist())
    products = []
    for column in range(len(said)):
        product = 1.0
        for row in range(column, len(said)):
            product *= method.scale_factor * rows[row][PROMPT + column]
        products.append(product)
    column = products.index(max(products))
    if len(said) <= method.first_tokens:
        return -sum(rows[-1][at] for at in VISUAL), column
    return min(OFF, method.damping * products[column]), column


def mode(values: list[int]) -> int:
    counts = Counter(values)
    return min(counts, key=lambda one: (-counts[one], one))


def slow_search(speaker: Speaker, method: OPERA, ends: Ends) -> tuple[list[int], list[int]]:
    """The best answer and the places hypotheses were taken back to; all from the tokens."""
    out: dict[int, set[tuple[int, int]]] = {}
    stands, chosen, gone = {}, {}, []  # type: ignore[var-annotated]
    hypotheses: list[tuple[float, list[int], list[int]]] = [(0.0, [], [])]
    finished: list[tuple[float, list[int]]] = []
    while True:
        place = len(hypotheses[0][1])
        stands[place] = hypotheses, finished
        grown, leans = [], []
        for row, (score, said, _) in enumerate(hypotheses):
            values = speaker.logits(said).tolist()
            values = [v - OFF * ((row, t) in out.get(place, ())) for t, v in enumerate(values)]
            best = sorted(range(WORDS), key=lambda t: -values[t])[: method.num_attn_candidates]
            fallen = {t: slow_penalty(speaker, method, [*said, t]) for t in best}
            logits = {t: values[t] - method.penalty_weights * fallen[t][0] for t in best}
            top = max(logits.values())
            total = top + math.log(sum(math.exp(v - top) for v in logits.values()))
            leans.append(mode([fallen[t][1] for t in best]))
            grown += [(score + logits[t] - total, row, t) for t in best]
        column = mode(leans)
        counts = [[*h[2], lean].count(column) for h, lean in zip(hypotheses, leans, strict=True)]
        if method.rollbacks and column >= method.first_tokens and min(counts) > method.threshold:
            free = [
                p for p in (column + 1, column) if p < place and gone.count(p) < method.rollbacks
            ]
            if free:
                back = free[0]
                gone.append(back)
                out = {p: pairs for p, pairs in out.items() if p <= back}
                out[back] = out.get(back, set()) | set(chosen[back])
                hypotheses, finished = stands[back]
                continue
        grown.sort(key=lambda one: -one[0])
        grown = grown[: max(2, 1 + len(ends.tokens)) * method.beams]
        ended = finished[:]
        for rank, (score, row, token) in enumerate(grown):
            if (token in ends.tokens or place + 1 == ends.most) and rank < method.beams:
                said = [*hypotheses[row][1], token]
                ended.append((score / len(said) ** method.length_penalty, said))
        finished = sorted(ended, key=lambda one: -one[0])[: method.beams]
        going = [one for one in grown if one[2] not in ends.tokens][: method.beams]
        if not going or place + 1 == ends.most:
            return finished[0][1], gone
        chosen[place] = [(row, token) for _, row, token in going]
        reach = going[0][0] / (place + 1) ** method.length_penalty
        if len(finished) == method.beams and reach <= finished[-1][0]:
            return finished[0][1], gone
        hypotheses = [
            (score, [*hypotheses[row][1], token], [*hypotheses[row][2], leans[row]])
            for score, row, token in going
        ]


def searched(speaker: Speaker, method: OPERA, ends: Ends) -> tuple[list[int], list[int]]:
    rows = Rows(speaker, method)
    search = Retrospection(method, rows.walk, rows.trail, ends)
    return search.answer(rows.start()), search.taken_back


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("damping", [1.0, 1e-7])
def test_the_penalty_is_the_formula(first: int, damping: float) -> None:
    speaker, method = Speaker(3, 2), OPERA(first_tokens=first, damping=damping)
    rows = Rows(speaker, method)
    rows.rows = [[], [], []]
    columns = torch.tensor([[4, 1, 7, 7, 2, 9], [5, 5, 1, 3, 8, 2], [0, 6, 6, 2, 1, 1]]).unbind(1)
    for length, tokens in enumerate(columns, 1):
        rows.advance(tokens)
        found, at = method.penalty(rows.trail, length)
        for row in range(3):
            wanted, column = slow_penalty(speaker, method, rows.rows[row])
            assert float(found[row]) == pytest.approx(wanted, rel=1e-5)
            assert int(at[row]) == column


def test_products_of_any_length_stay_finite() -> None:
    trail = Trail(50.0)
    for length in range(1, 401):
        weights = torch.zeros(1, 1, length)
        weights[..., 0] = 1
        trail.note(weights, torch.zeros(1, length, dtype=torch.bool), length)
    found, column = OPERA().penalty(trail, 400)
    assert float(found) == pytest.approx(OFF)
    assert int(column) == 0


def test_what_a_cache_has_forgotten_is_attended_to_no_more() -> None:
    trail = Trail(50.0)
    for length in range(1, 6):
        columns = min(length + 1, 3)
        weights = torch.full((1, 1, columns), 1 / columns)
        trail.note(weights, torch.zeros(1, columns, dtype=torch.bool), length)
    assert trail.products.shape == (1, 5)
    assert bool((trail.products[0, :2] < -500).all())
    third = math.log(50 / 3)
    assert trail.products[0, 2:].tolist() == pytest.approx([3 * third, 2 * third, third])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weight", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("width", [1, 3])
def test_the_search_is_the_slow_one(seed: int, weight: float, width: int) -> None:
    method = OPERA(
        beams=width,
        num_attn_candidates=4,
        penalty_weights=weight,
        first_tokens=2,
        threshold=2,
        damping=1e-2,
        rollbacks=2,
    )
    ends = Ends((0, 5), 1, 9)
    for leaning, end in ((None, 2.0), (2, -9.0), (3, 0.0)):
        speaker = Speaker(seed, leaning, end)
        assert searched(speaker, method, ends) == slow_search(speaker, method, ends)


def test_hypotheses_go_back_behind_what_they_lean_on() -> None:
    """All lean on the token at place 3 from there on: back to 4, twice; to 3, twice; then on."""
    speaker, ends = Speaker(1, 3, -99.0), Ends((0,), 1, 12)
    method = OPERA(beams=2, first_tokens=2, threshold=3, rollbacks=2)
    answer, back = searched(speaker, method, ends)
    assert back == [4, 4, 3, 3]
    assert len(answer) == 12
    plain, never = searched(speaker, OPERA(beams=2, first_tokens=2, rollbacks=0), ends)
    assert never == []
    assert answer[:3] == plain[:3]
    assert answer != plain


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"threshold": 15}, "leaned on too rarely"),
        ({"first_tokens": 4}, "within the first tokens"),
        ({"rollbacks": 0}, "switched off"),
    ],
)
def test_hypotheses_do_not_go_back(options: dict[str, int], why: str) -> None:
    method = OPERA(**{"beams": 2, "first_tokens": 2, "threshold": 3} | options)  # type: ignore[arg-type]
    assert searched(Speaker(1, 3, -99.0), method, Ends((0,), 1, 12))[1] == [], why


def test_what_was_chosen_is_ruled_out() -> None:
    speaker, ends = Speaker(1, 3, -99.0), Ends((0,), 1, 10)
    method = OPERA(beams=1, num_attn_candidates=3, first_tokens=2, threshold=3, rollbacks=1)
    once, back = searched(speaker, method, ends)
    assert back[0] == 4
    never, _ = searched(
        speaker, OPERA(beams=1, num_attn_candidates=3, first_tokens=2, rollbacks=0), ends
    )
    assert once[:3] == never[:3]
    assert once[4] != never[4] or once[3] != never[3]


def test_one_candidate_without_a_penalty_is_greedy() -> None:
    speaker = Speaker(5, None, 1.0)
    method = OPERA(beams=4, num_attn_candidates=1, penalty_weights=0, rollbacks=1)
    found, _ = searched(speaker, method, Ends((0,), 1, 8))
    wanted: list[int] = []
    while len(wanted) < 8 and 0 not in wanted:
        wanted.append(int(speaker.logits(wanted).argmax()))
    assert found == wanted


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threshold": 0}, r"threshold is 0; allowed is Ge\(ge=1\)"),
        ({"num_attn_candidates": 0}, "num_attn_candidates is 0"),
        ({"penalty_weights": -1.0}, "penalty_weights is -1.0"),
        ({"rollbacks": -1}, "rollbacks is -1"),
        ({"damping": 0.0}, "damping is 0.0"),
        ({"scale_factor": 0.0}, "scale_factor is 0.0"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, float], says: str) -> None:
    with pytest.raises(DefenseError, match=says):
        OPERA(**options)  # type: ignore[arg-type]
