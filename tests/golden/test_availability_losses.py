"""Losses of targeted and availability attacks against short slow references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.v_attack import concept_mask, concept_swap, crop_around, swaps
from attacks.verbosity import Weights, balance, certainty, ending, sameness
from targets.base import Batch


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


REAL = torch.tensor([[True, True, True, False], [True, False, False, False], [True] * 4])


def test_certainty_is_the_divergence_from_uniform() -> None:
    logprobs = torch.randn(3, 4, 5, generator=generator()).double().log_softmax(-1)
    found = certainty(logprobs, REAL)
    for row in range(3):
        terms = []
        for step in range(4):
            if REAL[row, step]:
                p = logprobs[row, step].exp().tolist()
                terms.append(sum(q * math.log(q / (1 / 5)) for q in p))
        assert float(found[row]) == pytest.approx(sum(terms) / len(terms), abs=1e-6)
    uniform = torch.full((1, 2, 7), -math.log(7))
    assert float(certainty(uniform, torch.ones(1, 2, dtype=torch.bool))) == pytest.approx(
        0, abs=1e-6
    )


def test_ending_is_the_mean_probability_of_an_end() -> None:
    end = torch.rand(3, 4, generator=generator()).log()
    found = ending(end, REAL)
    for row in range(3):
        terms = [math.exp(end[row, step]) for step in range(4) if REAL[row, step]]
        assert float(found[row]) == pytest.approx(sum(terms) / len(terms), abs=1e-6)


def test_sameness_is_the_negative_nuclear_norm_of_the_real_rows() -> None:
    hidden = torch.randn(3, 4, 6, generator=generator())
    found = sameness(hidden, REAL)
    for row in range(3):
        matrix = hidden[row][REAL[row]].numpy()
        eigenvalues = np.linalg.eigvalsh(matrix @ matrix.T)
        assert float(found[row]) == pytest.approx(-np.sqrt(eigenvalues.clip(0)).sum(), rel=1e-4)


def test_sameness_has_a_gradient_where_singular_values_are_equal() -> None:
    hidden = torch.eye(3)[None].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        sameness(hidden, torch.ones(1, 3, dtype=torch.bool)).sum(), hidden
    )
    assert torch.allclose(gradient[0], -torch.eye(3), atol=1e-6)


def test_weights_follow_the_published_rule() -> None:
    losses = torch.rand(9, 3, 2, generator=generator()).double() + 0.1
    before: Weights | None = None
    slow: list[list[float]] = []
    for step in range(9):
        certain, end, same = losses[step, 0], losses[step, 1], -losses[step, 2]
        before = balance(certain, end, same, step, before)
        now = []
        for row in range(2):
            by = (10.0 * math.log(step + 1) - 20.0, 0.5 * math.log(step + 1) + 1.0)
            one = abs(float(certain[row]) / float(end[row]) / by[0])
            two = abs(float(certain[row]) / float(same[row]) / by[1])
            if slow:
                one = 0.9 * slow[row][0] + 0.1 * one
                two = 0.9 * slow[row][1] + 0.1 * two
            now.append([one, two])
        slow = now
        assert before.ending.tolist() == pytest.approx([one for one, _ in slow])
        assert before.sameness.tolist() == pytest.approx([two for _, two in slow])


def test_weights_stay_finite_where_an_answer_never_ends() -> None:
    zero = torch.zeros(1)
    found = balance(torch.ones(1), zero, zero, 0, None)
    assert bool(found.ending.isfinite().all() and found.sameness.isfinite().all())


def test_concept_swap_is_the_mean_gain_of_the_target_over_the_source() -> None:
    values = torch.randn(2, 5, 4, generator=generator())
    source, target = torch.randn(2, 2, 4, generator=generator(1))
    mask = torch.tensor([[True, False, True, False, True], [False, True, False, False, False]])
    found = concept_swap(values, source, target, mask)

    def cosine(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    for row in range(2):
        gains = [
            cosine(target[row].tolist(), values[row, token].tolist())
            - cosine(source[row].tolist(), values[row, token].tolist())
            for token in range(5)
            if mask[row, token]
        ]
        assert float(found[row]) == pytest.approx(-sum(gains) / len(gains), abs=1e-6)
    assert float(concept_swap(values, source, target, mask & False).abs().max()) == 0


def test_a_step_on_the_swap_moves_masked_values_towards_the_target_and_no_others() -> None:
    values = torch.randn(1, 5, 4, generator=generator(), requires_grad=True)
    source, target = torch.randn(2, 1, 4, generator=generator(1))
    mask = torch.tensor([[True, False, True, False, False]])
    (gradient,) = torch.autograd.grad(concept_swap(values, source, target, mask).sum(), values)
    moved = (values - 0.01 * gradient).detach()
    similar = torch.nn.functional.cosine_similarity
    margin = similar(moved, target[:, None], dim=-1) - similar(moved, source[:, None], dim=-1)
    before = similar(values, target[:, None], dim=-1) - similar(values, source[:, None], dim=-1)
    assert bool((margin > before)[mask].all())
    assert torch.equal(margin[~mask], before[~mask])


def test_the_mask_is_the_upper_half_of_the_range() -> None:
    match = torch.tensor([[0.0, 1.0, 0.4, 0.6], [3.0, 3.0, 3.0, 3.0], [-5.0, -1.0, -2.9, -3.0]])
    assert concept_mask(match).tolist() == [
        [False, True, False, True],
        [True] * 4,
        [False, True, True, False],
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(3, 40),
    st.integers(3, 40),
    st.floats(0.05, 1.0),
    st.floats(0.0, 0.3),
)
def test_a_crop_holds_the_mask_and_is_no_smaller_than_asked(
    seed: int, height: int, width: int, least: float, share: float
) -> None:
    random = generator(seed)
    mask = (torch.rand(4, 1, height, width, generator=random) < share).float()
    box = crop_around(mask, torch.rand(4, 4, generator=random), least)
    for row, (top, left, bottom, right) in enumerate(box.tolist()):
        assert 0 <= top < bottom <= height
        assert 0 <= left < right <= width
        assert bottom - top >= math.floor(least * height) or bottom - top == 1
        assert right - left >= math.floor(least * width) or right - left == 1
        outside = mask[row, 0].clone()
        outside[top:bottom, left:right] = 0
        assert not outside.any()


def batch(options: tuple[tuple[str, ...], ...] | None) -> Batch:
    return Batch(("a", "b"), torch.zeros(2, 3, 8, 8), ("q", "q"), ("red", "ring"), options)


def test_the_target_is_the_option_behind_the_right_answer() -> None:
    options = (("blue", "red"), ("ring", "star", "cross"))
    assert swaps(batch(options), None, None) == [("red", "blue"), ("ring", "star")]
    assert swaps(batch(options), "shape", "sky") == [("shape", "sky")] * 2
    assert swaps(batch(None), None, "sky") == [("red", "sky"), ("ring", "sky")]
