"""What holds for every compressor in front of the language model, on pictures of many forms."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from seen import alone, normal, random_pass, seen, seen_by_tower, spoiled, tiled
from torch import Tensor

from targets.compression import (
    CDPruner,
    DivPrune,
    FasterVLM,
    Grid,
    HiPrune,
    HiRED,
    Pool,
    PruMerge,
    Random,
    Uniform,
    VisionZip,
    VisPruner,
    ZooPrune,
)
from targets.compression.base import Compressor, Merged, Seen, Stage
from targets.compression.trace import choose
from targets.preprocessing.layout import Layout

SIDE, PATCHES = 5, 25
RUNS = (3, 1, 2)
SHAPE = (SIDE, SIDE)
LAYOUTS = [tiled(SHAPE, SHAPE, SHAPE), Layout.grid(SHAPE), tiled(SHAPE, SHAPE)]
WEIGHT = normal(12, 8, seed=99)

ALL: dict[str, Compressor] = {
    "cdpruner": CDPruner(keep_tokens=9, relevance="none"),
    "divprune": DivPrune(keep_tokens=9),
    "fastervlm": FasterVLM(keep_tokens=9),
    "grid": Grid(keep_tokens=9),
    "hiprune": HiPrune(keep_tokens=9, alpha=0.6, object_layer=0),
    "hiprune spatial": HiPrune(keep_tokens=9, alpha=0.6, object_layer=0, variant="spatial"),
    "hired": HiRED(keep_tokens=9),
    "hired spatial": HiRED(keep_tokens=9, variant="spatial"),
    "pool": Pool(keep_tokens=9),
    "pool max": Pool(keep_tokens=9, kind="max"),
    "prumerge": PruMerge(keep_tokens=9),
    "prumerge plus": PruMerge(keep_tokens=9, plus=True),
    "prumerge adaptive": PruMerge(),
    "prumerge plus adaptive": PruMerge(plus=True),
    "random": Random(keep_tokens=9),
    "uniform": Uniform(keep_tokens=9),
    "visionzip": VisionZip(keep_tokens=9),
    "vispruner": VisPruner(keep_tokens=9),
    "zoo_prune": ZooPrune(keep_tokens=9, directions=3),
    "zoo_prune exact": ZooPrune(keep_tokens=9, directions=3, estimate="jvp"),
}
BLIND = ("random", "uniform", "grid", "pool")
AT_MOST = ("grid", "pool")
"""A coarser grid need not fill its budget."""


def project(features: Tensor) -> Tensor:
    return torch.tanh(features @ WEIGHT.to(features.dtype))


FAMILY: Any = SimpleNamespace(
    tower_depth=3, project_tokens=project, projector=torch.nn.Identity(), dtype=torch.float32
)


def view(one: Compressor, counts: Any = 9, *, seed: int = 0, holes: bool = False) -> Seen:
    """Three pictures of three, one and two tiles; with holes, some places are gone already."""
    vision = random_pass(sum(RUNS), PATCHES, seed=seed, tiles=RUNS)
    valid = vision.present.clone()
    if holes:
        valid &= normal(*valid.shape, seed=seed + 1) > -0.8
    more: dict[str, Any] = {"layouts": LAYOUTS, "family": FAMILY, "valid": valid}
    more["seeds"] = (5, 6, 7)
    if one.stage is Stage.VISION:
        attention = {} if one.attends else {"attention": None, "query": None, "keys": None}
        projected = project(vision.patches)
        return seen_by_tower(vision, counts, projected=projected, **attention, **more)
    return seen(project(vision.patches), counts, **more)


def result(one: Compressor, what: Seen) -> tuple[Tensor, Merged | None]:
    _, selection = choose(one, what)
    return selection.kept, one.merge(selection, what)


@pytest.fixture(params=sorted(ALL))
def compressor(request: pytest.FixtureRequest) -> Compressor:
    return ALL[request.param]


def left(kept: Tensor, merged: Merged | None) -> list[int]:
    counts: list[int] = (kept if merged is None else merged.valid).sum(1).tolist()
    return counts


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("counts", [(9, 9, 9), (30, 6, 12), (1, 3, 2)])
def test_as_many_as_asked_for_and_none_that_is_not_there(
    compressor: Compressor, counts: tuple[int, ...], holes: bool
) -> None:
    if compressor.name == "visionzip" and min(counts) < 3:
        counts = (3, 3, 3)
    what = view(compressor, counts, holes=holes)
    kept, merged = result(compressor, what)
    assert not bool((kept & ~what.valid).any())
    found = left(kept, merged)
    if isinstance(compressor, PruMerge) and compressor.adaptive:
        assert all(n >= tiles for n, tiles in zip(found, RUNS, strict=True))
    elif compressor.name in AT_MOST:
        assert all(0 < n <= count for n, count in zip(found, counts, strict=True))
    else:
        assert found == list(counts)
    if merged is not None:
        sources = merged.source[merged.valid]
        image = merged.valid.nonzero()[:, 0]
        assert bool(what.valid[image, sources].all())
        assert bool(merged.features[merged.valid].isfinite().all())


@pytest.mark.parametrize("holes", [False, True])
def test_an_image_alone_is_the_image_in_a_batch(compressor: Compressor, holes: bool) -> None:
    counts = (20, 7, 11)
    what = view(compressor, counts, holes=holes)
    kept, merged = result(compressor, what)
    for image in range(3):
        single = alone(what, image)
        own, made = result(compressor, single)
        width = own.shape[1]
        assert torch.equal(own[0], kept[image, :width])
        scores = compressor.score(what).score[image, :width][single.valid[0]]
        mine = compressor.score(single).score[0][single.valid[0]]
        assert torch.allclose(mine, scores, atol=1e-5)
        if merged is not None and made is not None:
            here, there = made.valid[0], merged.valid[image]
            assert torch.allclose(made.features[0][here], merged.features[image][there], atol=1e-5)
            assert torch.equal(made.source[0][here], merged.source[image][there])


def test_garbage_where_no_token_is_changes_nothing(compressor: Compressor) -> None:
    what = view(compressor, (20, 7, 11), holes=True)
    kept, merged = result(compressor, what)
    dirty = spoiled(what)
    again, made = result(compressor, dirty)
    assert torch.equal(kept, again)
    one, two = compressor.score(what).score, compressor.score(dirty).score
    assert torch.equal(one[what.valid], two[what.valid])
    assert bool(two.isfinite().all())
    if merged is not None and made is not None:
        assert torch.equal(merged.features[merged.valid], made.features[made.valid])


def test_gradients_are_finite_and_stay_with_living_tokens(compressor: Compressor) -> None:
    what = view(compressor, (20, 7, 11), holes=True)
    leaves = {"features": what.features.clone().requires_grad_()}
    if what.attention is not None:
        leaves["attention"] = what.attention.clone().requires_grad_()
    if what.projected is not None:
        leaves["projected"] = what.projected.clone().requires_grad_()
    what = replace(what, **leaves)
    scores, selection = choose(compressor, what)
    merged = compressor.merge(selection, what)
    loss = scores.score[what.valid].sum() + scores.log_score[what.valid].square().sum()
    if merged is not None:
        loss = loss + merged.features[merged.valid].square().sum()
    if not loss.requires_grad:
        assert compressor.name in (*BLIND, "hiprune", "prumerge")
        return
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = dict(zip(leaves, gradients, strict=True))
    assert any(g is not None and float(g.abs().max()) > 0 for g in found.values())
    for name, gradient in found.items():
        if gradient is None:
            continue
        assert bool(gradient.isfinite().all()), name
        gone = ~what.valid[:, None] if name == "attention" else ~what.valid[..., None]
        assert float((gradient * gone).abs().max()) == 0, name


@pytest.mark.parametrize("name", ["hiprune", "prumerge", "prumerge adaptive"])
def test_tower_scores_are_live_in_queries_and_keys(name: str) -> None:
    """Those that see no `attention` work theirs out from the captured layers."""
    compressor = ALL[name]
    vision = random_pass(sum(RUNS), PATCHES, tiles=RUNS)
    layers = {
        number: replace(one, queries=one.queries.clone().requires_grad_())
        for number, one in vision.layers.items()
    }
    what = replace(view(compressor), vision=replace(vision, layers=layers))
    layer = 2 if compressor.name == "prumerge" else vision.feature_layer
    weights = normal(*what.valid.shape, seed=3)
    loss = (compressor.score(what).log_score * weights)[what.valid].sum()
    (gradient,) = torch.autograd.grad(loss, layers[layer].queries)
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().max()) > 1e-4


def test_half_precision_scores_are_float32(compressor: Compressor) -> None:
    what = view(compressor)
    what = replace(
        what,
        features=what.features.bfloat16(),
        projected=None if what.projected is None else what.projected.bfloat16(),
    )
    scores, selection = choose(compressor, what)
    assert scores.score.dtype == torch.float32
    merged = compressor.merge(selection, what)
    if merged is not None:
        assert merged.features.dtype == torch.bfloat16
    if compressor.name not in AT_MOST and compressor.keep_tokens:
        assert left(selection.kept, merged) == [9, 9, 9]


def test_equal_tokens_are_no_trouble(compressor: Compressor) -> None:
    what = view(compressor)
    same = {"features": torch.ones_like(what.features)}
    if what.attention is not None:
        same["attention"] = torch.full_like(what.attention, 0.04)
    if what.projected is not None:
        same["projected"] = torch.ones_like(what.projected)
    what = replace(what, **same)
    scores, selection = choose(compressor, what)
    merged = compressor.merge(selection, what)
    assert bool(scores.log_score.isfinite().all())
    if compressor.name not in AT_MOST and compressor.keep_tokens:
        assert left(selection.kept, merged) == [9, 9, 9]


@pytest.mark.parametrize("name", sorted(name for name, one in ALL.items() if one.keep_tokens))
def test_an_image_with_its_whole_budget_stays_itself(name: str) -> None:
    compressor = ALL[name]
    what = view(compressor, (75, 9, 9))
    kept, merged = result(compressor, what)
    assert bool(kept[0].all())
    if merged is not None:
        assert merged.source[0].tolist() == list(range(75))
        assert torch.allclose(merged.features[0], what.features[0], atol=1e-6)
