"""HiPrune against a slow reference: anchors, their neighbours at borders, registers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from seen import places, random_pass, seen_by_tower, tiled

from targets.compression.base import Seen
from targets.compression.hiprune import HiPrune
from targets.compression.trace import choose
from targets.errors import CompressionError

SHALLOW: Any = SimpleNamespace(tower_depth=3)


def slow_received(one: Seen, layer: int, run: int) -> list[float]:
    here = one.vision.layers[layer]
    heads, length = here.queries.shape[1:3]
    total = torch.zeros(length, dtype=torch.double)
    for head in range(heads):
        logits = here.queries[run, head].double() @ here.keys[run, head].double().T
        total += (logits * one.vision.scaling).softmax(1).mean(0) / heads
    return total[1:].tolist()


def best(score: list[float], count: int, out: set[int] | None = None) -> list[int]:
    free = [i for i in range(len(score)) if i not in (out or set())]
    return sorted(free, key=lambda i: (-score[i], i))[:count]


def slow_hiprune(
    middle: list[float], deep: list[float], total: int, alpha: float, side: int, spatial: bool
) -> set[int]:
    number = side * side
    anchors = best(middle, min(total, round(total * alpha / 5)))
    near: set[int] = set()
    for anchor in anchors:
        row, column = divmod(anchor, side)
        if spatial:
            around = [(row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)]
            near |= {r * side + c for r, c in around if 0 <= r < side and 0 <= c < side}
        else:
            near |= {min(max(anchor + step, 0), number - 1) for step in (-1, 1, -side, side)}
    buffers = best(middle, len(middle), set(range(number)) - (near - set(anchors)))
    chosen = (anchors + buffers)[:total]
    return set(chosen) | set(best(deep, total - len(chosen), set(chosen)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("total", "alpha"), [(1, 0.1), (8, 1.0), (12, 0.5), (30, 0.1), (3, 1.0)])
@pytest.mark.parametrize("variant", ["official", "spatial"])
def test_hiprune(seed: int, total: int, alpha: float, variant: str) -> None:
    options: dict[str, Any] = {"keep_tokens": total, "alpha": alpha, "variant": variant}
    one = seen_by_tower(random_pass(2, 36, seed=seed), total, family=SHALLOW)
    _, selection = choose(HiPrune(object_layer=0, **options), one)
    for image in range(2):
        middle, deep = slow_received(one, 0, image), slow_received(one, 1, image)
        truth = slow_hiprune(middle, deep, total, alpha, 6, variant == "spatial")
        assert len(truth) == total
        assert places(selection.kept[image]) == truth


@pytest.mark.parametrize(
    ("anchor", "official", "spatial"),
    [
        (0, {0, 1, 4}, {0, 1, 4}),  # corner: up and left are clamped to itself
        (2, {0, 1, 2, 3, 6}, {1, 2, 3, 6}),  # first row: up is clamped to token 0
        (7, {3, 6, 7, 8, 11}, {3, 6, 7, 11}),  # last column: right wraps to the next row
        (13, {9, 12, 13, 14, 15}, {9, 12, 13, 14}),  # last row: down is clamped to the last
    ],
)
def test_neighbours_at_borders(anchor: int, official: set[int], spatial: set[int]) -> None:
    one = seen_by_tower(random_pass(1, 16), 5, family=SHALLOW)
    for layer in (0, 1):
        here = one.vision.layers[layer]
        here.queries.zero_()
        here.keys.zero_()
    one.vision.layers[0].queries[..., 0] = 5
    one.vision.layers[0].keys[0, :, 1 + anchor, 0] = 5
    for variant, truth in (("official", official), ("spatial", spatial)):
        compressor = HiPrune(keep_tokens=5, alpha=1.0, object_layer=0, variant=variant)  # type: ignore[arg-type]
        _, selection = choose(compressor, one)
        # Registers fill up with the first tokens, all being equal.
        fill = [i for i in range(16) if i not in truth][: 5 - len(truth)]
        assert places(selection.kept[0]) == truth | set(fill)


def test_tiles_have_their_own_anchors() -> None:
    layouts = [tiled((4, 4), (4, 4))]
    one = seen_by_tower(random_pass(2, 16, seed=6, tiles=(2,)), 16, layouts=layouts, family=SHALLOW)
    _, selection = choose(HiPrune(keep_tokens=16, alpha=0.6, object_layer=0), one)
    for tile in range(2):
        middle, deep = slow_received(one, 0, tile), slow_received(one, 1, tile)
        truth = slow_hiprune(middle, deep, 8, 0.6, 4, spatial=False)
        assert places(selection.kept[0, 16 * tile : 16 * tile + 16]) == truth


def test_the_object_layer_follows_the_depth() -> None:
    assert HiPrune(keep_tokens=1).tower_layers(24, 22) == (8,)
    assert HiPrune(keep_tokens=1).tower_layers(12, 10) == (3,)
    assert HiPrune(keep_tokens=1).tower_layers(2, 0) == (0,)
    assert HiPrune(keep_tokens=1, object_layer=15).tower_layers(32, 31) == (15,)
    with pytest.raises(CompressionError, match="lies behind the features"):
        HiPrune(keep_tokens=1, object_layer=23).tower_layers(24, 22)
