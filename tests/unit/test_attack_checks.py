"""Each self-check has a case that fires it and one that does not."""

from __future__ import annotations

import math

import pytest

from attacks.checks import (
    no_progress,
    not_decreasing,
    run_checks,
    silent_success,
    unfinished,
    zero_gradient,
)

SETTLED = [1.0, 0.5, 0.2, 0.1, *[0.05] * 26]
"""Falls fast, then rests: nothing to complain about."""


@pytest.mark.parametrize("gradients", [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0]])
def test_zero_gradient_fires(gradients: list[float]) -> None:
    message = zero_gradient(gradients)
    assert message is not None
    assert message.startswith("zero-gradient:")
    assert "straight-through" in message


@pytest.mark.parametrize("gradients", [[1e-20, 1.0], [1.0, 1.0, 0.0], []])
def test_zero_gradient_is_silent(gradients: list[float]) -> None:
    assert zero_gradient(gradients) is None


@pytest.mark.parametrize("losses", [[1.0, 1.0, 1.0], [0.5, 0.8, 0.9], [3.0, 3.0 - 1e-7]])
def test_no_progress_fires(losses: list[float]) -> None:
    message = no_progress(losses)
    assert message is not None
    assert message.startswith("no-progress:")
    assert "alpha" in message


@pytest.mark.parametrize("losses", [SETTLED, [1.0, 2.0, 0.9], [1.0], []])
def test_no_progress_is_silent(losses: list[float]) -> None:
    assert no_progress(losses) is None


def test_not_decreasing_fires_when_the_run_climbs_back() -> None:
    message = not_decreasing([1.0, 0.2, 0.9, 1.5, 1.4, 1.6])
    assert message is not None
    assert message.startswith("not-decreasing:")
    assert "Lower alpha" in message


@pytest.mark.parametrize("losses", [SETTLED, [1.0, 0.9], [1.0, 1.0, 1.0, 1.0]])
def test_not_decreasing_is_silent(losses: list[float]) -> None:
    assert not_decreasing(losses) is None  # the last is for no_progress to say


def test_unfinished_fires_while_the_best_loss_still_moves() -> None:
    message = unfinished([1.0 - 0.02 * step for step in range(30)])
    assert message is not None
    assert message.startswith("unfinished: 34%")
    assert "Raise steps" in message


@pytest.mark.parametrize("losses", [SETTLED, [1.0, 1.0], [2.0]])
def test_unfinished_is_silent(losses: list[float]) -> None:
    assert unfinished(losses) is None


def test_steps_that_were_not_judged_are_left_out() -> None:
    gaps = [value for loss in SETTLED for value in (loss, math.nan)]
    assert run_checks(gaps, [1.0, math.nan, 1.0]) == ()


def test_all_messages_of_a_sample_are_given() -> None:
    codes = [message.split(":")[0] for message in run_checks([1.0, 1.0, 1.0, 1.0], [0.0, 0.0])]
    assert codes == ["zero-gradient", "no-progress"]


def test_a_sample_without_optimisation_has_nothing_to_check() -> None:
    assert run_checks([], []) == ()


def test_silent_success_fires_where_a_worse_image_was_kept() -> None:
    message = silent_success([1.0, 0.2, 0.6], 0.6)
    assert message is not None
    assert message.startswith("silent-success: ")
    assert run_checks([1.0, 0.2, 0.6], [1.0, 1.0], 0.6)[-1] == message


@pytest.mark.parametrize("kept", [0.2, 0.2 + 1e-7, 0.1, None])
def test_silent_success_is_silent(kept: float | None) -> None:
    assert silent_success([1.0, 0.2, 0.6], kept) is None
    assert silent_success([0.1, 0.3], kept) is None, "there is no way between start and end"
