"""The Square Attack against its paper: schedule, squares, bumps, and the search itself."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attacks import Square
from attacks.budget import Budget, norms, quantise
from attacks.seeds import SeedBank
from attacks.square import (
    bump,
    odd_side,
    opposite_bumps,
    repaint,
    share_at,
    shift,
    stripes,
    tiles,
    window_side,
)
from targets.base import Batch, Knowledge
from tests.fakes import FakeView, make_batch, pick

SEEDS = [1, 2, 3, 4]
EPSILON = 16 / 255


BOUNDS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Of 10,000 iterations, in the paper's text."""


@pytest.mark.parametrize(
    ("step", "halvings"),
    [(bound + late, number + late) for number, bound in enumerate(BOUNDS) for late in (0, 1)],
)
def test_p_is_halved_where_the_paper_halves_it(step: int, halvings: int) -> None:
    assert share_at(0.8, step, 10_000) == 0.8 / 2**halvings
    assert share_at(0.8, step * 2, 20_000) == 0.8 / 2**halvings  # rescaled to the budget


def test_sides_cover_the_share() -> None:
    assert window_side(0.8, (96, 96)) == 86
    assert window_side(0.8 / 512, (96, 96)) == 4
    assert window_side(1e-9, (96, 96)) == 1
    assert window_side(1.0, (40, 90)) == 40  # never larger than the picture
    assert odd_side(1e-9, (96, 96)) == 3
    assert all(odd_side(share, (24, 24)) % 2 for share in (0.01, 0.1, 0.3, 0.9, 1.0))


def test_bumps_are_nested_rectangles() -> None:
    """Summed rectangle by rectangle, each twice as far out with a quarter of the weight …"""
    for height, width in ((1, 3), (2, 5), (3, 7), (6, 6)):
        wanted = torch.zeros(height, width)
        for reach in range(max(height, width) // 2 + 1):
            for row in range(height):
                for column in range(width):
                    if max(abs(row - height // 2), abs(column - width // 2)) <= reach:
                        wanted[row, column] += 1 / (reach + 1) ** 2
        wanted /= math.sqrt(float(wanted.square().sum()))
        torch.testing.assert_close(bump(height, width), wanted)
    both = opposite_bumps(7)
    assert float(both.norm()) == pytest.approx(1)
    assert (both[:3] > 0).all()
    assert (both[3:] < 0).all()


def changed(before: Tensor, after: Tensor) -> list[tuple[int, int, int, int]]:
    """Bounding box of what changed, per sample: top, bottom, left, right, inclusive."""
    found = []
    for one, two in zip(before, after, strict=True):
        spots = (one != two).any(0).nonzero()
        low, high = spots.amin(0).tolist(), spots.amax(0).tolist()
        found.append((low[0], high[0], low[1], high[1]))
    return found


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 16), st.integers(0, 10_000), st.integers(0, 50))
def test_a_square_repaints_one_window_with_one_sign_per_colour(
    side: int, seed: int, level: int
) -> None:
    batch = make_batch(3, seed=seed % 7)
    budget = Budget((level + 1) / 255)
    rng = SeedBank([seed, seed + 1, seed + 2])
    before = stripes(batch.images, budget, rng)
    after = repaint(before, side, rng)
    assert after.abs().sub(budget.epsilon).abs().max() < 1e-9
    for row, (top, bottom, left, right) in enumerate(changed(before, after)):
        assert bottom - top < side
        assert right - left < side
        window = after[row, :, top : bottom + 1, left : right + 1]
        moved = (before[row] != after[row])[:, top : bottom + 1, left : right + 1]
        for colour in range(3):
            assert len(window[colour][moved[colour]].unique()) <= 1
    inside = quantise(batch.images, batch.images + after, budget)
    assert float((inside - batch.images).abs().max()) <= budget.epsilon + 1e-7


def test_starts() -> None:
    clean = make_batch(3).images
    linf = stripes(clean, Budget(EPSILON), SeedBank(SEEDS[:3]))
    assert (linf == linf[:, :, :1]).all()  # columns
    assert linf.abs().unique().numel() == 1
    assert not torch.equal(linf[0], linf[1])
    l2 = tiles(clean, Budget(1.5, "l2"), SeedBank(SEEDS[:3]))
    torch.testing.assert_close(norms(l2)[1].float(), torch.full((3,), 1.5))


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([3, 5, 7, 9, 15]), st.integers(0, 10_000))
def test_l2_proposals_keep_the_length_and_empty_one_window(side: int, seed: int) -> None:
    clean = make_batch(3, seed=seed % 7).images
    budget = Budget(1.2, "l2")
    rng = SeedBank([seed, seed + 1, seed + 2])
    before = tiles(clean, budget, rng)
    after = shift(clean, before, budget, side, rng)
    torch.testing.assert_close(norms(after)[1].float(), torch.full((3,), 1.2))
    saved = quantise(clean, clean + after, budget)
    assert float(norms(saved - clean)[1].max()) <= 1.2 + 1e-6
    assert (after != before).flatten(1).any(1).all()


def test_an_l2_move_is_algorithm_3() -> None:
    """One sample on a mid-grey picture, so that nothing is clipped, colour by colour."""
    clean = torch.full((1, 3, 16, 16), 0.5)
    budget, side = Budget(0.8, "l2"), 5
    before = tiles(clean, budget, SeedBank([3]))
    after = shift(clean, before, budget, side, SeedBank([4]))
    draws = SeedBank([4])  # the same numbers in the same order
    (r1, c1), (r2, c2) = ((draws.uniform((2,)) * 12).long()[0].tolist() for _ in range(2))
    pattern = opposite_bumps(side)
    if float(draws.uniform((1, 1, 1))) < 0.5:
        pattern = pattern.T
    signs = draws.signs((3, 1, 1))[0].flatten()
    wanted = before[0].clone()
    for colour in range(3):
        union = torch.zeros(16, 16, dtype=torch.bool)
        union[r1 : r1 + side, c1 : c1 + side] = union[r2 : r2 + side, c2 : c2 + side] = True
        available = math.sqrt(float(before[0, colour][union].square().sum()))
        old = before[0, colour, r1 : r1 + side, c1 : c1 + side]
        new = signs[colour] * pattern + old / old.norm()
        wanted[colour, r2 : r2 + side, c2 : c2 + side] = 0
        wanted[colour, r1 : r1 + side, c1 : c1 + side] = available * new / new.norm()
    wanted = wanted / wanted.norm() * 0.8
    torch.testing.assert_close(after[0], wanted, rtol=1e-4, atol=1e-6)


@pytest.fixture
def batch() -> Batch:
    options = (("yes", "no"), ("no", "three", "green"), (), ("1234", "no", "a", "yes"))
    answers = ("yes", "three", "open", "no")
    return replace(make_batch(4), answers=answers, options=options)


def answered(view: FakeView, batch: Batch, answers: Any = None) -> Batch:
    """The batch with what the target says as right answers, added to the options."""
    texts = view.ask(batch.images, batch.questions)
    options = tuple(
        tuple(dict.fromkeys((*row, text))) if row else ()
        for row, text in zip(batch.options or (), texts, strict=True)
    )
    return replace(batch, answers=texts, options=options)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_score_falls_and_a_stopped_sample_is_wrong(batch: Batch, norm: Any) -> None:
    view = FakeView(Knowledge.SCORES)
    right = answered(view, batch)
    assert all(right.right(right.answers))
    result = Square(queries=60, norm=norm)(view, right, 0.1 if norm == "linf" else 2.0, SEEDS)
    wrong = [not ok for ok in right.right(view.ask(result.images, right.questions))]
    assert any(wrong)
    for row, trace in enumerate(result.loss):
        assert all(later <= earlier for earlier, later in pairwise(trace))
        if wrong[row]:
            assert len(trace) < 60
        else:
            assert min(trace) < trace[0]


@pytest.mark.parametrize("queries", [1, 2, 17])
def test_no_sample_is_asked_more_often_than_declared(batch: Batch, queries: int) -> None:
    asked: dict[str, int] = {}

    class Counted(FakeView):
        def option_scores(self, images: Tensor, questions: Any, options: Any) -> Tensor:
            for question in questions:
                asked[question] = asked.get(question, 0) + 1
            return super().option_scores(images, questions, options)

        def ask(self, images: Tensor, questions: Any, *, path: Any = "compressed") -> Any:
            for question in questions:
                asked[question] = asked.get(question, 0) + 1
            return super().ask(images, questions, path=path)

    result = Square(queries=queries)(Counted(Knowledge.SCORES), batch, EPSILON, SEEDS)
    assert max(asked.values()) <= queries
    assert result.queries == math.ceil(sum(asked.values()) / 4)
    assert (result.forwards, result.backwards) == (0, 0)


def test_a_sample_does_not_depend_on_its_neighbours(batch: Batch) -> None:
    view = FakeView(Knowledge.SCORES)
    right = answered(view, batch)
    together = Square(queries=25)(view, right, EPSILON, SEEDS)
    for row in range(4):
        alone = Square(queries=25)(view, pick(right, row), EPSILON, SEEDS[row : row + 1])
        assert torch.equal(alone.images[0], together.images[row])
        assert alone.loss[0] == together.loss[row]
