"""The loop of transfer attacks against slow loops, written sample by sample from the papers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attacks.budget import Budget, quantise
from attacks.errors import AttackError
from attacks.seeds import SeedBank
from attacks.transfer.loop import Rules, optimise
from targets.base import Batch
from tests.fakes import make_batch

SEEDS, EPSILON, STEPS, ALPHA = [3, 4], 20 / 255, 5, 6 / 255
PLAIN = Rules(
    momentum=0.0,
    nesterov=False,
    smoothing=1,
    smoothing_sigma=3.0,
    neighbours=0,
    neighbourhood=1.5,
    ensemble="mean",
    inner=0.2,
    schedule="constant",
    random_start=False,
    judge_every=1,
    template=None,
)


class Waves:
    """Two losses of the perturbation that are neither linear nor alike; judged by their order."""

    count = 2

    def __init__(self, batch: Batch) -> None:
        generator = torch.Generator().manual_seed(5)
        self.weight = torch.randn(2, 3, 16, 16, generator=generator)
        self.images = batch.images
        self.judged = 0.0
        self.calls: list[tuple[int, int]] = []

    def gradient(self, number: int, delta: Tensor, rng: SeedBank, step: int) -> Tensor:
        del rng
        self.calls.append((number, step))
        return (1 + 99 * number) * self.weight[number] * torch.cos(30 * delta + number)

    def judge(self, images: Tensor) -> Tensor:
        self.judged -= 1  # ever better, so that the last picture is the one that is kept
        return torch.full((len(images),), self.judged)


def run(rules: Rules, mask: Tensor, batch: Batch) -> Tensor:
    budget = Budget(EPSILON, "linf", ALPHA, STEPS)
    return optimise(Waves(batch), batch, budget, SeedBank(SEEDS), rules, mask).images


def feasible(z: Tensor, clean: Tensor) -> Tensor:
    return (clean + z.clamp(-EPSILON, EPSILON)).clamp(0, 1) - clean


def slow(row: int, batch: Batch, mask: Tensor, how: Rules) -> Tensor:
    """One sample; MI, NI, TI and VMI by their formulas."""
    waves, clean = Waves(batch), batch.images[row]
    m = mask[row]
    z = torch.zeros(3, 16, 16)
    velocity, spread = torch.zeros_like(z), torch.zeros_like(z)

    def mean_gradient(at: Tensor) -> Tensor:
        total = torch.zeros_like(at)
        for number in range(2):
            one = waves.gradient(number, at * m, SeedBank([0]), 0)
            one = slow_blur(one, how.smoothing, how.smoothing_sigma) * m
            total += one / one.abs().mean() / 2
        return total

    for step in range(STEPS):
        alpha = ALPHA
        if how.schedule == "cosine":
            alpha = ALPHA * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        at = z - alpha * how.momentum * velocity if how.nesterov else z
        gradient = mean_gradient(at)
        added = gradient + spread
        velocity = how.momentum * velocity + added / added.abs().mean()
        if how.neighbours:
            total = torch.zeros_like(z)
            for number in range(how.neighbours):
                bank = SeedBank([SEEDS[row]]).child(f"step {step}").child(f"neighbour {number}")
                radius = how.neighbourhood * EPSILON
                total += mean_gradient(at + bank.uniform((3, 16, 16), -radius, radius)[0])
            spread = total / how.neighbours - gradient
        z = feasible(z - alpha * velocity.sign(), clean) * m
    return quantise(clean[None], (clean + z)[None], Budget(EPSILON))[0]


def slow_blur(picture: Tensor, size: int, sigma: float) -> Tensor:
    if size == 1:
        return picture
    half, found = size // 2, torch.zeros_like(picture)
    total = 0.0
    for i in range(-half, half + 1):
        for j in range(-half, half + 1):
            weight = math.exp(-(i * i + j * j) / (2 * sigma**2))
            total += weight
            shifted = torch.zeros_like(picture)
            rows, columns = slice(max(0, -i), 16 - max(0, i)), slice(max(0, -j), 16 - max(0, j))
            from_rows = slice(max(0, i), 16 - max(0, -i))
            from_columns = slice(max(0, j), 16 - max(0, -j))
            shifted[:, rows, columns] = picture[:, from_rows, from_columns]
            found += weight * shifted
    return found / total


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 1.0},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 1.0, "smoothing": 5, "smoothing_sigma": 1.5},
        {"momentum": 1.0, "neighbours": 3},
        {"momentum": 0.8, "nesterov": True, "neighbours": 2, "schedule": "cosine"},
    ],
    ids=str,
)
def test_the_loop_is_its_formulas(options: dict[str, Any]) -> None:
    batch, how = make_batch(2), replace(PLAIN, **options)
    mask = torch.zeros(2, 1, 16, 16)
    mask[0, :, :5], mask[1, :, :, 9:] = 1, 1
    found = run(how, mask, batch)
    for row in range(2):
        wanted = slow(row, batch, mask, how)
        # Sums in another order may turn a sign where a velocity is all but zero.
        same = (found[row] - wanted).abs() < 0.5 / 255
        assert float(same.float().mean()) > 0.995
    still = mask.expand_as(found) == 0
    assert torch.equal(found[still], batch.images[still])


def test_cwa_visits_every_model_in_turn_after_a_look_uphill() -> None:
    batch = make_batch(2)
    waves = Waves(batch)
    budget = Budget(EPSILON, "linf", ALPHA, 3)
    how = replace(PLAIN, ensemble="cwa", momentum=1.0)
    optimise(waves, batch, budget, SeedBank(SEEDS), how, torch.ones(2, 1, 16, 16))
    assert waves.calls == [(i, step) for step in range(3) for i in (0, 1, 0, 1)]


def test_a_template_moves_by_the_folded_gradient() -> None:
    batch = make_batch(2)
    mask = torch.ones(2, 1, 16, 16)
    how = replace(PLAIN, template=4)
    found = run(how, mask, replace(batch, images=torch.full((2, 3, 16, 16), 128 / 255)))
    delta = found - 128 / 255
    # Judged at phase 0: the picture is one 4 × 4 pattern, repeated.
    for row in range(2):
        for y in range(16):
            for x in range(16):
                assert torch.equal(delta[row, :, y, x], delta[row, :, y % 4, x % 4])
    waves, point = Waves(batch), torch.zeros(2, 3, 4, 4)
    for step in range(STEPS):
        draw = SeedBank(SEEDS).child(f"step {step}").child("phase").uniform((2,))
        total = torch.zeros_like(point)
        for number in range(2):
            folded = torch.zeros_like(point)
            for row in range(2):
                py, px = (int(4 * value) for value in draw[row])
                tiled = torch.stack(
                    [
                        point[row, :, (y + py) % 4, (x + px) % 4]
                        for y in range(16)
                        for x in range(16)
                    ],
                    1,
                ).view(3, 16, 16)
                gradient = waves.gradient(number, tiled[None], SeedBank([0]), step)[0]
                for y in range(16):
                    for x in range(16):
                        folded[row, :, (y + py) % 4, (x + px) % 4] += gradient[:, y, x]
            total += folded / folded.abs().flatten(1).mean(1).view(2, 1, 1, 1) / 2
        point = (point - ALPHA * total.sign()).clamp(-EPSILON, EPSILON)
    wanted = (point * 255).round() / 255
    assert float(((delta[:, :, :4, :4] - wanted).abs() < 0.5 / 255).float().mean()) > 0.98


def test_the_best_judged_picture_is_kept() -> None:
    batch = make_batch(2)

    class Rising(Waves):
        def judge(self, images: Tensor) -> Tensor:
            self.judged += 1
            return torch.full((len(images),), self.judged)

    budget = Budget(EPSILON, "linf", ALPHA, 4)
    how = replace(PLAIN, judge_every=3)
    mask = torch.ones(2, 1, 16, 16)
    found = optimise(Rising(batch), batch, budget, SeedBank(SEEDS), how, mask)
    assert torch.equal(found.images, batch.images), "the start was judged best"
    assert found.loss is not None
    assert found.loss[:, 0].isnan().tolist() == [False, True, True, False, False]


def test_a_loss_that_is_not_finite_names_the_sample() -> None:
    batch = make_batch(2)

    class Broken(Waves):
        def gradient(self, number: int, delta: Tensor, rng: SeedBank, step: int) -> Tensor:
            found = super().gradient(number, delta, rng, step)
            found[1] = math.nan
            return found

    mask = torch.ones(2, 1, 16, 16)
    with pytest.raises(AttackError, match="step 0 for samples s1;") as caught:
        optimise(
            Broken(batch), batch, Budget(EPSILON, "linf", ALPHA, 2), SeedBank(SEEDS), PLAIN, mask
        )
    assert caught.value.sample_ids == ("s1",)
