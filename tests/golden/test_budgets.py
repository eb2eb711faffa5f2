"""Where stages lie and how many tokens they leave, for every method that has several."""

from __future__ import annotations

from typing import Any

import pytest

from targets.compression.base import Cut, Stage
from targets.compression.budgets import layer_average, power_stages, scaled_layers
from targets.compression.pyramiddrop import PyramidDrop
from targets.compression.sparsevlm import SparseVLM, chosen, clusters
from targets.compression.staged import Staged
from targets.compression.transprune import TransPrune
from targets.compression.vasparse import VASparse
from targets.compression.visiondrop import VisionDrop
from targets.errors import CompressionError

ALL: list[type[Staged]] = [PyramidDrop, SparseVLM, TransPrune, VASparse, VisionDrop]
DEPTHS = (2, 3, 4, 5, 6, 8, 12, 16, 24, 28, 32, 36, 40, 80)


def held(one: Staged, tokens: int, layers: int) -> list[int]:
    """Tokens at each layer, written out."""
    counts, starts = one.stage_counts(tokens, layers), one.starts(layers)
    return [
        next((c for c, s in reversed([*zip(counts, starts, strict=True)]) if layer >= s), tokens)
        for layer in range(layers)
    ]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("layers", DEPTHS)
def test_layers_are_distinct_and_exist(kind: type[Staged], layers: int) -> None:
    at = kind(retention=0.5).drops_at(layers)
    assert list(at) == sorted(set(at))
    assert at[0] >= 1
    assert at[-1] < layers
    if layers == 32:
        assert at == kind.official_layers
    if layers >= 16:  # room enough to be in proportion
        assert all(
            abs(a / layers - b / 32) < 0.1 for a, b in zip(at, kind.official_layers, strict=True)
        )


def test_published_layers_scale_with_depth() -> None:
    assert scaled_layers((8, 16, 24), 32, 28) == (7, 14, 21)
    assert scaled_layers((8, 16, 24), 32, 6) == (2, 3, 5)
    assert scaled_layers((3, 7, 16), 32, 6) == (1, 2, 3)
    assert scaled_layers((3, 7, 16, 20), 32, 4) == (1, 2, 3)
    with pytest.raises(CompressionError, match="one layer"):
        scaled_layers((8, 16, 24), 32, 1)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("layers", [3, 4, 6, 32])
@pytest.mark.parametrize("tokens", [1, 2, 36, 144, 576, 2880])
@pytest.mark.parametrize("retention", [0.01, 0.11, 0.25, 0.5, 0.9, 1.0])
def test_the_last_stage_leaves_the_budget(
    kind: type[Staged], layers: int, tokens: int, retention: float
) -> None:
    one = kind(retention=retention)
    counts = one.stage_counts(tokens, layers)
    assert counts[-1] == max(1, round(retention * tokens))
    assert list(counts) == sorted(counts, reverse=True)
    assert counts[0] <= tokens
    cuts = [cut for cut in one.cuts(layers) if cut.drops]
    assert [one.count(cut, tokens, layers) for cut in cuts] == list(counts)
    if retention == 1:
        assert set(counts) == {tokens}


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("layers", [6, 32])
@pytest.mark.parametrize("tokens", [144, 576])
def test_an_average_is_the_mean_over_layers(kind: type[Staged], layers: int, tokens: int) -> None:
    smallest = held(kind(keep_tokens=1), tokens, layers)
    for wanted in (tokens // 2, tokens * 3 // 5, tokens - 1):
        assert sum(smallest) / layers < wanted
        one = kind(keep_tokens=wanted, budget_is="average")
        mean = sum(held(one, tokens, layers)) / layers
        assert abs(mean - wanted) < 2.5
        starts = one.starts(layers)
        counted = layer_average(one.stage_counts(tokens, layers), starts, layers, tokens)
        assert counted == pytest.approx(mean)


def test_an_average_below_reach_is_refused() -> None:
    one = PyramidDrop(keep_tokens=64, budget_is="average")
    with pytest.raises(CompressionError, match=r"64 of 576.*layers \[8, 16, 24\].*earlier"):
        one.stage_counts(576, 32)
    earlier = PyramidDrop(keep_tokens=64, budget_is="average", layers=(1, 2, 8))
    assert abs(sum(held(earlier, 576, 32)) / 32 - 64) < 1


def test_pyramiddrop_halves() -> None:
    assert PyramidDrop(retention=0.125).stage_counts(576, 32) == (288, 144, 72)
    assert PyramidDrop(keep_tokens=72).stage_counts(576, 32) == (288, 144, 72)
    assert PyramidDrop(retention=0.125).stage_counts(577, 32)[:2] == (288, 144)  # rounded down
    given = PyramidDrop(keep_tokens=64, shares=(0.4, 0.2))
    assert given.stage_counts(576, 32) == (230, 115, 64)
    four = PyramidDrop(retention=0.0625, layers=(4, 8, 12, 16))
    assert four.stage_counts(576, 32) == (288, 144, 72, 36)


def test_transprune_keeps_its_published_shares() -> None:
    assert TransPrune(retention=0.125).stage_counts(576, 32) == (504, 360, 72)
    middle = TransPrune(retention=0.5).stage_counts(576, 32)
    assert 504 < middle[0] < 576
    assert 360 < middle[1] < middle[0]
    with pytest.raises(CompressionError, match="2 shares were given, but this model has 2 stages"):
        TransPrune(retention=0.1, shares=(0.9, 0.5)).stage_counts(576, 3)


def test_vasparse_keeps_the_same_share_at_each_stage() -> None:
    counts = VASparse(retention=0.75**4).stage_counts(10_000, 32)
    assert counts == pytest.approx((7500, 5625, 4218, 3164), abs=1)


def test_visiondrop_meets_its_script() -> None:
    for budget in ("official", "average"):
        one = VisionDrop(keep_tokens=32, budget_is=budget)  # type: ignore[arg-type]
        assert one.stage_counts(576, 32) == (48, 35, 26, 19)
    assert VisionDrop(keep_tokens=19).stage_counts(576, 32) == (48, 35, 26, 19)
    assert sum(held(VisionDrop(keep_tokens=19), 576, 32)) == 32 * 32


LISTS = {
    "v1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "v2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}


@pytest.mark.parametrize("variant", ["v1.5", "v2.0"])
@pytest.mark.parametrize("name", [192, 128, 96, 64])
def test_sparsevlm_chooses_as_many_as_the_published_lists(variant: Any, name: int) -> None:
    one = SparseVLM(keep_tokens=name, budget_is="official", variant=variant)
    before, found = 576, []
    for count in one.stage_counts(576, 32):
        found.append(chosen(before, count) if one.recycles else count)
        before = count
    assert tuple(found) == LISTS[variant][name]
    last = one.stage_counts(576, 32)[-1]
    again = SparseVLM(keep_tokens=last, variant=variant)
    assert again.stage_counts(576, 32) == one.stage_counts(576, 32)


def test_sparsevlm_without_clusters_counts_the_lists_alone() -> None:
    one = SparseVLM(keep_tokens=192, budget_is="official", recycling=False)
    assert one.stage_counts(576, 32) == (300, 200, 110)
    half = SparseVLM(keep_tokens=96, budget_is="official", recycling=False)
    assert half.stage_counts(288, 32) == (150, 100, 55)


def test_published_lists_are_for_three_stages() -> None:
    with pytest.raises(CompressionError, match="three stages"):
        SparseVLM(keep_tokens=64, budget_is="official", layers=(2, 4)).stage_counts(576, 32)


@pytest.mark.parametrize(("dropped", "number"), [(0, 0), (1, 1), (29, 1), (30, 2), (276, 9)])
def test_clusters_left_behind(dropped: int, number: int) -> None:
    assert clusters(dropped) == number


@pytest.mark.parametrize("before", [1, 2, 5, 37, 144])
def test_chosen_tokens_and_clusters_fill_the_budget(before: int) -> None:
    for total in range(1, before + 1):
        k = chosen(before, total)
        assert 1 <= k <= total
        made = k + clusters(before - k)
        assert made == total or (k == 1 and made > total)  # then fewer clusters are made


def test_powers_never_lose_a_token_to_rounding() -> None:
    for final in range(1, 65):
        assert power_stages([0.5, 0.25], final * final, final)[0] >= final
    assert power_stages([0.5, 0.25, 0.125], 1000, 125) == (500, 250, 125)
    assert power_stages([0.5, 0.25], 3, 3) == (3, 3)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("layers", [(), (0, 3), (3, 3), (5, 4)])
def test_layers_must_ascend_from_one(kind: type[Staged], layers: tuple[int, ...]) -> None:
    with pytest.raises(CompressionError, match=f"{kind.name}: layers are"):
        kind(retention=0.5, layers=layers)


@pytest.mark.parametrize("kind", ALL)
def test_layers_must_exist(kind: type[Staged]) -> None:
    with pytest.raises(CompressionError, match="layer 9 does not exist"):
        kind(retention=0.5, layers=(2, 5, 9)).cuts(9)


@pytest.mark.parametrize("kind", [PyramidDrop, TransPrune])
@pytest.mark.parametrize("shares", [(0.5,), (0.5, 0.6), (1.5, 0.5), (0.5, 0.0), (0.5, 0.2, 0.1)])
def test_shares_must_fit(kind: Any, shares: tuple[float, ...]) -> None:
    with pytest.raises(CompressionError, match="shares are"):
        kind(retention=0.1, shares=shares)


def test_cuts_rank_where_the_papers_do() -> None:
    assert [(c.layer, c.reads) for c in PyramidDrop(retention=0.1).cuts(32)] == [
        (8, 8),
        (16, 16),
        (24, 24),
    ]
    plus = SparseVLM(retention=0.1, variant="v2.0").cuts(32)
    assert [(c.layer, c.reads, c.drops) for c in plus] == [
        (3, 2, True),
        (7, 6, True),
        (16, 15, True),
    ]
    first = SparseVLM(retention=0.1).cuts(32)
    assert [(c.reads, c.drops) for c in first] == [
        (2, False), (3, True), (6, False), (7, True), (15, False), (16, True)
    ]  # fmt: skip
    assert [c.number for c in first] == list(range(6))
    assert TransPrune(retention=0.1).watches(32) == tuple(range(6, 12))
    drop = VisionDrop(retention=0.1).cuts(32)
    assert drop[0] == Cut(Stage.VISION, attends=True)
    assert [c.layer for c in drop[1:]] == [8, 16, 24]
