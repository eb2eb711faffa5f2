"""Sharing budgets out among tiles, and VisionZip tile by tile."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from seen import alone, places, prefix, random_pass, seen, seen_by_tower, tiled
from torch import Tensor

from targets.compression import VisionZip
from targets.compression.base import Seen
from targets.compression.tiles import Tiles, shared
from targets.compression.trace import choose


def slow_shares(count: int, weights: list[int], room: list[int]) -> list[int]:
    """Largest remainder, one token at a time."""
    total = sum(weights)
    exact = [Fraction(count * weight, total) for weight in weights]
    given = [min(int(share), most) for share, most in zip(exact, room, strict=True)]
    while sum(given) < count:
        open_to = [i for i in range(len(given)) if given[i] < room[i]]
        claims = sorted(open_to, key=lambda i: (-(exact[i] - given[i]), i))
        for index in claims[: count - sum(given)]:
            given[index] += 1
    return given


@pytest.mark.parametrize("seed", range(20))
def test_shares_sum_up_and_fit(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(0, 9, (3, 5), generator=generator)
    weights[:, 0] += 1
    room = torch.randint(1, 12, (3, 5), generator=generator)
    counts = (room.sum(1) * torch.rand(3, generator=generator)).long()
    given = shared(counts, weights, room)
    assert given.sum(1).tolist() == counts.tolist()
    assert bool((given <= room).all())
    for row in range(3):
        truth = slow_shares(int(counts[row]), weights[row].tolist(), room[row].tolist())
        assert given[row].tolist() == truth


def test_shares_without_any_weight_follow_the_room() -> None:
    given = shared(torch.tensor([6]), torch.zeros(1, 2).long(), torch.tensor([[2, 10]]))
    assert given.tolist() == [[1, 5]]
    full = shared(torch.tensor([99]), torch.ones(1, 2).long(), torch.tensor([[2, 3]]))
    assert full.tolist() == [[2, 3]]


def test_tiles_hold_each_place_once_and_join_what_they_split() -> None:
    layouts = [tiled((2, 2), (1, 3), (2, 1)), tiled((3, 2))]
    valid = prefix([9, 6], 9)
    valid[0, 4] = False
    one = seen(torch.zeros(2, 9, 1), 3, valid=valid, layouts=layouts)
    tiles = Tiles.of(one.lattice, one.valid)
    assert tiles.sizes.tolist() == [[4, 2, 2], [6, 0, 0]]
    values = torch.arange(18).view(2, 9)
    parts = tiles.split(values)
    assert parts[1][tiles.present[1]].tolist() == [5, 6]
    joined = tiles.join(parts, -1)
    assert torch.equal(joined, values.masked_fill(~valid, -1))


def tiled_view(seed: int, counts: list[int]) -> Seen:
    """A picture of three tiles of 3 × 3 and one of one, CLS in each run."""
    vision = random_pass(4, 9, seed=seed, tiles=(3, 1))
    layouts = [tiled((3, 3), (3, 3), (3, 3)), tiled((3, 3))]
    return seen_by_tower(vision, counts, layouts=layouts)


def slow_tile(
    hidden: Tensor, attention: Tensor, keys: Tensor, total: int
) -> tuple[set[int], list[Tensor], list[Tensor]]:
    """Dominant places, their features, and CLS with contextual ones, of one tile."""
    contextual = round(total / 6.4)
    score = attention.sum(0).tolist()
    number = total - contextual - 1
    dominant = sorted(sorted(range(len(score)), key=lambda i: -score[i])[:number])
    rest = [i for i in range(len(score)) if i not in dominant]
    targets = [rest[k * (len(rest) // contextual)] for k in range(contextual)]
    metric, out = keys.mean(0), [hidden[0]]
    joined: dict[int, list[Tensor]] = {t: [] for t in targets}
    for i in rest:
        if targets and i not in targets:
            alike = [float(torch.cosine_similarity(metric[i], metric[t], 0)) for t in targets]
            near = targets[alike.index(max(alike))]
            joined[near].append(hidden[1 + i])
    for target in targets:
        mean = torch.stack(joined[target]).mean(0) if joined[target] else 0
        out.append(hidden[1 + target] + mean)
    return set(dominant), [hidden[1 + i] for i in dominant], out


@pytest.mark.parametrize("seed", range(3))
def test_visionzip_goes_tile_by_tile(seed: int) -> None:
    compressor = VisionZip(keep_tokens=15)
    one = tiled_view(seed, [15, 5])
    _, selection = choose(compressor, one)
    merged = compressor.merge(selection, one)
    here = one.vision.layers[1]
    runs = {0: [0, 1, 2], 1: [3]}
    for image, total in ((0, 5), (1, 5)):
        kept: set[int] = set()
        spatial: list[Tensor] = []
        others: list[Tensor] = []
        for place, run in enumerate(runs[image]):
            paid = one.vision.attention()[image][:, 9 * place : 9 * place + 9]
            dominant, first, then = slow_tile(here.hidden[run], paid, here.keys[run, :, 1:], total)
            kept |= {9 * place + i for i in dominant}
            spatial += first
            others += then
        truth = spatial + others if image == 0 else [others[0], *spatial, *others[1:]]
        assert places(selection.kept[image]) == kept
        assert int(merged.valid[image].sum()) == len(truth) == 5 * len(runs[image])
        found = merged.features[image][merged.valid[image]]
        assert torch.allclose(found, torch.stack(truth), atol=1e-5)


def test_visionzip_keeps_a_single_tile_first_where_another_picture_has_several() -> None:
    """Whatever else is in the batch, the selection of an image is its own."""
    compressor = VisionZip(keep_tokens=5)
    one = tiled_view(7, [15, 5])
    _, both = choose(compressor, one)
    merged = compressor.merge(both, one)
    for image in range(2):
        single = alone(one, image)
        _, own = choose(compressor, single)
        width = single.valid.shape[1]
        assert torch.equal(own.kept[0], both.kept[image, :width])
        made = compressor.merge(own, single)
        assert torch.allclose(
            made.features[0][made.valid[0]], merged.features[image][merged.valid[image]], atol=1e-6
        )
        assert made.source[0][made.valid[0]].tolist() == (
            merged.source[image][merged.valid[image]].tolist()
        )


def test_visionzip_leaves_a_whole_image_as_it_is() -> None:
    compressor = VisionZip(keep_tokens=9)
    one = tiled_view(3, [15, 9])
    _, selection = choose(compressor, one)
    merged = compressor.merge(selection, one)
    assert places(selection.kept[1]) == set(range(9))
    assert merged.source[1][merged.valid[1]].tolist() == list(range(9))
    assert torch.equal(merged.features[1][merged.valid[1]], one.features[1, :9])


def test_visionzip_small_tiles_keep_patches_only() -> None:
    compressor = VisionZip(keep_tokens=3)
    one = tiled_view(4, [3, 9])
    _, selection = choose(compressor, one)
    assert [int(selection.kept[0, 9 * t : 9 * t + 9].sum()) for t in range(3)] == [1, 1, 1]
    merged = compressor.merge(selection, one)
    assert int(merged.valid[0].sum()) == 3
