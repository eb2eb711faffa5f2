"""CDPruner: fast greedy MAP equals greedy log-determinants by brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from seen import normal, places, prefix, seen
from torch import Tensor

from targets.compression.base import Seen
from targets.compression.cdpruner import CDPruner, greedy_map
from targets.compression.layout import find_slots
from targets.compression.sight import TextSight
from targets.compression.trace import choose
from targets.errors import CompressionError
from targets.preprocessing.layout import Layout


def kernel(features: Tensor, weight: Tensor) -> Tensor:
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    likeness = (unit @ unit.T).fill_diagonal_(1)
    return weight.double()[:, None] * likeness * weight.double()


def slow_greedy(matrix: Tensor, count: int) -> list[int]:
    chosen: list[int] = []
    while len(chosen) < count:
        left = [i for i in range(len(matrix)) if i not in chosen]
        worth = [float(torch.det(matrix[[*chosen, i]][:, [*chosen, i]])) for i in left]
        chosen.append(left[worth.index(max(worth))])
    return chosen


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_fast_map_is_greedy_by_brute_force(seed: int, count: int) -> None:
    features = normal(2, 12, 16, seed=seed)
    weight = normal(2, 12, seed=seed + 100).exp()
    unit = torch.nn.functional.normalize(features, dim=-1)
    valid = torch.ones(2, 12, dtype=torch.bool)
    counts = torch.tensor([count, count])
    order = greedy_map(unit @ unit.transpose(1, 2), weight, counts, valid)
    for image in range(2):
        truth = slow_greedy(kernel(features[image], weight[image]), count)
        assert order[image].tolist() == truth


def test_greedy_comes_close_to_the_best_subset() -> None:
    features, weight = normal(8, 10, seed=3), torch.ones(8)
    matrix = kernel(features, weight)
    unit = torch.nn.functional.normalize(features, dim=-1)[None]
    order = greedy_map(unit @ unit.transpose(1, 2), weight[None], torch.tensor([3]), prefix([8], 8))
    found = order[0].tolist()
    dets = [
        float(torch.det(matrix[list(s)][:, list(s)])) for s in itertools.combinations(range(8), 3)
    ]
    assert float(torch.det(matrix[found][:, found])) >= 0.9 * max(dets)


def with_text(features: Tensor, counts: int, words: Tensor, shift: int = 0) -> Seen:
    """Prompts ``text, image, text`` whose words have the given embeddings ``[B, w, D]``."""
    batch, tokens, width = features.shape
    before = normal(batch, 2, width, seed=77)
    embeds = torch.cat([before, features, words], 1)
    length = embeds.shape[1]
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[:, 2 : 2 + tokens] = True
    slots = find_slots(mask, [Layout.grid((1, tokens))] * batch)
    assert slots is not None
    live = torch.ones_like(mask)
    spoken = ~mask
    if shift:
        spoken[:, -shift:] = False
    sight = TextSight(None, 0, embeds, embeds, None, live, spoken, slots, length - 1)  # type: ignore[arg-type]
    return seen(features, counts, text=sight)


def slow_weight(features: Tensor, words: Tensor, sign: float) -> Tensor:
    relevance = []
    for token in features:
        each = [float(torch.cosine_similarity(token, word, 0)) for word in words]
        relevance.append(sign * sum(each) / len(each))
    low, high = min(relevance), max(relevance)
    return torch.tensor([(r - low + 1e-6) / (high - low) for r in relevance])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sign", ["positive", "negative"])
@pytest.mark.parametrize("theta", [None, 0.5])
def test_relevance_is_the_mean_cosine_with_the_words_behind(
    seed: int, sign: str, theta: float | None
) -> None:
    features, words = normal(2, 10, 12, seed=seed), normal(2, 3, 12, seed=seed + 50)
    one = with_text(features, 4, words)
    compressor = CDPruner(keep_tokens=4, sign=sign, theta=theta)  # type: ignore[arg-type]
    scores, selection = choose(compressor, one)
    for image in range(2):
        weight = slow_weight(features[image], words[image], 1 if sign == "positive" else -1)
        if theta is not None:
            weight = (theta / (2 * (1 - theta)) * weight).exp()
        matrix = kernel(features[image], weight)
        order = slow_greedy(matrix, 4)
        assert places(selection.kept[image]) == set(order)
        for step, token in enumerate(order):
            before = order[:step]
            gain = float(torch.det(matrix[[*before, token]][:, [*before, token]]))
            gain /= float(torch.det(matrix[before][:, before])) if before else 1
            assert float(scores.score[image, token]) == pytest.approx(gain, rel=2e-3, abs=1e-5)


def test_without_words_behind_all_text_counts() -> None:
    features, words = normal(1, 6, 8, seed=4), normal(1, 2, 8, seed=5)
    one = with_text(features, 2, words, shift=2)
    _, selection = choose(CDPruner(keep_tokens=2), one)
    weight = slow_weight(features[0], normal(1, 2, 8, seed=77)[0], 1)
    assert places(selection.kept[0]) == set(slow_greedy(kernel(features[0], weight), 2))


def test_relevance_needs_text_and_can_be_left_out() -> None:
    one = seen(normal(1, 6, 8), 3)
    with pytest.raises(CompressionError, match="text"):
        CDPruner(keep_tokens=3).score(one)
    _, selection = choose(CDPruner(keep_tokens=3, relevance="none"), one)
    truth = slow_greedy(kernel(one.features[0], torch.ones(6)), 3)
    assert places(selection.kept[0]) == set(truth)


def test_more_tokens_than_dimensions_are_still_chosen_once_each() -> None:
    """Past the rank of the features nothing is left to add; no token comes twice, none is NaN."""
    features = normal(1, 20, 3, seed=8).requires_grad_()
    one = seen(features, 15)
    scores, selection = choose(CDPruner(keep_tokens=15, relevance="none"), one)
    assert int(selection.kept.sum()) == 15
    (gradient,) = torch.autograd.grad(scores.score.sum(), features)
    assert bool(gradient.isfinite().all())
    assert bool(scores.score.isfinite().all())


def test_equal_tokens_are_taken_in_order() -> None:
    one = seen(torch.ones(1, 5, 4), 2)
    _, selection = choose(CDPruner(keep_tokens=2, relevance="none"), one)
    assert places(selection.kept[0]) == {0, 1}


def test_score_gradient_is_that_of_the_gain() -> None:
    features = normal(1, 8, 12, seed=2).double()
    compressor = CDPruner(keep_tokens=3, relevance="none")
    scores, _ = choose(compressor, seen(features.requires_grad_(), 3))
    weights = normal(1, 8, seed=9).double()
    (gradient,) = torch.autograd.grad((scores.score * weights).sum(), features)
    direction = normal(1, 8, 12, seed=10).double()
    step = 1e-5

    def at(sign: float) -> float:
        moved = seen((features + sign * step * direction).detach(), 3)
        return float((compressor.score(moved).score * weights).sum())

    slope = (at(1) - at(-1)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4)
    assert not math.isclose(slope, 0, abs_tol=1e-3)
