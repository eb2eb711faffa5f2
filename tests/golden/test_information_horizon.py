"""InformationHorizon: DivPrune first, then a seeded uniform draw, counts met exactly."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from seen import seen

from targets.compression.base import Cut, Stage
from targets.compression.divprune import DivPrune
from targets.compression.information_horizon import InformationHorizon


def second(tokens: int, left: list[bool], count: int, seed: int) -> Any:
    features = torch.zeros(1, tokens, 3)
    made = seen(features, count, valid=torch.tensor([left]), seeds=[seed], stage=Stage.LAYER)
    cut = Cut(Stage.LAYER, 4, number=1)
    return replace(made, cut=cut, totals=torch.tensor([tokens]))


def test_layers_and_counts() -> None:
    one = InformationHorizon(retention=0.25)
    first, late = one.cuts(32)
    assert (first.stage, first.layer) == (Stage.INPUT, None)
    assert (late.stage, late.layer, late.number) == (Stage.LAYER, 20, 1)
    assert [one.cuts(layers)[1].layer for layers in (2, 4, 6, 40)] == [1, 3, 4, 25]
    assert (one.count(first, 576, 32), one.count(late, 576, 32)) == (288, 144)
    fixed = InformationHorizon(keep_tokens=64, early_retention=0.3, layer=7)
    assert fixed.cuts(32)[1].layer == 7
    assert (fixed.count(first, 576, 32), fixed.count(late, 576, 32)) == (173, 64)
    small = InformationHorizon(keep_tokens=64, early_retention=0.05)
    assert (small.count(first, 576, 32), small.count(late, 576, 32)) == (64, 64)
    assert one.count(first, 1, 32) == one.count(late, 1, 32) == 1
    assert one.count(first, 36, 4) == round(math.sqrt(9 * 36))


def test_the_first_cut_is_divprune() -> None:
    features = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0))
    here = seen(features, 5)
    ours = InformationHorizon(retention=0.5).score(here)
    truth = DivPrune(retention=0.5).score(here)
    assert torch.equal(ours.score, truth.score)
    assert torch.equal(ours.chosen, truth.chosen)


def test_the_second_draws_uniformly_among_what_is_left() -> None:
    one = InformationHorizon(keep_tokens=2)
    left = [True, False, True, True, False, True]
    often = torch.zeros(6)
    for seed in range(600):
        here = second(6, left, 2, seed)
        kept = one.select(one.score(here), here).kept[0]
        assert int(kept.sum()) == 2
        again = one.select(one.score(here), here).kept[0]
        assert torch.equal(kept, again)
        often += kept
    assert often[[1, 4]].tolist() == [0, 0]
    # Half of 600 each, four standard deviations of a binomial either way.
    assert float((often[[0, 2, 3, 5]] - 300).abs().amax()) < 4 * math.sqrt(600 * 0.25)
