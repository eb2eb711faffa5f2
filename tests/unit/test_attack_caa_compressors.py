"""CAA against every compressor: it changes what is kept where the image has any say in that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attacks import CAA
from attacks.caa import promoted_tokens
from redteam.catalog import BUILTIN, entries, load
from targets.base import Batch, CompressedView, Knowledge, Ranking
from targets.compression import FasterVLM, FastV, compress
from targets.compression.base import Compressor, Stage
from targets.compression.pipeline import Pipeline, owned
from targets.lvlm import LVLM
from targets.scenes import build, load_scenes, world

EPSILON = 16 / 255
SEEDS = [1, 2, 3]
UNTOUCHED = {
    "random": "draws, whatever the image shows",
    "uniform": "takes every so-many-th token",
    "grid": "takes tokens on a coarser grid",
    "pool": "averages cells of the grid; chooses nothing",
    "tokenflex": "averages cells of the grid; chooses nothing",
    "quecc": "makes a token of each window; chooses nothing",
    "downsample": "shrinks the picture; chooses nothing",
    "drop_all": "drops every token",
}
"""Compressors whose choice no image can change, and why."""
OPTIONS: dict[str, dict[str, Any]] = {
    "quecc": {"weights": "none"},
    "tokenflex": {"weights": "none"},
    # A quarter of the tokens is two rounds in which all that can merge does.
    "tome post": {"variant": "post", "retention": 0.3},
    "prumerge adaptive": {"retention": None},
}
TRAINED = ("explainability", "prumerge adaptive")
"""Those that a tower, or a scoring network, of random weights gives nothing to rank by."""
NAMES = sorted({*BUILTIN["compressors"], *OPTIONS} - {*UNTOUCHED, "pipeline"})


@pytest.fixture(scope="module")
def target() -> LVLM:
    shape = build.Shape(width=32, mlp=32, heads=2, vision_layers=3, text_layers=6)
    return LVLM(build.build_model(shape, 0).float(), build.build_processor())


@pytest.fixture(scope="module")
def trained() -> tuple[LVLM, Batch]:
    samples = world.samples("validation", 22)[20:]
    images = [torch.from_numpy(np.asarray(one.image)).permute(2, 0, 1) for one in samples]
    return load_scenes("scenes-a"), Batch(
        tuple(one.id for one in samples),
        torch.stack(images).float() / 255,
        tuple(one.question for one in samples),
        tuple(one.answer for one in samples),
    )


@pytest.fixture(scope="module")
def batch() -> Batch:
    levels = torch.randint(0, 256, (3, 3, 12, 12), generator=torch.Generator().manual_seed(0))
    blocks = torch.nn.functional.interpolate(levels.float(), scale_factor=8)  # one colour a patch
    questions = ("is there a red circle ?", "what does the sign say ?", "how many shapes ?")
    return Batch(("a", "b", "c"), (blocks / 255).clamp(0, 1), questions, ("yes", "a b", "two"))


def made(name: str) -> Compressor:
    options = {"retention": 0.25, **OPTIONS.get(name, {})}
    options = {key: value for key, value in options.items() if value is not None}
    found: Compressor = load(entries("compressors")[name.split()[0]])(**options)
    return found


def rank(view: CompressedView, batch: Batch, images: Tensor) -> Ranking:
    with torch.no_grad():
        return view.rank(images, batch.questions)


def overlap(one: Tensor, two: Tensor) -> float:
    return float(((one & two).sum(1) / (one | two).sum(1)).mean())


@pytest.mark.parametrize("name", NAMES)
def test_the_kept_set_changes_more_than_under_noise(
    target: LVLM, batch: Batch, trained: tuple[LVLM, Batch], name: str
) -> None:
    if name in TRAINED:
        target, batch = trained
    seeds = SEEDS[: len(batch.ids)]
    attack = CAA(steps=20, random_start=False)
    view = target.view(Knowledge.COMPRESSED, made(name))
    assert isinstance(view, CompressedView)
    clean = rank(view, batch, batch.images)
    up = promoted_tokens(attack, clean)
    assert not (up & clean.kept).any()
    noise = CAA(steps=0)(view, batch, EPSILON, seeds)
    result = attack(view, batch, EPSILON, seeds)
    assert not any("ignores the image" in note for note in result.notes)
    noisy, attacked = (rank(view, batch, one.images).kept for one in (noise, result))
    infiltrated = [float((up & kept).sum() / up.sum()) for kept in (noisy, attacked)]
    assert infiltrated[1] > infiltrated[0] + 0.1
    assert overlap(clean.kept, attacked) < overlap(clean.kept, noisy) - 0.05


def test_the_exceptions_are_as_they_say(target: LVLM, batch: Batch) -> None:
    other = batch.images.flip(3)
    for name in sorted(set(UNTOUCHED) - {"downsample", "drop_all"}):
        view = target.view(Knowledge.COMPRESSED, made(name))
        assert isinstance(view, CompressedView)
        assert torch.equal(rank(view, batch, batch.images).kept, rank(view, batch, other).kept)
    assert not load(entries("compressors")["drop_all"])(layer=1).budget(9)
    assert load(entries("compressors")["downsample"])(retention=0.5).cuts(6) == ()


SEVERAL: list[Compressor] = [
    *[
        made(name)
        for name in ("pyramiddrop", "sparsevlm", "transprune", "visiondrop", "catp", "vasparse")
    ],
    made("information_horizon"),
    Pipeline(stages=(FasterVLM(retention=0.5), FastV(layer=2, retention=0.25))),
]


@pytest.mark.parametrize("one", SEVERAL, ids=lambda one: one.name)
def test_of_several_cuts_the_first_is_ranked(target: LVLM, batch: Batch, one: Compressor) -> None:
    family = target.family
    view = target.view(Knowledge.COMPRESSED, one)
    assert isinstance(view, CompressedView)
    found = rank(view, batch, batch.images)
    passes = target._passes
    with torch.no_grad(), compress(family.model, one, family=family) as session:
        inputs, layout, size = passes.inputs(batch.images, one)
        passes._run(passes.prompts.prompt(batch.questions, layout, size), inputs)
    cuts = [cut for cut in owned((one,), len(family.layers)) if cut.drops]
    if isinstance(one, Pipeline):
        cuts = list(one.cuts(len(family.layers)))
    assert len(session.trace.cuts) == len(cuts) > 1
    first = session.trace.cuts[0]
    assert first.seen.cut.layer == cuts[0].layer
    assert torch.equal(found.kept, first.selection.kept)
    assert torch.allclose(found.score, first.scores.score, atol=1e-5)
    assert first.seen.cut.stage in (Stage.VISION, Stage.INPUT, Stage.LAYER)
