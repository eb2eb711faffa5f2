"""QueCC: the network, its windows, the question it asks, and what takes the places."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import slow_trained as slow
import torch
import weights
from seen import seen, tiled
from torch import Tensor

from targets.compression import QueCC, trained
from targets.compression.base import Seen, Selection, Stage
from targets.compression.quecc import levels_of
from targets.compression.quecc_net import QueryCompressor, unwindowed, windows
from targets.compression.trace import choose
from targets.errors import CompressionError
from targets.preprocessing.layout import Layout

SIDE, WIDTH, LEVELS = 6, 32, 2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Tower:
    """Layers of a pass by number."""

    feature_layer = 2

    def __init__(self, hidden: dict[int, Tensor]) -> None:
        self._hidden = hidden

    def hidden(self, layer: int) -> Tensor:
        return self._hidden[layer]


def sees(counts: int, images: int = 2, seed: int = 0, **more: Any) -> Seen:
    """Images with features, tower layers 1 and 2, and a question state that is given."""
    features = normal(images, SIDE**2, WIDTH, seed=seed)
    tower = Tower({1: normal(images, SIDE**2, WIDTH, seed=seed + 1), 2: features})
    asked = normal(images, WIDTH, seed=seed + 2)
    fields = {"vision": tower, "text": "given", "memory": {"question": asked}, **more}
    return seen(features, counts, stage=Stage.VISION, **fields)


def ours(keep: int, name: str | None = None, **more: Any) -> QueCC:
    return QueCC(keep_tokens=keep, weights=name or weights.folder("quecc"), **more)


def state_of(method: QueCC) -> dict[str, Tensor]:
    network: Any = method._network
    return {name: value.double() for name, value in network.state_dict().items()}


@pytest.mark.parametrize(("keep", "stride"), [(9, 2), (4, 3), (1, 6)])
def test_tokens_and_scores_are_the_network_of_the_paper(keep: int, stride: int) -> None:
    here, method = sees(keep), ours(keep)
    scores, selection = choose(method, here)
    merged = method.merge(selection, here)
    assert merged.projected
    assert here.vision is not None
    for image in range(2):
        levels = torch.cat([here.vision.hidden(layer)[image] for layer in (1, 2)], -1)
        question = here.memory["question"][image]
        tokens, paid = slow.quecc(
            state_of(method), here.features[image], levels, question, SIDE, stride, 4
        )
        assert torch.allclose(merged.features[image], tokens, rtol=0, atol=1e-9)
        assert torch.allclose(scores.score[image], paid, rtol=0, atol=1e-9)
    assert float(scores.score.sum()) == pytest.approx(2 * keep)


def test_without_the_residual_it_is_the_official_form() -> None:
    network: Any = weights.network("quecc").double()
    network.residual = False
    state = {name: value.double() for name, value in network.state_dict().items()}
    features, levels = normal(36, WIDTH), normal(36, 2 * WIDTH, seed=1)
    asked = normal(WIDTH, seed=2)
    tokens, _ = network(features.reshape(1, 6, 6, -1), levels.reshape(1, 6, 6, -1), asked[None], 3)
    truth, _ = slow.quecc(state, features, levels, asked, 6, 3, 4, residual=False)
    assert torch.allclose(tokens[0], truth, rtol=0, atol=1e-9)


def test_a_patch_reaches_its_own_window_only() -> None:
    network: Any = weights.network("quecc").double()
    features, levels, asked = (
        normal(1, 6, 6, 32),
        normal(1, 6, 6, 64, seed=1),
        normal(1, 32, seed=2),
    )
    plain = network(features, levels, asked, 2)[0]
    for row, column in ((0, 0), (3, 4), (5, 1)):
        for which in (0, 1):
            moved = [features.clone(), levels.clone()]
            moved[which][0, row, column] += 1
            changed = (network(*moved, asked, 2)[0] - plain).abs().amax(-1)[0] > 1e-9
            assert changed.nonzero().flatten().tolist() == [row // 2 * 3 + column // 2]


def test_the_question_changes_every_token() -> None:
    network: Any = weights.network("quecc").double()
    features, levels, asked = (
        normal(1, 6, 6, 32),
        normal(1, 6, 6, 64, seed=1),
        normal(1, 32, seed=2),
    )
    apart = (network(features, levels, asked, 3)[0] - network(features, levels, -asked, 3)[0]).abs()
    assert float(apart.amax(-1).amin()) > 1e-4


def test_training_begins_with_average_pooling() -> None:
    arguments = {"vision": 32, "text": 16, "levels": 2, "heads": 4, "strides": [2, 3]}
    network: Any = trained.seeded(QueryCompressor, arguments)
    features = normal(1, 6, 6, 32).float()
    levels, asked = normal(1, 6, 6, 64, seed=1).float(), normal(1, 16, seed=2).float()
    tokens, _ = network(features, levels, asked, 3)
    mean = slow.pooled(features.flatten(1, 2)[0], 6, 2)
    assert torch.allclose(tokens[0], network.projector(mean), atol=1e-5)
    assert torch.allclose(network.shrink["3"].weight, torch.tensor(1 / 9))


def test_windows_go_there_and_back() -> None:
    grid = torch.arange(36.0).reshape(1, 6, 6)
    parted = windows(grid[..., None], 3)[..., 0]
    assert parted[0, 0, 1].tolist() == [3, 4, 5, 9, 10, 11, 15, 16, 17]
    assert torch.equal(unwindowed(parted, 3), grid)


def test_the_untrained_mode_is_average_pooling() -> None:
    here, method = sees(4), ours(4, "none")
    scores, selection = choose(method, here)
    merged = method.merge(selection, here)
    assert not merged.projected
    for image in range(2):
        truth = slow.pooled(here.features[image], SIDE, 2)
        assert torch.allclose(merged.features[image], truth)
    assert torch.allclose(scores.score, torch.tensor(1 / 9))
    assert torch.equal(scores.log_score[0], scores.log_score[1])


@pytest.mark.parametrize(
    ("budget", "left"),
    [
        ({"retention": 1.0}, 144),
        ({"retention": 0.99}, 36),
        ({"retention": 0.5}, 36),
        ({"retention": 0.25}, 36),
        ({"retention": 0.24}, 16),
        ({"retention": 0.112}, 16),
        ({"keep_tokens": 15}, 9),
        ({"keep_tokens": 8}, 4),
        ({"keep_tokens": 3}, 1),
        ({"keep_tokens": 144}, 144),
    ],
)
def test_budgets_are_squares_of_windows(budget: Any, left: int) -> None:
    assert QueCC(**budget, weights="none").budget(144) == left


def test_the_window_the_weights_know_is_used() -> None:
    method = ours(4)  # knows 2, 3 and 6
    assert method.stride(12, 144) == 2
    assert method.stride(12, 9) == 6
    assert method.stride(12, 1) == 6  # the smallest it can make
    with pytest.raises(CompressionError, match="none of which divides a grid of 5 × 5"):
        method.stride(5, 3)


def test_kept_are_the_middles_of_the_windows() -> None:
    here, method = sees(4), ours(4)
    selection = choose(method, here)[1]
    assert selection.kept[0].nonzero().flatten().tolist() == [7, 10, 25, 28]
    merged = method.merge(selection, here)
    assert merged.source.tolist() == [[7, 10, 25, 28]] * 2
    assert bool(merged.valid.all())
    assert not bool(merged.dominant.any())


def test_a_forced_set_leaves_the_windows_whose_middle_it_keeps() -> None:
    here, method = sees(4), ours(4)
    whole = method.merge(choose(method, here)[1], here)
    kept = torch.zeros(2, 36, dtype=torch.bool)
    kept[0, [0, 10, 28]] = True
    kept[1, 25] = True
    merged = method.merge(Selection(kept), here)
    assert merged.valid.tolist() == [[True, True], [True, False]]
    assert merged.source[0].tolist() == [10, 28]
    assert int(merged.source[1, 0]) == 25
    assert torch.equal(merged.features[0], whole.features[0, [1, 3]])
    assert torch.equal(merged.features[1, 0], whole.features[1, 2])


def test_an_image_alone_gives_the_same_tokens() -> None:
    here, method = sees(9, images=3), ours(9)
    together = method.merge(choose(method, here)[1], here)
    for image in range(3):
        part = slice(image, image + 1)
        tower = Tower({layer: here.vision.hidden(layer)[part] for layer in (1, 2)})  # type: ignore[union-attr]
        memory = {"question": here.memory["question"][part]}
        single = seen(
            here.features[part], 9, stage=Stage.VISION, vision=tower, text="given", memory=memory
        )
        alone = method.merge(choose(method, single)[1], single)
        assert torch.allclose(together.features[image], alone.features[0], rtol=0, atol=1e-12)


def test_images_of_one_row_share_their_question() -> None:
    here = replace(sees(9, images=2), rows=torch.tensor([1, 1]))
    method = ours(9)
    there = replace(
        here, memory={"question": here.memory["question"][[1, 1]]}, rows=torch.arange(2)
    )
    assert torch.equal(
        method.merge(choose(method, here)[1], here).features,
        method.merge(choose(method, there)[1], there).features,
    )


def test_gradients_agree_with_finite_differences() -> None:
    method, weight = ours(9), normal(1, 36, seed=5)
    base = sees(9, images=1)
    tower, asked = normal(1, 36, WIDTH, seed=7), base.memory["question"]

    def score(features: Tensor) -> Tensor:
        vision: Any = Tower({1: tower, 2: features})
        here = replace(base, features=features, vision=vision, memory={"question": asked})
        found = method.score(here)
        tokens = method.merge(Selection(choose(method, here)[1].kept), here).features
        return (found.log_score * weight).sum() + tokens.square().mean()

    features = base.features.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(features), features)
    direction = normal(1, 36, WIDTH, seed=8)
    step = 1e-6
    with torch.no_grad():
        rise = score(features + step * direction) - score(features - step * direction)
    slope = float((gradient * direction).sum())
    assert abs(slope) > 1e-2
    assert float(rise) / 2 / step == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize(
    "layout", [Layout.grid((4, 9)), tiled((6, 3), (6, 3)), Layout.grid((5, 7))]
)
def test_other_than_one_square_is_refused(layout: Layout) -> None:
    features = normal(1, layout.tokens, WIDTH)
    here = seen(features, 4, layouts=[layout], stage=Stage.VISION)
    with pytest.raises(CompressionError, match="one whole square grid"):
        ours(4, "none").score(here)


def test_an_image_that_has_lost_tokens_is_refused() -> None:
    here = sees(4)
    here.valid[1, 5] = False
    with pytest.raises(CompressionError, match=r"\[36, 35\] of \[36, 36\]"):
        ours(4).score(here)


@pytest.mark.parametrize(
    ("feature_layer", "levels"),
    [(22, (11, 15, 21, 22)), (3, (1, 2, 3)), (2, (1, 2)), (0, (0,)), (26, (13, 18, 25, 26))],
)
def test_levels_are_those_of_the_paper_in_proportion(
    feature_layer: int, levels: tuple[int, ...]
) -> None:
    """Hidden states 12, 16, 22, 23 of CLIP's are outputs of layers 11, 15, 21, 22."""
    assert levels_of(feature_layer) == levels
