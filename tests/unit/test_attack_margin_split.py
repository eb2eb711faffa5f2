"""The margin split through real views, on a LLaVA of random weights and on the fake target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from answered import answered

from attacks import AttackError, MarginSplit
from attacks.margin_split import _Objective
from targets.base import Batch, Knowledge
from targets.compression.base import Compressor
from targets.compression.divprune import DivPrune
from targets.compression.fastv import FastV
from targets.compression.prumerge import PruMerge
from targets.compression.tome import ToMe
from targets.compression.visionzip import VisionZip
from targets.lvlm import LVLM
from targets.scenes import build
from tests.fakes import FakeView, pick

SEEDS = [1, 2, 3]
EPSILON = 8 / 255
SHARED: list[Compressor] = [
    FastV(layer=2, retention=0.25),
    VisionZip(retention=0.25),
    DivPrune(retention=0.25),
    PruMerge(retention=0.25),
]


@pytest.fixture(scope="module")
def target() -> LVLM:
    shape = build.Shape(width=32, mlp=32, heads=2, vision_layers=2, text_layers=3)
    return LVLM(build.build_model(shape, 0).float(), build.build_processor())


@pytest.fixture(scope="module")
def batch(target: LVLM) -> Batch:
    """Answers of different length, so that the batch is padded; "yes" is what the model says."""
    levels = torch.randint(0, 256, (3, 3, 96, 96), generator=torch.Generator().manual_seed(0))
    images = levels.float() / 255
    questions = ("is there a red circle ?", "what does the sign say ?", "how many shapes ?")
    answers = ("yes", "a b", "two")
    return Batch(("a", "b", "c"), images, questions, answers)


def margin(view: Any, batch: Batch, path: str) -> list[float]:
    """By the slow way: from the log-probabilities of every token."""
    answers = batch.answers
    logprobs, real = view.answer_logprobs(batch.images, batch.questions, answers, path=path)
    words, found = build.build_tokenizer(), []
    for sample, text in enumerate(answers):
        leads = []
        ids = [*words(text, add_special_tokens=False).input_ids, words.eos_token_id]
        for place, wanted in enumerate(ids):
            assert bool(real[sample, place])
            row = logprobs[sample, place].clone()
            lead = float(row[wanted])
            row[wanted] = -torch.inf
            leads.append(lead - float(row.max()))
        found.append(min(leads))
    return found


@pytest.mark.parametrize(
    "compressor",
    [*SHARED, ToMe(retention=0.5)],
    ids=lambda one: one.name,
)
def test_both_margins_are_those_of_separate_passes(
    target: LVLM, batch: Batch, compressor: Compressor
) -> None:
    view: Any = target.view(Knowledge.WHITE_BOX, compressor)
    with torch.no_grad():
        found = view.path_margins(batch.images, batch.questions, batch.answers)
        assert found.full.tolist() == pytest.approx(margin(view, batch, "full"), abs=1e-4)
        through = margin(view, batch, "compressed")
    assert found.compressed.tolist() == pytest.approx(through, abs=1e-4)


@pytest.mark.parametrize("compressor", SHARED, ids=lambda one: one.name)
def test_the_tower_runs_once_and_the_language_model_twice(
    target: LVLM, batch: Batch, compressor: Compressor
) -> None:
    view: Any = target.view(Knowledge.WHITE_BOX, compressor)
    calls = {"tower": 0, "text": 0}

    def count(name: str) -> Any:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    patches = target.family.model.model.vision_tower.embeddings.patch_embedding
    handles = [
        patches.register_forward_hook(count("tower")),
        target.family.text.register_forward_hook(count("text")),
    ]
    with torch.no_grad():
        view.path_margins(batch.images, batch.questions, batch.answers)
    for handle in handles:
        handle.remove()
    assert calls == {"tower": 1, "text": 2}


@pytest.mark.parametrize("compressor", SHARED[:3], ids=lambda one: one.name)
def test_gradient_reaches_the_scores_through_the_hard_selection(
    target: LVLM, batch: Batch, compressor: Compressor
) -> None:
    view: Any = target.view(Knowledge.WHITE_BOX, compressor)
    images = batch.images.clone().requires_grad_()
    found = view.path_margins(images, batch.questions, batch.answers)
    hard = view.answer_nll(images, batch.questions, batch.answers, path="compressed")
    soft = view.answer_nll(
        images, batch.questions, batch.answers, path="compressed", straight_through=True
    )
    gradients = [
        torch.autograd.grad(one.sum(), images, retain_graph=True)[0]
        for one in (found.full, found.compressed, hard, soft)
    ]
    assert all(bool(one.abs().flatten(1).amax(1).gt(0).all()) for one in gradients)
    assert not torch.allclose(gradients[2], gradients[3]), "the relaxation adds a gradient"
    assert not torch.allclose(gradients[0], gradients[1])


@pytest.mark.parametrize("compressor", SHARED, ids=lambda one: one.name)
def test_it_runs_through_the_view_and_counts_two_passes_a_step(
    target: LVLM, batch: Batch, compressor: Compressor
) -> None:
    attack = MarginSplit(steps=3, refresh=1)
    view = target.view(attack.needs, compressor)
    result = attack(view, batch, EPSILON, SEEDS)
    assert float(result.linf.max()) <= EPSILON
    assert (result.forwards, result.backwards) == (8, 6)
    assert result.queries == 0
    alone = attack(view, pick(batch, 1), EPSILON, SEEDS[1:2])
    assert alone.loss[0] == pytest.approx(result.loss[1], rel=1e-3, abs=1e-3)


def test_what_it_stops_at_fails_compressed_and_only_there() -> None:
    view = FakeView()
    batch = answered(12, view=view)
    attack = MarginSplit(steps=40, alpha=8 / 255)
    result = attack(view, batch, 60 / 255, list(range(12)))
    full = batch.right(view.ask(result.images, batch.questions, path="full"))
    through = batch.right(view.ask(result.images, batch.questions))
    claimed = [trace[-1] < -attack.confidence for trace in result.loss]
    assert any(claimed), "the fake target can be broken in this budget"
    for won, reads, misread in zip(claimed, full, [not one for one in through], strict=True):
        assert not won or (reads and misread)


def test_the_full_path_is_given_up_only_without_the_multiplier() -> None:
    """Ablation: with lambda held at its smallest the full path breaks too."""
    view = FakeView()
    batch = answered(12, view=view)
    held = MarginSplit(steps=20, alpha=8 / 255, multiplier=0.01, grow=1.0001, shrink=0.9999)
    ours = MarginSplit(steps=20, alpha=8 / 255)
    right = {}
    for name, attack in (("held", held), ("ours", ours)):
        images = attack(view, batch, 60 / 255, list(range(12))).images
        right[name] = sum(batch.right(view.ask(images, batch.questions, path="full")))
    assert right["ours"] == 12
    assert right["ours"] >= right["held"]


def test_a_multiplier_out_of_range_is_refused() -> None:
    with pytest.raises(AttackError, match=r"multiplier is 1000.*\[0.01, 100"):
        MarginSplit(multiplier=1000.0)


@pytest.mark.parametrize(("steps", "refresh", "gradients"), [(7, 1, 14), (7, 3, 10), (8, 4, 10)])
def test_the_gradient_of_the_constraint_is_taken_now_and_then(
    target: LVLM, batch: Batch, steps: int, refresh: int, gradients: int
) -> None:
    """What is declared is what hooks on the two passes count."""
    attack = MarginSplit(steps=steps, refresh=refresh)
    view = target.view(attack.needs, SHARED[0])
    result = attack(view, batch, EPSILON, SEEDS)
    assert attack.gradients(attack.budget(EPSILON)) == gradients
    assert (result.forwards, result.backwards) == (2 * steps + 2, gradients)


def test_a_fresh_gradient_gives_the_step_of_the_whole_lagrangian() -> None:
    """Slow reference: one gradient of m_C − lambda · m_F, taken whole."""
    view, batch = FakeView(), answered(6, view=FakeView())
    attack = MarginSplit(steps=4, refresh=1, multiplier=2.0)
    objective = _Objective(attack, view, batch)  # type: ignore[arg-type]
    images = batch.images.clone().requires_grad_()
    (ours,) = torch.autograd.grad(objective(images, 0).sum(), images)
    found = view.path_margins(images, batch.questions, batch.answers)
    whole = found.compressed - 2.0 * found.full
    (expected,) = torch.autograd.grad(whole.sum(), images)
    assert torch.allclose(ours, expected, atol=1e-6)


def test_without_its_gradient_the_full_margin_is_still_measured(target: LVLM, batch: Batch) -> None:
    view: Any = target.view(Knowledge.WHITE_BOX, SHARED[0])
    images = batch.images.clone().requires_grad_()
    live = view.path_margins(images, batch.questions, batch.answers)
    still = view.path_margins(images, batch.questions, batch.answers, full_gradient=False)
    assert torch.equal(still.full, live.full.detach())
    assert not still.full.requires_grad
    assert still.compressed.requires_grad
