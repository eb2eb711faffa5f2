"""HiRED against a slow reference: budgets of tiles, then tokens."""

from __future__ import annotations

import pytest
import torch
from seen import alone, places, random_pass, seen_by_tower, tiled
from torch import Tensor

from targets.compression.base import Seen
from targets.compression.hired import HiRED
from targets.compression.tiles import Tiles
from targets.compression.trace import choose
from targets.preprocessing.layout import Layout

TOKENS = 16


def anyres() -> Layout:
    """A whole view of a 8 × 8 picture and four tiles side by side, 4 × 4 tokens each."""
    whole = Layout.grid((4, 4), (0, 0, 8, 8))
    corners = [(0, 0), (0, 4), (4, 0), (4, 4)]
    parts = [Layout.grid((4, 4), (top, left, top + 4, left + 4)) for top, left in corners]
    five = tiled(*[(4, 4)] * 5)
    boxes = torch.cat([whole.boxes, *(part.boxes for part in parts)])
    return Layout(boxes, five.tile, five.row, five.column, five.shapes, 0, five.columns, 80)


def view(seed: int, count: int) -> Seen:
    vision = random_pass(5, TOKENS, seed=seed, tiles=(5,))
    return seen_by_tower(vision, count, layouts=[anyres()])


def top(score: Tensor, count: int) -> list[int]:
    values = score.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def slow_budgets(one: Seen, count: int, alpha: float, spatial: bool) -> tuple[int, list[int]]:
    whole = min(int(count * alpha), TOKENS)
    left = count - whole
    early = one.vision.attention(0)[0].sum(0)[:TOKENS]
    hits = [0] * 4
    for token in top(early, int(TOKENS * (1 - alpha))):
        row, column = divmod(token, 4)
        hits[2 * (row // 2) + column // 2 if spatial else token // 4] += 1
    exact = [left * hit / sum(hits) for hit in hits]
    given = [min(int(share), TOKENS) for share in exact]
    while sum(given) < left:
        free = [i for i in range(4) if given[i] < TOKENS]
        claims = sorted(free, key=lambda i: (-round(exact[i] - given[i], 9), i))
        for index in claims[: left - sum(given)]:
            given[index] += 1
    return whole, given


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 7, 16, 40, 79])
@pytest.mark.parametrize("variant", ["official", "spatial"])
def test_hired(seed: int, count: int, variant: str) -> None:
    compressor = HiRED(keep_tokens=count, variant=variant)  # type: ignore[arg-type]
    one = view(seed, count)
    whole, given = slow_budgets(one, count, 0.5, variant == "spatial")
    if whole + sum(given) == count and max(given) < TOKENS:
        budgets = compressor.budgets(one, Tiles.of(one.lattice, one.valid))
        assert budgets[0].tolist() == [whole, *given]
    _, selection = choose(compressor, one)
    assert int(selection.kept.sum()) == count
    late = one.vision.attention()[0].sum(0)
    for tile, number in enumerate([whole, *given]):
        here = slice(TOKENS * tile, TOKENS * tile + TOKENS)
        assert places(selection.kept[0, here]) == set(top(late[here], number))


def test_variants_differ_where_flattened_runs_are_no_tiles() -> None:
    """All early attention in the left half: rows of it belong to two tiles, runs to four."""
    one = view(0, 24)
    early = one.vision.layers[0]
    early.queries[0, :, 0] = 0
    early.queries[0, :, 0, 0] = 9
    early.keys[0] = 0
    early.keys[0, :, 1:, 0] = (torch.arange(16) % 4 < 2).float() * 9
    tiles = Tiles.of(one.lattice, one.valid)
    official = HiRED(keep_tokens=24).budgets(one, tiles)[0].tolist()
    spatial = HiRED(keep_tokens=24, variant="spatial").budgets(one, tiles)[0].tolist()
    assert official == [12, 3, 3, 3, 3]
    assert spatial == [12, 6, 0, 6, 0]


def test_what_does_not_fit_goes_elsewhere() -> None:
    one = view(1, 70)
    early = one.vision.layers[0]
    early.queries[0, :, 0] = 0
    early.queries[0, :, 0, 0] = 9
    early.keys[0] = 0
    early.keys[0, :, 1:3, 0] = 9
    compressor = HiRED(keep_tokens=70, alpha=0.875)
    # int(70 · 0.875) = 61 is more than the whole view has; int(16 · 0.125) = 2 tokens are counted,
    # both of the first tile, whose 16 places are not enough for the 54 left.
    budgets = compressor.budgets(one, Tiles.of(one.lattice, one.valid))[0].tolist()
    assert budgets[:2] == [16, 16]
    assert sum(budgets) == 70


def test_a_picture_of_one_tile_keeps_its_best_beside_one_of_several() -> None:
    vision = random_pass(6, TOKENS, seed=3, tiles=(5, 1))
    layouts = [anyres(), Layout.grid((4, 4))]
    one = seen_by_tower(vision, [20, 5], layouts=layouts)
    _, selection = choose(HiRED(retention=0.25), one)
    late = vision.attention()[1].sum(0)[:TOKENS]
    assert places(selection.kept[1]) == set(top(late, 5))
    for image in range(2):
        single = alone(one, image)
        _, own = choose(HiRED(retention=0.25), single)
        width = single.valid.shape[1]
        assert torch.equal(own.kept[0], selection.kept[image, :width])


def test_it_asks_for_the_first_layer() -> None:
    assert HiRED(retention=0.2).tower_layers(24, 22) == (0,)
