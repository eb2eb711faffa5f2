"""Suite and minimal epsilon through the real views, on a LLaVA of random weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attacks import Minimal, Suite
from attacks.members import members_for
from attacks.suite import CLEAN
from targets.base import Batch, Knowledge
from targets.compression.base import Compressor
from targets.compression.fastv import FastV
from targets.compression.random import Random
from targets.compression.visionzip import VisionZip
from targets.lvlm import LVLM
from targets.scenes import build

SEEDS = [1, 2, 3]
EPSILON = 32 / 255


@pytest.fixture(scope="module")
def target() -> LVLM:
    shape = build.Shape(width=32, mlp=32, heads=2, vision_layers=5, text_layers=3)
    return LVLM(build.build_model(shape, 0).float(), build.build_processor())


def batch_of(target: LVLM, compressor: Compressor) -> Batch:
    """Pictures whose truth is whatever the compressed model says, so that it can be broken."""
    levels = torch.randint(0, 256, (3, 3, 96, 96), generator=torch.Generator().manual_seed(0))
    batch = Batch(
        ids=("a", "b", "c"),
        images=levels.float() / 255,
        questions=("is there a red circle ?", "what does the sign say ?", "how many shapes ?"),
        answers=("", "", ""),
    )
    view = target.view(Knowledge.WHITE_BOX, compressor)
    texts = view.ask(batch.images, batch.questions, path="compressed")  # type: ignore[attr-defined]
    return replace(batch, answers=texts)


@pytest.mark.parametrize(
    "compressor",
    [FastV(layer=2, retention=0.25), Random(retention=0.25)],
    ids=lambda one: type(one).__name__,
)
def test_every_member_runs(target: LVLM, compressor: Compressor) -> None:
    batch = batch_of(target, compressor)
    view = target.view(Knowledge.WHITE_BOX, compressor)
    suite = Suite(steps=1, goal="compressed")
    result = suite(view, batch, 1 / 255, SEEDS)  # so little that most members get their turn
    assert set(result.made_by) <= {*members_for("compressed"), CLEAN}
    assert CLEAN not in result.made_by
    assert not [note for note in result.notes if "was left out" in note]
    assert float(result.linf.max()) <= 1 / 255


def test_what_minimal_finds_breaks_on_the_real_path(target: LVLM) -> None:
    compressor = VisionZip(retention=0.25)
    batch = batch_of(target, compressor)
    view = target.view(Knowledge.WHITE_BOX, compressor)
    result = Minimal(attack="pgd", goal="compressed", steps=4)(view, batch, EPSILON, SEEDS)
    answered = target.answer(result.images, list(batch.questions), compressor=compressor)
    right = batch.right(answered.texts)
    assert not all(right), "nothing broke, so nothing was tested"
    for held, size in zip(right, result.linf.tolist(), strict=True):
        assert size <= EPSILON
        assert size > 0
        if held:
            assert round(size * 255) > 28, "censored at the budget"
