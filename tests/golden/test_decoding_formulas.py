"""Decoding rules against slow references, number by number."""

from __future__ import annotations

import math
from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from defenses.decoding import OFF
from defenses.dola import most_divergent
from defenses.m3id import grounded
from defenses.sid import least
from defenses.vasparse import VASparse, unmasked
from defenses.vasparse_attention import penalised, selected, straight_through, sums_to_one
from defenses.vcd import diffused
from targets.decoding import Step


def random(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


# VCD ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 500, 999])
def test_vcd_noise_by_hand(step: int) -> None:
    pixels = random(2, 3, 4, 4)
    kept = 1.0
    for number in range(step + 1):
        ramp = -6 + 12 * number / 999
        kept *= 1 - ((5e-3 - 1e-5) / (1 + math.exp(-ramp)) + 1e-5)
    found = diffused(pixels, (3, 4), step)
    for row, seed in enumerate((3, 4)):
        noise = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(seed))
        wanted = math.sqrt(kept) * pixels[row] + math.sqrt(1 - kept) * noise
        assert torch.allclose(found[row], wanted, rtol=0, atol=1e-5)


def test_vcd_noise_never_hides_the_picture_wholly() -> None:
    """The mean β is 2.5e-3, so that 1000 steps leave about exp(−1.25) of the picture."""
    pixels = torch.full((1, 3, 64, 64), 5.0)
    assert float(diffused(pixels, (0,), 0).mean()) == pytest.approx(5.0, abs=0.01)
    assert float(diffused(pixels, (0,), 999).mean()) == pytest.approx(5 * 0.2865, abs=0.05)


# M3ID --------------------------------------------------------------------------------------------


def test_m3id_by_hand() -> None:
    seen, blind = random(2, 3, 7), random(2, 3, 7, seed=1)
    seen[0, 1] = torch.tensor([30.0, 0, 0, 0, 0, 0, 0])
    found = grounded(seen, blind, 4, 0.3, 0.9)
    for row in range(2):
        for place in range(3):
            c, u = seen[row, place].log_softmax(0), blind[row, place].log_softmax(0)
            gamma = math.exp(-0.3 * (4 + place))
            on = float(c.max()) < math.log(0.9)
            wanted = c + on * (1 - gamma) / gamma * (c - u)
            assert torch.allclose(found[row, place], wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[0, 1], seen[0, 1].log_softmax(0))


# DoLa --------------------------------------------------------------------------------------------


def test_the_premature_layer_is_the_most_divergent() -> None:
    final, early = random(2, 3, 9), random(4, 2, 3, 9, seed=1)
    found = most_divergent(final, early)
    for row in range(2):
        for place in range(3):
            p = final[row, place].softmax(0)
            distances = []
            for candidate in early[:, row, place]:
                q = candidate.softmax(0)
                m = (p + q) / 2
                distances.append(float((p * (p / m).log() + q * (q / m).log()).sum() / 2))
            best = distances.index(max(distances))
            assert torch.equal(found[row, place], early[best, row, place])


# SID ---------------------------------------------------------------------------------------------


def test_the_least_attended_are_counted_exactly() -> None:
    paid = random(2, 3, 12).softmax(-1)
    visual = torch.zeros(2, 3, 12, dtype=torch.bool)
    visual[0, :, 2:9], visual[1, :, 3:5] = True, True
    found = least(paid, visual, 0.4)
    for row, (first, last) in enumerate([(2, 9), (3, 5)]):
        count = max(1, round(0.4 * (last - first)))
        for place in range(3):
            order = sorted(range(first, last), key=lambda i: float(paid[row, place, i]))
            assert sorted(found[row, place].nonzero()[:, 0].tolist()) == sorted(order[:count])
    assert not bool(least(paid, torch.zeros_like(visual), 0.4).any())


# VASparse ----------------------------------------------------------------------------------------


def error(dots: Tensor, salient: Tensor, kept: tuple[int, ...], weight: float) -> float:
    """E(M) of Eq. 3, summed term by term."""
    total = 0.0
    for i, (a, p) in enumerate(zip(dots.tolist(), salient.tolist(), strict=True)):
        m = float(i in kept)
        total += (a - m * a) ** 2 - weight * p * m
    return total


@pytest.mark.parametrize("weight", [0.0, 0.1, 5.0])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_the_best_by_delta_minimise_equation_3(weight: float, keep: float) -> None:
    n = 8
    for seed in range(3):
        dots = random(1, 2, 1, n, seed=seed)
        salient = random(1, 1, n, seed=seed + 50).softmax(-1)
        delta = dots.square() + weight * salient[:, None]
        found = selected(delta, torch.ones_like(delta, dtype=torch.bool), keep)
        count = round(keep * n)
        for head in range(2):
            here = tuple(found[0, head, 0].nonzero()[:, 0].tolist())
            assert len(here) == count
            errors = {
                kept: error(dots[0, head, 0], salient[0, 0], kept, weight)
                for kept in combinations(range(n), count)
            }
            assert errors[here] == pytest.approx(min(errors.values()))


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.9, 0.98, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_selection_is_the_front_of_a_stable_order(keep: float, ties: bool) -> None:
    """Columns one by one: of all, and of those that a mask leaves, the same for all heads."""
    for seed in range(6):
        n = 3 + 4 * seed
        delta = random(2, 3, 2, n, seed=seed)
        delta = delta.round() if ties else delta
        mask = random(2, 1, 2, n, seed=seed + 50) > -1
        mask[..., -1] = True
        for visible in (None, torch.ones_like(mask), mask):
            found = selected(delta, visible, keep)
            for b, head, r in product(range(2), range(3), range(2)):
                there = [i for i in range(n) if visible is None or bool(visible[b, 0, r, i])]
                best = sorted(there, key=lambda i: (-float(delta[b, head, r, i]), i))
                count = max(1, round(keep * len(there)))
                wanted = sorted(best[:count])
                assert found[b, head, r].nonzero()[:, 0].tolist() == wanted


def test_hidden_columns_are_never_selected() -> None:
    delta = random(2, 3, 2, 10).square()
    visible = torch.ones(2, 3, 2, 10, dtype=torch.bool)
    visible[0, :, :, :4] = False
    visible[1, :, 1, 9:] = False
    found = selected(delta, visible, 0.5)
    assert not bool((found & ~visible).any())
    number = visible.sum(-1)
    assert torch.equal(found.sum(-1), (number * 0.5).round().long())
    # Equal ones: the first.
    flat = selected(torch.ones(1, 1, 1, 5), torch.ones(1, 1, 1, 5, dtype=torch.bool), 0.4)
    assert flat[0, 0, 0].tolist() == [True, True, False, False, False]


def test_the_relaxation_is_zero_and_has_a_gradient() -> None:
    delta = random(1, 2, 1, 8).square().requires_grad_()
    visible = torch.ones(1, 2, 1, 8, dtype=torch.bool)
    kept = selected(delta, visible, 0.5)
    gate = straight_through(delta, kept, visible)
    assert torch.equal(gate, torch.zeros_like(gate))
    (gradient,) = torch.autograd.grad(gate.sum(), delta)
    assert bool((gradient[kept] > 0).any())
    assert bool((gradient[~kept] < 0).any())  # the best one dropped moves the bar
    whole = straight_through(delta, visible, visible)
    assert bool(torch.autograd.grad(whole.sum(), delta)[0].isfinite().all())


def test_sink_weights_sum_to_one_over_what_is_visible() -> None:
    visible = torch.ones(2, 3, 7, dtype=torch.bool)
    visible[1, :, :2] = False
    weights = sums_to_one(random(2, 3, 7), visible)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3))
    assert float(weights[1, :, :2].abs().amax()) == 0


def test_the_penalty_by_hand() -> None:
    logits, sinks = random(1, 2, 1, 5), random(1, 1, 5, seed=1).softmax(-1)
    found = penalised(logits, sinks, 0.3, "logit")
    for head in range(2):
        for column in range(5):
            a, w = float(logits[0, head, 0, column]), float(sinks[0, 0, column])
            assert float(found[0, head, 0, column]) == pytest.approx(1.3 * a - 0.3 * w * a)
    on_prob = penalised(logits, sinks, 0.3, "prob").softmax(-1)
    wanted = logits.softmax(-1) * (1.3 - 0.3 * sinks[:, None])
    assert torch.allclose(on_prob, wanted / wanted.sum(-1, keepdim=True))
    assert torch.equal(penalised(logits, sinks, 0.0, "logit"), logits)


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.5, 0.9])
def test_masks_have_exact_counts_and_follow_their_seeds(rate: float) -> None:
    visual = torch.zeros(3, 20, dtype=torch.bool)
    visual[0, 3:15], visual[1, 5:9], visual[2, 7] = True, True, True
    kept = unmasked(visual, (1, 2, 3), rate)
    assert not bool((kept & ~visual).any())
    counts = [max(1, number - round(rate * number)) for number in (12, 4, 1)]
    assert kept.sum(1).tolist() == counts
    assert torch.equal(kept[1], unmasked(visual, (9, 2, 8), rate)[1])
    assert not bool(unmasked(torch.zeros(1, 4, dtype=torch.bool), (0,), rate).any())


def step(logits: Tensor, hidden: dict[int, Tensor], entered: Tensor, visual: Tensor) -> Step:
    return Step(
        logits=logits,
        views=(),
        first=0,
        hidden=hidden,
        early={depth: states @ HEAD for depth, states in hidden.items()},
        entered=entered,
        visual=visual,
        head=lambda states: states @ HEAD,
        seeds=(4, 5),
    )


HEAD = random(6, 11, seed=9, scale=1.0)


def parts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    visual = torch.zeros(2, 8, dtype=torch.bool)
    visual[:, 1:7] = True
    return random(2, 3, 11), random(2, 3, 6, seed=2), random(2, 8, 6, seed=3), visual


def equation_6(theta: Tensor, phi: Tensor, alpha: float, cutoff: float) -> list[float]:
    p = theta.softmax(0)
    return [
        (1 + alpha) * float(t) - alpha * float(f) - OFF * bool(q < cutoff * p.max())
        for t, f, q in zip(theta, phi, p, strict=True)
    ]


@pytest.mark.parametrize("phi", ["last_token", "masked_visual_mean", "masked_visual_pos"])
def test_the_contrast_is_equation_6(phi: str) -> None:
    logits, last, entered, visual = parts()
    method = VASparse(phi_input=phi, alpha=0.4)  # type: ignore[arg-type]
    found = method.logits(step(logits, {0: last}, entered, visual))
    kept = unmasked(visual, (4, 5), 0.5)
    for row in range(2):
        left = [entered[row, i] for i in range(8) if kept[row, i]]
        assert len(left) == 3
        for place in range(3):
            if phi == "last_token":
                other = last[row, place] @ HEAD
            elif phi == "masked_visual_mean":
                other = (sum(left) / 3) @ HEAD
            else:
                other = (sum((one @ HEAD).softmax(0) for one in left) / 3).log()
            wanted = equation_6(logits[row, place], other, 0.4, 0.1)
            assert found[row, place].tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-3)


def test_the_contrast_of_the_repository() -> None:
    logits, last, entered, visual = parts()
    method = VASparse(variant="repo_compat", alpha=0.4)
    assert method.depths(32) == (0,)
    found = method.logits(step(logits, {0: last}, entered, visual))
    for row in range(2):
        for place in range(3):
            final, phi = logits[row, place].log_softmax(0), last[row, place] @ HEAD
            p = final.exp()
            wanted = final - phi.log_softmax(0) - 0.4 * phi - OFF * (p < 0.1 * p.max())
            assert torch.allclose(found[row, place], wanted, rtol=1e-4, atol=1e-3)
