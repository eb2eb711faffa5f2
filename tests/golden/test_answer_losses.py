"""Every loss on answers against a slow reference written with loops from its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attacks.answers import dlr, log_odds, option_gap, option_margin, targeted_dlr

ROWS, OPTIONS = 6, 5


@pytest.fixture
def logprobs() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(ROWS, OPTIONS, generator=generator) * 3).log_softmax(-1)


RIGHT = [0, 1, 2, 3, 4, 0]
TARGET = [1, 0, 4, 2, 3, 3]


def best_other(row: list[float], right: int) -> float:
    return max(value for place, value in enumerate(row) if place != right)


def test_margin(logprobs: Tensor) -> None:
    rows = logprobs.tolist()
    wanted = [row[y] - best_other(row, y) for row, y in zip(rows, RIGHT, strict=True)]
    found = option_margin(logprobs, torch.tensor(RIGHT))
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)
    right = logprobs.argmax(1) == torch.tensor(RIGHT)
    assert torch.equal(found > 0, right)


def test_gap(logprobs: Tensor) -> None:
    rows = logprobs.tolist()
    wanted = [row[y] - row[t] for row, y, t in zip(rows, RIGHT, TARGET, strict=True)]
    found = option_gap(logprobs, torch.tensor(RIGHT), torch.tensor(TARGET))
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)


def test_dlr_as_in_the_paper_but_for_its_sign(logprobs: Tensor) -> None:
    wanted = []
    for row, y in zip(logprobs.tolist(), RIGHT, strict=True):
        falling = sorted(row, reverse=True)
        wanted.append((row[y] - best_other(row, y)) / (falling[0] - falling[2]))
    found = dlr(logprobs, torch.tensor(RIGHT))
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)
    assert found.max() <= 1 + 1e-6


def test_targeted_dlr(logprobs: Tensor) -> None:
    wanted = []
    for row, y, t in zip(logprobs.tolist(), RIGHT, TARGET, strict=True):
        falling = sorted(row, reverse=True)
        wanted.append((row[y] - row[t]) / (falling[0] - (falling[2] + falling[3]) / 2))
    found = targeted_dlr(logprobs, torch.tensor(RIGHT), torch.tensor(TARGET))
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("shift_and_scale", [(3.0, 1.0), (0.0, 40.0), (-2.0, 0.01)])
def test_dlr_ignores_shift_and_scale_of_the_logits(
    logprobs: Tensor, shift_and_scale: tuple[float, float]
) -> None:
    shift, scale = shift_and_scale
    moved = logprobs * scale + shift
    right, target = torch.tensor(RIGHT), torch.tensor(TARGET)
    for one, two in (
        (dlr(logprobs, right), dlr(moved, right)),
        (targeted_dlr(logprobs, right, target), targeted_dlr(moved, right, target)),
    ):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def test_log_odds() -> None:
    chances = [1e-6, 0.1, 0.5, 0.9, 0.999]
    wanted = [math.log(p / (1 - p)) for p in chances]
    found = log_odds(torch.tensor(chances, dtype=torch.float64).log())
    assert found.tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_log_odds_of_a_certain_answer_are_finite_with_a_slope() -> None:
    certain = torch.tensor([0.0, -1e-9], requires_grad=True)
    found = log_odds(certain)
    assert found.isfinite().all()
    (slope,) = torch.autograd.grad(found.sum(), certain)
    assert slope.isfinite().all()
    assert (slope > 0).all()
