"""Gradients reach the pixels through scores and through what is kept, and they are right."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import torch.utils.checkpoint
from torch import Tensor

from targets.base import Knowledge, WhiteBoxView
from targets.compression import compress
from targets.compression.base import Compressor
from targets.lvlm import LVLM

LIVE = sorted(n for n, c in tiny.COMPRESSORS.items() if c.name not in tiny.BLIND)


def view_of(model: Any, compressor: Compressor) -> WhiteBoxView:
    view = LVLM(model, tiny.build_processor()).view(Knowledge.WHITE_BOX, compressor)
    assert isinstance(view, WhiteBoxView)
    return view


@pytest.mark.parametrize("name", LIVE)
def test_score_gradient_agrees_with_finite_differences(name: str) -> None:
    view = view_of(tiny.build_model().double(), tiny.COMPRESSORS[name])
    images = tiny.pictures(3).double().requires_grad_()
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(3, tiny.TOKENS, generator=generator).double()
    weights = weights - weights.mean()
    direction = torch.randn(images.shape, generator=generator).double()

    def loss(x: Tensor) -> Tensor:
        return (view.rank(x, tiny.QUESTIONS).log_score * weights).sum((0, 1))

    (gradient,) = torch.autograd.grad(loss(images), images)
    slope = float((gradient * direction).sum())
    with torch.no_grad():
        # Rotary tables and norms of the text model stay float32, so steps may not be too small;
        # where a greedy order is long, one of 1e-4 changes it.
        step = 2e-5 if name.startswith("information_horizon") else 1e-4
        difference = (loss(images + step * direction) - loss(images - step * direction)) / 2 / step
    assert abs(slope) > 1e-2
    # The logarithm of a small gain bends within such a step.
    near = 5e-3 if name.startswith("information_horizon") else 2e-3
    assert float(difference) == pytest.approx(slope, rel=near)


@pytest.mark.parametrize("path", ["full", "compressed"])
def test_answer_gradient_reaches_the_pixels(model: Any, compressor: Compressor, path: Any) -> None:
    view = view_of(model, compressor)
    images = tiny.pictures(3).requires_grad_()
    loss = view.answer_nll(images, tiny.QUESTIONS, tiny.ANSWERS, path=path)
    (gradient,) = torch.autograd.grad(loss.sum(), images)
    assert float(gradient.abs().amax((1, 2, 3)).min()) > 1e-6
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_straight_through_changes_the_gradient_and_nothing_else(
    model: Any, compressor: Compressor
) -> None:
    view, name = view_of(model, compressor), compressor.name
    images = tiny.pictures(3).requires_grad_()
    ask = (images, tiny.QUESTIONS, tiny.ANSWERS)
    hard = view.answer_nll(*ask, path="compressed")
    soft = view.answer_nll(*ask, path="compressed", straight_through=True)
    assert torch.allclose(hard, soft, rtol=0, atol=1e-5)
    (one,) = torch.autograd.grad(hard.sum(), images)
    (two,) = torch.autograd.grad(soft.sum(), images)
    apart = float((one - two).abs().max())
    if name in tiny.BLIND:
        assert apart < 1e-4  # their scores do not depend on the image
    else:
        assert apart > 1e-2


def test_straight_through_gradient_is_that_of_the_gate(sdpa: Any) -> None:
    """Towards the score it is the derivative of the loss by each kept column's log-gate."""
    from targets.compression.base import Scores
    from targets.compression.trace import column_bias

    generator = torch.Generator().manual_seed(0)
    score = torch.randn(2, 6, generator=generator).requires_grad_()
    kept = torch.zeros(2, 6, dtype=torch.bool)
    kept.scatter_(1, score.detach().topk(3, 1).indices, True)
    weights = torch.randn(2, 6, generator=generator)
    bias = column_bias(Scores(score, score), kept, 0.5, torch.ones_like(kept))
    assert float(bias.detach().abs().max()) == 0
    (gradient,) = torch.autograd.grad((bias * weights).sum(), score)
    truth = torch.zeros(2, 6)
    for row in range(2):
        order = score[row].detach().argsort(descending=True).tolist()
        bar = float(score.detach()[row, order[2:4]].mean())
        for token in order[:3]:
            slope = (1 - torch.sigmoid((score[row, token].detach() - bar) / 0.5)) / 0.5
            slope = slope * weights[row, token]
            truth[row, token] += slope
            truth[row, order[2]] -= slope / 2
            truth[row, order[3]] -= slope / 2
    assert torch.allclose(gradient, truth, atol=1e-5)


def checkpointed(model: Any) -> None:
    """Switch checkpointing on under the name the installed version has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@pytest.mark.parametrize("relax", [None, 1.0])
def test_gradient_checkpointing_changes_nothing(compressor: Compressor, relax: Any) -> None:
    ids, mask, positions = tiny.prompt(tiny.QUESTIONS)
    images = tiny.pictures(3)

    def run(checkpointing: bool) -> tuple[Tensor, Tensor, Tensor]:
        model = tiny.build_model()
        if checkpointing:
            checkpointed(model)
            model.train()
            assert model.model.language_model.layers[0].gradient_checkpointing
        pixels = tiny.normalised(images).requires_grad_()
        with compress(model, compressor, relax=relax) as session:
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                pixel_values=pixels,
                use_cache=False,
            ).logits
            # A second forward before the backward: replays must find their own state.
            model(input_ids=ids[:1], pixel_values=pixels[:1].flip(2), use_cache=False)
            loss = logits[:, -1].log_softmax(-1)[:, 7].sum()
            (gradient,) = torch.autograd.grad(loss, pixels)
        return logits.detach(), gradient, session.trace.score.detach()

    plain, saved = run(False), run(True)
    assert torch.allclose(plain[0], saved[0], atol=1e-6)
    assert torch.allclose(plain[1], saved[1], atol=1e-5)
    assert torch.allclose(plain[2], saved[2], atol=1e-6)
    assert float(plain[1].abs().max()) > 1e-4


class Replayed(torch.nn.Module):
    """A layer behind a checkpoint that includes its hooks, as transformers before 5.23 has it."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer, self.runs = layer, 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        def run(*inputs: Any) -> Tensor:
            self.runs += 1
            return self.layer(*inputs, **kwargs)

        return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False)


@pytest.mark.parametrize("relax", [None, 1.0])
def test_replayed_hooks_change_nothing(compressor: Compressor, relax: Any) -> None:
    ids, mask, positions = tiny.prompt(tiny.QUESTIONS)
    found = []
    for replayed in (False, True):
        model = tiny.build_model()
        session = compress(model, compressor, relax=relax)  # knows the layers themselves
        stacks = (model.model.language_model, model.model.vision_tower.encoder)
        if replayed:
            for stack in stacks:
                stack.layers = torch.nn.ModuleList(Replayed(layer) for layer in stack.layers)
        pixels = tiny.normalised(tiny.pictures(3)).requires_grad_()
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        with session:
            logits = model(**inputs, pixel_values=pixels, use_cache=False).logits
            score = session.trace.score
            model(input_ids=ids[:1], pixel_values=pixels[:1].flip(2), use_cache=False)
            loss = logits[:, -1].log_softmax(-1)[:, 7].sum() + (score * ids[:, :36]).sum()
            (gradient,) = torch.autograd.grad(loss, pixels)
        found.append(gradient)
        if compressor.name == "visionzip":
            last = session.trace.seen.vision.layers[2].hidden
            assert len(last) == 1  # of the last forward, not of a replay
        if replayed:
            assert all(layer.runs >= 3 for stack in stacks for layer in stack.layers)
    assert torch.allclose(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LIVE)
def test_score_gradient_survives_checkpointing(name: str) -> None:
    ids, mask, positions = tiny.prompt(tiny.QUESTIONS)
    gradients = []
    for checkpointing in (False, True):
        model = tiny.build_model()
        if checkpointing:
            checkpointed(model)
            model.train()
        pixels = tiny.normalised(tiny.pictures(3)).requires_grad_()
        with compress(model, tiny.COMPRESSORS[name]) as session:
            model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                pixel_values=pixels,
                use_cache=False,
            )
            loss = session.trace.scores.log_score[:, ::2].sum()
            gradients.append(torch.autograd.grad(loss, pixels)[0])
    assert torch.allclose(*gradients, atol=1e-4)
    assert float(gradients[0].abs().max()) > 1e-3
