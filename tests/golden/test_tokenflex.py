"""TokenFLEX: pooling to any number of tokens, the projector, and what takes the places."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import slow_trained as slow
import torch
import weights
from seen import seen, tiled
from torch import Tensor

from targets.compression import TokenFLEX
from targets.compression.base import Seen, Selection, Stage
from targets.compression.tokenflex_net import centres, pooled
from targets.compression.trace import choose
from targets.errors import CompressionError

SIDE, WIDTH = 6, 32


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sees(counts: int, images: int = 2, seed: int = 0) -> Seen:
    features = normal(images, SIDE**2, WIDTH, seed=seed)
    projected = normal(images, SIDE**2, 7, seed=seed + 1)
    return seen(features, counts, stage=Stage.VISION, projected=projected)


def ours(keep: int, name: str | None = None) -> TokenFLEX:
    return TokenFLEX(keep_tokens=keep, weights=name or weights.folder("tokenflex"))


def made(method: TokenFLEX, here: Seen) -> Any:
    return method.merge(choose(method, here)[1], here)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
def test_any_number_of_tokens_is_the_formula(side: int) -> None:
    here, method = sees(side**2), ours(side**2)
    merged = made(method, here)
    network: Any = method._network
    state = {name: value.double() for name, value in network.state_dict().items()}
    for image in range(2):
        truth = slow.tokenflex(state, here.features[image], SIDE, side)
        assert torch.allclose(merged.features[image], truth, rtol=0, atol=1e-9)
    assert merged.projected
    assert merged.valid.shape == (2, side**2)
    assert not bool(merged.dominant.any())


@pytest.mark.parametrize("side", [1, 2, 4, 5])
def test_the_untrained_mode_pools_projected_tokens(side: int) -> None:
    here = sees(side**2)
    merged = made(ours(side**2, "none"), here)
    assert here.projected is not None
    for image in range(2):
        truth = slow.pooled(here.projected[image], SIDE, side)
        assert torch.allclose(merged.features[image], truth)


def test_as_many_cells_as_places_pool_nothing() -> None:
    values = normal(2, 36, 3)
    assert torch.allclose(pooled(values, (6, 6), 6), values)
    assert centres((6, 6), 6).tolist() == list(range(36))


@pytest.mark.parametrize(
    ("budget", "left"),
    [
        ({"retention": 1.0}, 144),
        ({"retention": 0.99}, 121),
        ({"retention": 0.5}, 64),
        ({"retention": 0.25}, 36),
        ({"retention": 0.11}, 16),
        ({"keep_tokens": 1}, 1),
        ({"keep_tokens": 8}, 4),
        ({"keep_tokens": 200}, 144),
    ],
)
def test_budgets_are_squares(budget: Any, left: int) -> None:
    assert TokenFLEX(**budget).budget(144) == left


def test_kept_are_the_middles_of_the_cells() -> None:
    here, method = sees(4), ours(4)
    scores, selection = choose(method, here)
    # Cells of 3 × 3 places: the middles are rows and columns 1 and 4.
    assert selection.kept[1].nonzero().flatten().tolist() == [7, 10, 25, 28]
    assert made(method, here).source.tolist() == [[7, 10, 25, 28]] * 2
    assert torch.equal(scores.score, torch.ones(2, 36))
    assert not bool(scores.log_score.any())


@pytest.mark.parametrize("side", range(1, 7))
def test_middles_lie_in_their_cells(side: int) -> None:
    for cell, place in enumerate(centres((6, 6), side).tolist()):
        for at, index in ((place // 6, cell // side), (place % 6, cell % side)):
            assert index * 6 // side <= at < -(-(index + 1) * 6 // side)


def test_a_forced_set_leaves_the_cells_whose_middle_it_keeps() -> None:
    here, method = sees(4), ours(4)
    whole, kept = made(method, here), torch.zeros(2, 36, dtype=torch.bool)
    kept[0, [0, 7, 28]] = True
    kept[1, 25] = True
    merged = method.merge(Selection(kept), here)
    assert merged.valid.tolist() == [[True, True], [True, False]]
    assert merged.source[0].tolist() == [7, 28]
    assert torch.equal(merged.features[0], whole.features[0, [0, 3]])
    assert torch.equal(merged.features[1, 0], whole.features[1, 2])


def test_an_image_alone_gives_the_same_tokens() -> None:
    here, method = sees(9, images=3), ours(9)
    together = made(method, here).features
    for image in range(3):
        alone = made(method, seen(here.features[image : image + 1], 9, stage=Stage.VISION))
        assert torch.allclose(together[image], alone.features[0], rtol=0, atol=1e-12)


def test_gradient_agrees_with_finite_differences() -> None:
    base, method = sees(4, images=1), ours(4)
    features = base.features.clone().requires_grad_()

    def tokens(values: Tensor) -> Tensor:
        out: Tensor = made(method, replace(base, features=values)).features
        return out.square().sum(-1)

    direction, step = normal(1, 36, WIDTH, seed=4), 1e-6
    (gradient,) = torch.autograd.grad(tokens(features).sum(), features)
    with torch.no_grad():
        rise = (tokens(features + step * direction) - tokens(features - step * direction)).sum()
    assert float(rise) / 2 / step == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


def test_tiles_are_refused() -> None:
    features = normal(1, 36, WIDTH)
    here = seen(features, 4, layouts=[tiled((3, 6), (3, 6))], stage=Stage.VISION)
    with pytest.raises(CompressionError, match="one whole square grid"):
        ours(4).select(ours(4).score(here), here)
