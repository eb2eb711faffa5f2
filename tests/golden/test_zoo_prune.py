"""ZOO-Prune: the difference approaches the exact twin, and SADS equals a slow reference."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from seen import normal, places, prefix, seen
from torch import Tensor, nn

from targets.compression.base import Seen, Stage
from targets.compression.trace import choose
from targets.compression.zoo_prune import ZooPrune
from targets.errors import CompressionError

with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    PROJECTOR = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 8)).double()
    PROJECTOR.requires_grad_(False)


def view(features: Tensor, counts: Any, **more: Any) -> Seen:
    projector = PROJECTOR.to(features.dtype)
    family: Any = SimpleNamespace(project_tokens=projector, projector=projector)
    return seen(
        features, counts, family=family, projected=projector(features), stage=Stage.VISION, **more
    )


def slow_sensitivity(features: Tensor, directions: list[Tensor], step: float) -> list[float]:
    out = []
    for token in features:
        norms = [
            float((PROJECTOR(token + step * u) - PROJECTOR(token - step * u)).norm()) / (2 * step)
            for u in directions
        ]
        out.append(sum(norms) / len(norms))
    return out


def slow_sads(sensitivity: list[float], z: Tensor, count: int) -> list[int]:
    low, high = min(sensitivity), max(sensitivity)
    worth = [(s - low) / (high - low) for s in sensitivity]
    chosen = [worth.index(max(worth))]
    while len(chosen) < count:
        left = [i for i in range(len(z)) if i not in chosen]
        gain = [
            worth[i] * min(1 - float(torch.cosine_similarity(z[i], z[c], 0)) for c in chosen)
            for i in left
        ]
        chosen.append(left[gain.index(max(gain))])
    return chosen


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [1, 4, 11])
def test_zoo_prune(seed: int, count: int) -> None:
    features = normal(2, 12, 6, seed=seed).double()
    one = view(features, count)
    compressor = ZooPrune(keep_tokens=count, directions=5, seed=3)
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(6, generator=generator).double() for _ in range(5)]
    _, selection = choose(compressor, one)
    found = compressor.sensitivity(one)
    for image in range(2):
        sensitivity = slow_sensitivity(features[image], directions, 0.01)
        assert found[image].tolist() == pytest.approx(sensitivity, rel=1e-9)
        truth = slow_sads(sensitivity, PROJECTOR(features[image]), count)
        assert places(selection.kept[image]) == set(truth)


def test_the_difference_approaches_the_exact_twin() -> None:
    one = view(normal(1, 9, 6, seed=5).double(), 3)
    exact = ZooPrune(keep_tokens=3, estimate="jvp", directions=4).sensitivity(one)
    errors = [
        float((ZooPrune(keep_tokens=3, step=h, directions=4).sensitivity(one) - exact).abs().max())
        for h in (0.4, 0.04, 0.004)
    ]
    # Central differences: the error falls with the square of the step.
    assert errors[1] < errors[0] / 50
    assert errors[2] < errors[1] / 50
    assert errors[2] < 1e-4 * float(exact.max())


@pytest.mark.parametrize("estimate", ["difference", "jvp"])
def test_sensitivity_has_the_right_gradient(estimate: str) -> None:
    compressor = ZooPrune(keep_tokens=3, estimate=estimate, directions=3)  # type: ignore[arg-type]
    features = normal(1, 7, 6, seed=1).double().requires_grad_()
    weights, direction = normal(1, 7, seed=2).double(), normal(1, 7, 6, seed=3).double()
    scores = compressor.score(view(features, 3))
    (gradient,) = torch.autograd.grad((scores.score * weights).sum(), features)
    step = 1e-5

    def at(sign: float) -> float:
        moved = (features + sign * step * direction).detach()
        return float((compressor.score(view(moved, 3)).score * weights).sum())

    slope = (at(1) - at(-1)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4)


def test_directions_are_seeded_and_shared() -> None:
    features = normal(1, 6, 6, seed=4).double().expand(2, 6, 6)
    one = view(features, 2, seeds=(5, 9))
    first = ZooPrune(keep_tokens=2, directions=3).sensitivity(one)
    assert torch.equal(first[0], first[1])
    assert torch.equal(first, ZooPrune(keep_tokens=2, directions=3).sensitivity(one))
    other = ZooPrune(keep_tokens=2, directions=3, seed=1).sensitivity(one)
    assert not torch.allclose(first, other)


def test_equal_tokens_are_taken_in_order() -> None:
    one = view(torch.ones(1, 5, 6).double(), 3, valid=prefix([5], 5))
    _, selection = choose(ZooPrune(keep_tokens=3, directions=2), one)
    assert places(selection.kept[0]) == {0, 1, 2}


@pytest.mark.parametrize("estimate", ["difference", "jvp"])
def test_half_precision_does_not_drown_the_difference(estimate: str) -> None:
    """The projector runs in float32, with the weights there are, and is left as it was."""
    half = copy.deepcopy(PROJECTOR).to(torch.bfloat16)
    features = normal(1, 9, 6, seed=7).to(torch.bfloat16)
    family: Any = SimpleNamespace(project_tokens=half, projector=half)
    compressor = ZooPrune(keep_tokens=3, directions=4, estimate=estimate)  # type: ignore[arg-type]
    found = compressor.sensitivity(seen(features, 3, family=family))
    wide = copy.deepcopy(half).double()
    same: Any = SimpleNamespace(project_tokens=wide, projector=wide)
    truth = compressor.sensitivity(seen(features.double(), 3, family=same))
    assert found.dtype == torch.float32
    # Directions are drawn in float32, the difference of float32 numbers is good to some 1e-4.
    assert torch.allclose(found.double(), truth, rtol=2e-3)
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}


def test_it_needs_the_projector() -> None:
    with pytest.raises(CompressionError, match="projector"):
        ZooPrune(keep_tokens=2).score(seen(normal(1, 4, 6), 2))
