"""Every attack through the real views, on a LLaVA of random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from attacks import CAA, PGD, Attack, Budget, Noise, SeedBank
from attacks.caa import promoted_tokens
from targets.base import Batch, CompressedView, Knowledge
from targets.compression.base import Compressor
from targets.compression.divprune import DivPrune
from targets.compression.fastv import FastV
from targets.compression.random import Random
from targets.compression.uniform import Uniform
from targets.compression.visionzip import VisionZip
from targets.errors import KnowledgeError
from targets.lvlm import LVLM
from targets.scenes import build
from tests.fakes import pick

SEEDS = [1, 2, 3]
EPSILON = 8 / 255


@pytest.fixture(scope="module")
def target() -> LVLM:
    shape = build.Shape(width=32, mlp=32, heads=2, vision_layers=2, text_layers=3)
    return LVLM(build.build_model(shape, 0).float(), build.build_processor())


@pytest.fixture
def batch() -> Batch:
    """Questions and answers of different length, so that the batch is padded."""
    levels = torch.randint(0, 256, (3, 3, 96, 96), generator=torch.Generator().manual_seed(0))
    return Batch(
        ids=("a", "b", "c"),
        images=levels.float() / 255,
        questions=("is there a red circle ?", "what does the sign say ?", "how many shapes ?"),
        answers=("yes", "a b", "two"),
    )


COMPRESSORS: list[Compressor] = [
    FastV(layer=2, retention=0.25),
    VisionZip(retention=0.25),
    DivPrune(retention=0.25),
    Random(retention=0.25),
    Uniform(retention=0.25),
]
ATTACKS = [
    Noise(),
    PGD(steps=4),
    PGD(steps=4, path="compressed"),
    CAA(steps=4),
    CAA(steps=4, preset="strict_preserve"),
]


def run(
    target: LVLM, attack: Attack, compressor: Compressor, batch: Batch, seeds: list[int]
) -> Any:
    view = target.view(attack.needs, compressor if attack.knows_compression else None)
    return attack(view, batch, EPSILON, seeds)


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: c.name)
def test_runs_through_the_view_it_declares(
    target: LVLM, batch: Batch, attack: Attack, compressor: Compressor
) -> None:
    result = run(target, attack, compressor, batch, SEEDS)
    assert result.linf.tolist() == [EPSILON] * 3
    if not isinstance(attack, Noise):
        assert (result.forwards, result.backwards) in {(5, 4), (6, 4)}
        assert all(min(trace) < trace[0] for trace in result.loss)
        assert not any(c.startswith("zero-gradient") for cs in result.checks for c in cs)


@pytest.mark.parametrize("attack", [PGD(steps=2), CAA(steps=2, preset="strict_preserve")], ids=repr)
def test_a_padded_batch_equals_the_single_runs(target: LVLM, batch: Batch, attack: Attack) -> None:
    together = run(target, attack, COMPRESSORS[0], batch, SEEDS)
    for i in range(3):
        alone = run(target, attack, COMPRESSORS[0], pick(batch, i), SEEDS[i : i + 1])
        assert alone.loss[0] == pytest.approx(together.loss[i], rel=1e-3, abs=1e-3)
        # Batched kernels round differently, and a sign step turns that into whole levels.
        assert float((alone.images[0] == together.images[i]).float().mean()) > 0.98


@pytest.mark.parametrize("compressor", COMPRESSORS[:2], ids=lambda c: c.name)
def test_caa_moves_only_pixels_of_unimportant_tokens(
    target: LVLM, batch: Batch, compressor: Compressor
) -> None:
    attack = CAA(steps=2)
    view = target.view(Knowledge.COMPRESSED, compressor)
    assert isinstance(view, CompressedView)
    with torch.no_grad():
        promoted = promoted_tokens(attack, view.rank(batch.images, batch.questions))
    allowed = view.token_mask_to_pixels(promoted, (96, 96)) > 0
    images = run(target, attack, compressor, batch, SEEDS).images
    moved = (images != batch.images).any(1, keepdim=True)
    assert not moved[~allowed].any()
    assert moved[allowed].float().mean() > 0.9


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: c.name)
def test_caa_says_what_a_compressor_leaves_it_without(
    target: LVLM, batch: Batch, compressor: Compressor
) -> None:
    notes = run(target, CAA(steps=1), compressor, batch, SEEDS).notes
    attention = isinstance(compressor, FastV | VisionZip)
    ignores = isinstance(compressor, Random | Uniform)
    assert any("query guidance is off" in note for note in notes) != attention
    assert any("ignores the image" in note for note in notes) == ignores


@dataclass(frozen=True, kw_only=True)
class Greedy(Attack):
    """Declares the ranking and reaches for the answers, or for the model behind the view."""

    name: ClassVar[str] = "greedy"
    knowledge: ClassVar[Knowledge] = Knowledge.COMPRESSED
    through_the_meter: bool = True

    def propose(self, view: Any, batch: Batch, budget: Budget, rng: SeedBank) -> Tensor:
        del budget, rng
        inner = view if self.through_the_meter else view._view
        inner.answer_nll(batch.images, batch.questions, batch.answers)
        return batch.images


@pytest.mark.parametrize("through_the_meter", [True, False])
def test_reaching_outside_a_real_view_raises(
    target: LVLM, batch: Batch, through_the_meter: bool
) -> None:
    view = target.view(Knowledge.COMPRESSED, COMPRESSORS[0])
    with pytest.raises(KnowledgeError, match="white_box"):
        Greedy(through_the_meter=through_the_meter)(view, batch, EPSILON, SEEDS)


def test_the_full_path_needs_no_compressor_and_the_compressed_path_does(
    target: LVLM, batch: Batch
) -> None:
    view = target.view(Knowledge.WHITE_BOX, None)
    assert PGD(steps=1)(view, batch, EPSILON, SEEDS).forwards == 2
    for attack in (PGD(steps=1, path="compressed"), CAA(steps=1)):
        with pytest.raises(KnowledgeError, match="without one"):
            attack(view, batch, EPSILON, SEEDS)


def test_an_image_of_another_size_is_attacked_at_its_own_size(target: LVLM) -> None:
    levels = torch.randint(0, 256, (1, 3, 120, 150), generator=torch.Generator().manual_seed(1))
    batch = Batch(("a",), levels.float() / 255, ("is there a star ?",), ("no",))
    for attack in (PGD(steps=1), CAA(steps=1)):
        result = run(target, attack, COMPRESSORS[1], batch, [1])
        assert result.images.shape == batch.images.shape
        assert float(result.linf[0]) == EPSILON
