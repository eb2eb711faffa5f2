"""Token Sparse Attention against loops over heads, queries and columns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from seen import spoiled
from sight import Prompt, normal, prompt
from torch import Tensor

from targets.compression.base import Cut, Stage
from targets.compression.raters import all_keys, compact
from targets.compression.sparse_heads import (
    Columns,
    covered_number,
    kept_by_heads,
    shares,
    short_attention,
    window_mass,
)
from targets.compression.token_sparse_attention import TokenSparseAttention
from targets.compression.trace import choose
from targets.errors import CompressionError

ROWS = ((2, 30, 6), (1, 12, 3, 9, 2), (4, 16))
"""One image; two images; an image with nothing behind it."""
DEAD = ((0, 3), (0, 20), (1, 0), (2, 8), (3, 5))
CUT = Cut(Stage.LAYER, None, 8)
ONE = TokenSparseAttention(coverage=0.2, window=4)
OFFICIAL = replace(ONE, variant="official", min_tokens=5, window=7)
HEADS = 3


def made(seed: int = 0, dead: Any = DEAD, rows: Any = ROWS) -> Prompt:
    return prompt(rows, 99, seed=seed, dead=dead, cut=CUT, answers=2, heads=HEADS)


def columns_of(one: TokenSparseAttention, given: Prompt) -> Columns:
    return one._columns(given.text.slots, given.text.live, given.text.last)


def images(given: Prompt, row: int) -> list[int]:
    found = [c for i, cs in enumerate(given.columns) if int(given.seen.rows[i]) == row for c in cs]
    return sorted(found)


def slow_parts(one: TokenSparseAttention, given: Prompt, row: int) -> tuple[list[int], ...]:
    """Prompt, window and droppable columns."""
    live = given.text.live[row].nonzero().flatten().tolist()
    every = [c for c in live if c <= given.text.last]
    if one.variant == "official":
        window = every[-7:]
        return every, window, [c for c in every if c not in window]
    behind = given.words(row)
    window = behind[-4:] if behind else every[-1:]
    return every, window, [c for c in images(given, row) if c not in window]


def slow_mass(one: TokenSparseAttention, given: Prompt, row: int, head: int) -> dict[int, float]:
    every, window, free = slow_parts(one, given, row)
    earlier = [c for c in every if c not in window]
    paid = [given.attention(row, head, query) for query in window]
    mass = [sum(p.get(c, 0.0) for p in paid) / len(window) for c in earlier]
    smooth = {}
    for i, c in enumerate(earlier):
        smooth[c] = sum(mass[j] for j in range(i - 3, i + 4) if 0 <= j < len(mass)) / 7
    return {c: smooth[c] for c in free}


def slow_share(one: TokenSparseAttention, given: Prompt, row: int) -> dict[int, float]:
    heads = [slow_mass(one, given, row, head) for head in range(HEADS)]
    mean = {c: sum(h[c] for h in heads) / HEADS for c in heads[0]}
    return {c: m / (sum(mean.values()) + 1e-8) for c, m in mean.items()}


def slow_number(share: dict[int, float], coverage: float, least: int) -> int:
    total, number = 0.0, 0
    for one in sorted(share.values()):
        total += one
        if total >= coverage:
            break
        number += 1
    number = number + 1 if number else 0
    return min(number, max(0, len(share) - least))


def fast_mass(one: TokenSparseAttention, given: Prompt) -> Tensor:
    text, columns = given.text, columns_of(one, given)
    where, _ = compact(columns.window)
    assert text.rope is not None
    queries = text.family.text_queries(8, text.hidden, text.rope, where)
    return window_mass(queries, all_keys(text), 1.5, columns, None, 7)


@pytest.mark.parametrize("one", [ONE, OFFICIAL], ids=["image_only", "official"])
@pytest.mark.parametrize("dead", [(), DEAD])
@pytest.mark.parametrize("seed", range(2))
def test_heads_keep_what_the_loops_keep(one: TokenSparseAttention, dead: Any, seed: int) -> None:
    given = made(seed, dead)
    columns, mass = columns_of(one, given), fast_mass(one, given)
    number = one._number(shares(mass), columns, given.text.slots)
    kept = kept_by_heads(mass, columns, number)
    assert int(number.amax()) > 2
    for row in range(3):
        every, window, free = slow_parts(one, given, row)
        assert columns.window[row].nonzero().flatten().tolist() == window
        assert columns.free[row].nonzero().flatten().tolist() == free
        share = slow_share(one, given, row)
        count = slow_number(share, 0.2, 5 if one.variant == "official" else 1)
        assert int(number[row]) == count
        for head in range(HEADS):
            truth = slow_mass(one, given, row, head)
            ours = {c: float(mass[row, head, c]) for c in free}
            assert ours == pytest.approx(truth, abs=1e-9)
            gone = sorted(free, key=lambda c: truth[c])[:count]
            expected = [c for c in every if c not in gone]
            assert kept[row, head].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("one", [ONE, OFFICIAL], ids=["image_only", "official"])
def test_score_is_the_share_at_the_tokens(one: TokenSparseAttention) -> None:
    given = made(1)
    scores, selection = choose(one, given.seen)
    for image, columns in enumerate(given.columns):
        row = int(given.seen.rows[image])
        share = slow_share(one, given, row)
        valid = given.seen.valid[image]
        truth = [share.get(c, max(share.values())) for c in columns]
        assert scores.score[image][valid].tolist() == pytest.approx(truth, abs=1e-9)
        count = slow_number(share, 0.2, 5 if one.variant == "official" else 1)
        gone = sorted(share, key=lambda c: share[c])[:count]
        kept = selection.kept[image][valid].tolist()
        assert kept == [c not in gone for c in columns]


def test_the_default_coverage_is_the_official_one() -> None:
    given = made(2)
    share = shares(fast_mass(ONE, given))
    columns = columns_of(ONE, given)
    default = TokenSparseAttention(window=4)._number(share, columns, given.text.slots)
    stated = TokenSparseAttention(window=4, coverage=0.005)
    assert torch.equal(default, stated._number(share, columns, given.text.slots))
    assert OFFICIAL.window == 7
    official = replace(OFFICIAL, window=None, min_tokens=None, coverage=None)
    assert bool(official._columns(given.text.slots, given.text.live, given.text.last).window.any())
    assert official._number(share, columns, given.text.slots).tolist() == [0, 0, 0]  # below 1024


def test_numbers_of_a_coverage() -> None:
    share = torch.tensor([[0.1, 0.0, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25, 9.0]])
    free = torch.tensor([[True] * 5, [True] * 4 + [False]])
    found = {c: covered_number(share, free, c).tolist() for c in (0.0, 0.05, 0.15, 0.35, 0.9)}
    # A running total below the coverage goes, and one more.
    assert found == {0.0: [0, 0], 0.05: [2, 0], 0.15: [3, 0], 0.35: [4, 2], 0.9: [5, 4]}


def test_budgets_count_the_tokens_each_head_drops() -> None:
    given = made(3, dead=())
    for one, wanted in (
        (TokenSparseAttention(retention=0.5, window=4), [15, 6 + 5, 8]),
        (TokenSparseAttention(keep_tokens=10, window=4), [20, 2 + 0, 6]),
        (TokenSparseAttention(retention=1.0, window=4), [0, 0, 0]),
        (TokenSparseAttention(keep_tokens=1, window=4, min_tokens=12), [18, 9, 3]),
    ):
        columns, mass = columns_of(one, given), fast_mass(one, given)
        number = one._number(shares(mass), columns, given.text.slots)
        assert number.tolist() == wanted
        kept = kept_by_heads(mass, columns, number)
        gone = (columns.prompt[:, None] & ~kept).sum(2)
        assert gone.tolist() == [[n] * HEADS for n in wanted]


def test_of_equal_columns_the_first_stay() -> None:
    given = made(0, dead=(), rows=ROWS[:1])
    columns = columns_of(ONE, given)
    mass = torch.zeros(1, 2, columns.live.shape[1])
    kept = kept_by_heads(mass, columns, torch.tensor([25]))
    places = images(given, 0)
    assert kept[0, 1].nonzero().flatten().tolist() == sorted([*places[:5], *given.words(0), 0, 1])


# The attention itself ---------------------------------------------------------------------------


def slow_attention(
    parts: tuple[Tensor, ...], kept: Tensor, columns: Columns, allowed: Tensor | None, row: int
) -> Tensor:
    queries, keys, values = parts
    out = torch.zeros_like(queries[row])
    for head in range(HEADS):
        inside = kept[row, head].nonzero().flatten().tolist()
        live = columns.live[row].nonzero().flatten().tolist()
        for c in range(queries.shape[2]):
            if c not in inside and (c <= columns.last or c not in live):
                continue
            source = inside if c <= columns.last else live
            may = [j for j in source if (j <= c if allowed is None else bool(allowed[row, c, j]))]
            logits = [0.7 * float(queries[row, head, c] @ keys[row, head, j]) for j in may]
            top = max(logits)
            weights = [math.exp(logit - top) for logit in logits]
            total = sum(weights)
            for w, j in zip(weights, may, strict=True):
                out[head, c] += w / total * values[row, head, j]
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("answers", [0, 2])
def test_short_attention_is_attention_among_the_kept(causal: bool, answers: int) -> None:
    given = prompt(ROWS, 9, seed=5, dead=DEAD, cut=CUT, answers=answers, heads=HEADS)
    columns = columns_of(ONE, given)
    length = columns.live.shape[1]
    parts = tuple(normal(3, HEADS, length, 6, seed=s) for s in (1, 2, 3))
    allowed = None
    if not causal:
        noise = normal(3, length, length, seed=9) > -0.5
        allowed = noise | torch.eye(length, dtype=torch.bool)
    mass = normal(3, HEADS, length, seed=4).abs() * columns.free[:, None]
    kept = kept_by_heads(mass, columns, torch.tensor([12, 3, 0]))
    ours = short_attention(parts, kept, columns, allowed, None, scaling=0.7)  # type: ignore[arg-type]
    for row in range(3):
        truth = slow_attention(parts, kept, columns, allowed, row)
        live = columns.live[row]
        assert torch.allclose(ours[row][:, live], truth[:, live])
        dropped = columns.prompt[row] & ~kept[row]
        assert bool((ours[row][dropped] == 0).all())


def test_a_bias_is_added_to_its_columns() -> None:
    given = made(0)
    columns = columns_of(ONE, given)
    length = columns.live.shape[1]
    queries, keys, values = (normal(3, HEADS, length, 6, seed=s) for s in (1, 2, 3))
    bias = normal(3, length, seed=8)
    mass = normal(3, HEADS, length, seed=4).abs() * columns.free[:, None]
    kept = kept_by_heads(mass, columns, torch.tensor([12, 3, 5]))
    ours = short_attention((queries, keys, values), kept, columns, None, bias, scaling=0.7)
    # The same as one more dimension in queries and keys.
    ones = torch.ones_like(queries[..., :1]) / 0.7
    more = torch.cat([keys, bias[:, None, :, None].expand(-1, HEADS, -1, 1)], -1)
    wide = torch.cat([values, torch.zeros_like(ones)], -1)
    parts = (torch.cat([queries, ones], -1), more, wide)
    truth = short_attention(parts, kept, columns, None, None, scaling=0.7)[..., :-1]
    live = columns.live[:, None, :, None]
    assert torch.allclose(ours * live, truth * live)


# Sense and nonsense -----------------------------------------------------------------------------


@pytest.mark.parametrize("one", [ONE, OFFICIAL], ids=["image_only", "official"])
def test_a_row_alone_is_treated_as_in_the_batch(one: TokenSparseAttention) -> None:
    dead = ((0, 3), (0, 20))
    (many, kept), (single, own) = (
        choose(one, made(6, dead, rows).seen) for rows in (ROWS, ROWS[:1])
    )
    assert torch.equal(own.kept[0], kept.kept[0, :30])
    assert torch.allclose(single.score[0], many.score[0, :30])


def test_garbage_where_no_token_is_changes_nothing() -> None:
    given = made(7)
    text = given.text
    dirty = replace(text, hidden=text.hidden.masked_fill(~text.live[..., None], -77.0))
    (clean, kept), (other, same) = (
        choose(ONE, one) for one in (given.seen, replace(spoiled(given.seen), text=dirty))
    )
    assert torch.equal(kept.kept, same.kept)
    assert torch.allclose(clean.score, other.score, rtol=0, atol=1e-12)


def test_score_gradient_agrees_with_finite_differences() -> None:
    given = made(8)
    weights = normal(*given.seen.valid.shape, seed=1)
    direction = normal(*given.text.hidden.shape, seed=2) * given.text.live[..., None]

    def loss(hidden: Tensor) -> Tensor:
        scores = ONE.score(replace(given.seen, text=replace(given.text, hidden=hidden)))
        return (scores.log_score * weights)[given.seen.valid].sum()

    hidden = given.text.hidden.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(hidden), hidden)
    assert bool(gradient.isfinite().all())
    step = 1e-6
    forth, back = (loss(given.text.hidden + s * step * direction) for s in (1, -1))
    slope = float((gradient * direction).sum())
    assert abs(slope) > 1e-2
    assert float(forth - back) / 2 / step == pytest.approx(slope, rel=1e-4)


def test_layers_and_budgets() -> None:
    assert TokenSparseAttention().sparse(32) == tuple(range(16, 32))
    assert TokenSparseAttention(layers=(1, 3)).sparse(4) == (1, 3)
    (cut,) = TokenSparseAttention(layers=(1, 3)).cuts(4)
    assert (cut.layer, cut.reads) == (None, 1)
    assert TokenSparseAttention(retention=0.1).count(cut, 576, 32) == 576  # nothing is removed


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"coverage": 1.0}, "coverage is 1.0"),
        ({"coverage": 0.1, "retention": 0.5}, "not both"),
        ({"retention": 0.5, "keep_tokens": 3}, "exactly one"),
        ({"retention": 0.0}, "retention"),
        ({"kernel": 4}, "an odd number"),
        ({"window": 0}, "window is 0"),
        ({"min_tokens": 0}, "min_tokens is 0"),
        ({"layers": (3, 1)}, "ascending"),
    ],
)
def test_options_are_checked(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(CompressionError, match=reason):
        TokenSparseAttention(**options)
    with pytest.raises(CompressionError, match="layer 9 does not exist"):
        TokenSparseAttention(layers=(2, 9)).cuts(4)
