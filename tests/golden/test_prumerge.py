"""PruMerge and PruMerge+ against a slow reference, adaptive and with a budget."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from seen import places, random_pass, seen_by_tower, tiled
from torch import Tensor

from targets.compression.base import Seen
from targets.compression.prumerge import PruMerge
from targets.compression.trace import choose
from targets.errors import CompressionError

DEEP: Any = SimpleNamespace(tower_depth=3)


def view(seed: int, counts: int, tokens: int = 30, spike: float = 1.0) -> Seen:
    vision = random_pass(2, tokens, seed=seed)
    last = vision.layers[2]
    last.queries.mul_(spike)
    return seen_by_tower(vision, counts, family=DEEP)


def slow_attention(one: Seen, run: int) -> tuple[Tensor, Tensor]:
    """CLS row of the last layer as one head, and the keys of the patches."""
    last = one.vision.layers[2]
    queries = torch.cat([last.queries[run, h] for h in range(last.queries.shape[1])], 1).double()
    keys = torch.cat([last.keys[run, h] for h in range(last.keys.shape[1])], 1).double()
    row = (queries[0] @ keys.T / queries.shape[1] ** 0.5).softmax(0)
    return row[1:], keys[1:]


def slow_merge(
    features: Tensor, paid: Tensor, keys: Tensor, kept: list[int], near: int, rest: bool
) -> list[Tensor]:
    unit = keys / keys.norm(dim=1, keepdim=True)
    out = []
    for i in sorted(kept, key=lambda i: -float(paid[i])):
        others = [j for j in range(len(paid)) if j != i]
        others.sort(key=lambda j: -float(unit[i] @ unit[j]))
        likes = [paid[j] * features[j].double() for j in others[:near]]
        out.append(features[i].double() + (torch.stack(likes).sum(0) if likes else 0))
    if rest:
        gone = [j for j in range(len(paid)) if j not in kept]
        out.append(torch.stack([paid[j] * features[j].double() for j in gone]).sum(0))
    return out


def slow_outliers(paid: Tensor) -> list[int]:
    values = paid.numpy()
    low, high = np.percentile(values, 25), np.percentile(values, 75)
    found = [i for i, value in enumerate(values) if value > high + 1.5 * (high - low)]
    return found or [int(values.argmax())]


def check(one: Seen, compressor: PruMerge, image: int, kept: list[int], rest: bool) -> None:
    _, selection = choose(compressor, one)
    merged = compressor.merge(selection, one)
    assert places(selection.kept[image]) == set(kept)
    paid, keys = slow_attention(one, image)
    truth = slow_merge(one.features[image], paid, keys, kept, compressor.neighbours, rest)
    found = merged.features[image][merged.valid[image]]
    assert len(found) == len(truth) == len(kept) + rest
    assert torch.allclose(found.double(), torch.stack(truth), atol=1e-4)
    order = sorted(kept, key=lambda i: -float(paid[i]))
    assert merged.source[image][: len(kept)].tolist() == order
    assert merged.dominant[image].tolist()[: len(kept)] == [True] * len(kept)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("near", [0, 4, 32])
def test_adaptive_count_is_that_of_outliers(seed: int, near: int) -> None:
    one = view(seed, 30)
    for image in range(2):
        kept = slow_outliers(slow_attention(one, image)[0])
        check(one, PruMerge(neighbours=near), image, kept, rest=True)


@pytest.mark.parametrize("seed", range(5))
def test_plus_adds_evenly_spaced_tokens(seed: int) -> None:
    one = view(seed, 30)
    for image in range(2):
        outliers = slow_outliers(slow_attention(one, image)[0])
        step = max(1, int(int(1 / (len(outliers) / 30)) / 3))
        kept = sorted({*outliers, *range(0, 29, step)})
        check(one, PruMerge(plus=True), image, kept, rest=True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("total", [1, 2, 9, 29])
def test_a_budget_keeps_one_less_and_the_rest(seed: int, total: int) -> None:
    one = view(seed, total)
    for image in range(2):
        paid, _ = slow_attention(one, image)
        order = sorted(range(30), key=lambda i: -float(paid[i]))
        kept = order[: max(1, total - 1)]
        check(one, PruMerge(keep_tokens=total), image, kept, rest=total > 1)


@pytest.mark.parametrize("total", [3, 8, 20])
def test_plus_with_a_budget_is_half_by_score_half_spread(total: int) -> None:
    one = view(1, total)
    for image in range(2):
        paid, _ = slow_attention(one, image)
        spread = (total - 1) // 2
        order = sorted(range(30), key=lambda i: -float(paid[i]))
        best = order[: total - 1 - spread]
        left = [i for i in range(30) if i not in best]
        even = [left[(2 * i + 1) * len(left) // (2 * spread)] for i in range(spread)]
        check(one, PruMerge(keep_tokens=total, plus=True), image, best + even, rest=True)


def test_a_flat_image_has_no_outlier_and_keeps_one() -> None:
    one = view(0, 30, spike=0.0)
    _, selection = choose(PruMerge(), one)
    assert selection.kept.sum(1).tolist() == [1, 1]


def test_a_spike_raises_the_count() -> None:
    """What an attack on availability would do: the image says how many tokens are left."""
    _, calm = choose(PruMerge(), view(3, 30, spike=0.05))
    _, loud = choose(PruMerge(), view(3, 30, spike=2.0))
    assert int(loud.kept.sum()) > int(calm.kept.sum())


def test_whole_images_stay_as_they_are() -> None:
    one = view(2, 30)
    one.counts[1] = 8
    compressor = PruMerge(keep_tokens=30)
    _, selection = choose(compressor, one)
    merged = compressor.merge(selection, one)
    assert torch.equal(merged.features[0], one.features[0])
    assert merged.source[0].tolist() == list(range(30))
    assert int(merged.valid[1].sum()) == 8


def test_tiles_are_merged_one_by_one() -> None:
    vision = random_pass(3, 12, seed=4, tiles=(3,))
    one = seen_by_tower(vision, 9, family=DEEP, layouts=[tiled((3, 4), (3, 4), (3, 4))])
    compressor = PruMerge(keep_tokens=9, neighbours=3)
    _, selection = choose(compressor, one)
    merged = compressor.merge(selection, one)
    found = merged.features[0].double()
    assert found.shape[0] == 9
    for tile in range(3):
        paid, keys = slow_attention(one, tile)
        kept = sorted(range(12), key=lambda i: -float(paid[i]))[:2]
        features = one.features[0, 12 * tile : 12 * tile + 12]
        truth = slow_merge(features, paid, keys, kept, 3, rest=True)
        assert torch.allclose(found[3 * tile : 3 * tile + 3], torch.stack(truth), atol=1e-4)


def test_a_budget_may_be_left_out_but_not_doubled() -> None:
    assert PruMerge().adaptive
    assert not PruMerge(retention=0.5).adaptive
    with pytest.raises(CompressionError, match="prumerge"):
        PruMerge(retention=0.5, keep_tokens=4)
    assert PruMerge(keep_tokens=3).tower_layers(24, 22) == (23,)
