"""Ways round gathering what already lies in place: each gives what the long way gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from targets.compression.layout import ImageSlots, Lattice, find_slots
from targets.errors import CompressionError
from targets.families.vision import VisionPass, whole_runs
from targets.preprocessing.layout import Layout

SMALL, LARGE = Layout.grid((1, 2)), Layout.grid((2, 2))


def apart(layouts: list[Layout]) -> list[Layout]:
    """The same layouts, each an object of its own."""
    return [replace(one) for one in layouts]


def same(one: ImageSlots, two: ImageSlots) -> bool:
    names = ("rows", "columns", "alive", "carries", "separators")
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in names)


@pytest.mark.parametrize(
    ("layouts", "mask"),
    [
        ([SMALL, SMALL, SMALL], [[0, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0]]),
        ([SMALL, LARGE, SMALL], [[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]),
        ([LARGE, SMALL, SMALL], [[0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 1]]),
    ],
)
def test_images_of_one_layout_are_placed_together(
    layouts: list[Layout], mask: list[list[int]]
) -> None:
    placeholders = torch.tensor(mask, dtype=torch.bool)
    together, each = find_slots(placeholders, layouts), find_slots(placeholders, apart(layouts))
    assert together is not None
    assert each is not None
    assert same(together, each)
    for name in ("tile", "row", "column"):
        assert torch.equal(getattr(together.lattice, name), getattr(each.lattice, name))
    assert together.carry_themselves
    moved = replace(together, carries=together.carries.flip(1))
    assert not moved.carry_themselves


def test_an_image_spread_over_rows_is_refused_among_others() -> None:
    placeholders = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    for layouts in ([SMALL, SMALL], apart([SMALL, SMALL])):
        with pytest.raises(CompressionError, match="spread over several rows"):
            find_slots(placeholders, layouts)


def test_a_lattice_of_one_layout() -> None:
    one = Lattice.of([LARGE] * 3, torch.device("cpu"))
    two = Lattice.of(apart([LARGE] * 3), torch.device("cpu"))
    assert torch.equal(one.row, two.row)
    assert torch.equal(one.column, two.column)


@pytest.mark.parametrize("mixed", [False, True])
def test_tokens_that_are_patches_are_not_gathered(mixed: bool) -> None:
    places, present, base = whole_runs(3, 4, torch.device("cpu"))
    if mixed:
        places = places.flip(1)
    vision = VisionPass({}, 0, 1.0, False, places, present, base)
    values = torch.randn(3, 4, 5)
    found = vision.per_token(values)
    assert torch.equal(found, values.flatten(0, 1)[places])
    assert (found.data_ptr() == values.data_ptr()) != mixed
