"""Grid and pool against slow references, and how grids are thinned."""

from __future__ import annotations

import math

import pytest
import torch
from seen import alone, normal, places, prefix, seen, tiled
from torch import Tensor

from targets.compression.grid import Grid
from targets.compression.pool import Pool
from targets.compression.thinning import thinned
from targets.compression.trace import choose
from targets.preprocessing.layout import Layout


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (24, 24), (7, 12), (30, 2)])
def test_thinned_grids_fit_and_leave_no_room(shape: tuple[int, int]) -> None:
    for count in range(1, shape[0] * shape[1] + 3):
        rows, columns = thinned(shape, count)
        assert 1 <= rows <= shape[0]
        assert 1 <= columns <= shape[1]
        assert rows * columns <= count
        assert rows == shape[0] or (rows + 1) * columns > count
        assert columns == shape[1] or rows * (columns + 1) > count


def test_thinned_squares_stay_square() -> None:
    for side in range(1, 25):
        assert thinned((24, 24), side * side) == (side, side)
    assert thinned((24, 24), 192) == (13, 14) or thinned((24, 24), 192) == (14, 13)
    assert thinned((12, 24), 72) == (6, 12)


def slow_cells(size: int, cells: int) -> list[range]:
    return [
        range(cell * size // cells, math.ceil((cell + 1) * size / cells)) for cell in range(cells)
    ]


def slow_pool(grid: Tensor, shape: tuple[int, int], kind: str) -> Tensor:
    """Of ``[H, W, D]``, NaN where there is no token."""
    out = []
    for rows in slow_cells(grid.shape[0], shape[0]):
        for columns in slow_cells(grid.shape[1], shape[1]):
            cell = torch.stack([grid[r, c] for r in rows for c in columns])
            cell = cell[~cell.isnan().any(1)]
            if len(cell):
                out.append(cell.mean(0) if kind == "average" else cell.amax(0))
    return torch.stack(out)


@pytest.mark.parametrize("kind", ["average", "max"])
@pytest.mark.parametrize(("shape", "count"), [((6, 6), 9), ((6, 6), 16), ((5, 7), 6), ((4, 6), 1)])
def test_pool(kind: str, shape: tuple[int, int], count: int) -> None:
    features = normal(2, shape[0] * shape[1], 3, seed=count)
    one = seen(features, count, layouts=[Layout.grid(shape)] * 2)
    compressor = Pool(keep_tokens=count, kind=kind)  # type: ignore[arg-type]
    _, selection = choose(compressor, one)
    merged = compressor.merge(selection, one)
    for image in range(2):
        truth = slow_pool(features[image].view(*shape, 3), thinned(shape, count), kind)
        assert torch.allclose(merged.features[image], truth, atol=1e-6)
    assert bool(merged.valid.all())
    assert not bool(merged.dominant.any())
    # A token of the grid stands for its cell.
    assert merged.source[0].tolist() == sorted(places(selection.kept[0]))


@pytest.mark.parametrize("kind", ["average", "max"])
def test_pool_leaves_absent_places_out(kind: str) -> None:
    features = normal(1, 24, 3, seed=1)
    valid = prefix([24], 24)
    valid[0, [3, 9, 10, 17, 23]] = False
    one = seen(features, 6, valid=valid, layouts=[Layout.grid((4, 6))])
    compressor = Pool(keep_tokens=6, kind=kind)  # type: ignore[arg-type]
    _, selection = choose(compressor, one)
    merged = compressor.merge(selection, one)
    count = int(valid.sum())
    grid = features[0].masked_fill(~valid[0, :, None], torch.nan).view(4, 6, 3)
    truth = slow_pool(grid, thinned((4, 6), 6), kind)
    assert count == 19
    assert torch.allclose(merged.features[0][merged.valid[0]], truth, atol=1e-6)
    assert set(merged.source[0].tolist()) <= places(valid[0])


def test_pool_of_one_cell_is_the_mean() -> None:
    features = normal(1, 12, 4)
    one = seen(features, 1, layouts=[Layout.grid((3, 4))])
    compressor = Pool(keep_tokens=1)
    merged = compressor.merge(choose(compressor, one)[1], one)
    assert torch.allclose(merged.features[0, 0], features[0].mean(0), atol=1e-6)


def test_pool_has_gradients_and_pictures_of_many_forms() -> None:
    layouts = [tiled((4, 4), (4, 6)), Layout.grid((3, 5))]
    features = normal(2, 40, 3, seed=2).requires_grad_()
    one = seen(features, [12, 4], valid=prefix([40, 15], 40), layouts=layouts)
    compressor = Pool(retention=0.3)
    _, selection = choose(compressor, one)
    merged = compressor.merge(selection, one)
    # 12 of 40 tokens: 5 of 16 and 7 of 24.
    shapes = [thinned((4, 4), 5), thinned((4, 6), 7)]
    first = slow_pool(features[0, :16].view(4, 4, 3), shapes[0], "average")
    second = slow_pool(features[0, 16:].view(4, 6, 3), shapes[1], "average")
    assert torch.allclose(merged.features[0], torch.cat([first, second]), atol=1e-6)
    single = alone(one, 1)
    own = compressor.merge(choose(compressor, single)[1], single)
    assert torch.allclose(own.features[0], merged.features[1][merged.valid[1]], atol=1e-6)
    (gradient,) = torch.autograd.grad(merged.features[merged.valid].sum(), features)
    assert float(gradient[0].sum()) == pytest.approx(3.0 * (len(first) + len(second)), rel=1e-5)
    assert float(gradient[1, 15:].abs().max()) == 0


@pytest.mark.parametrize(
    ("shape", "count"), [((6, 6), 9), ((5, 7), 12), ((1, 10), 3), ((6, 6), 36)]
)
def test_grid(shape: tuple[int, int], count: int) -> None:
    one = seen(normal(1, shape[0] * shape[1], 2), count, layouts=[Layout.grid(shape)])
    _, selection = choose(Grid(keep_tokens=count), one)
    rows, columns = thinned(shape, count)
    truth = {
        math.floor((i + 0.5) * shape[0] / rows) * shape[1]
        + math.floor((j + 0.5) * shape[1] / columns)
        for i in range(rows)
        for j in range(columns)
    }
    assert len(truth) == rows * columns
    assert places(selection.kept[0]) == truth


def test_grid_thins_each_tile() -> None:
    one = seen(normal(1, 52, 2), 13, layouts=[tiled((6, 6), (4, 4))])
    _, selection = choose(Grid(retention=0.25), one)
    assert places(selection.kept[0]) == {
        *(6 * r + c for r in (1, 3, 5) for c in (1, 3, 5)),
        *(36 + 4 * r + c for r in (1, 3) for c in (1, 3)),
    }
