"""The LVLM as a classifier of answer options: what library attacks get."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from attacks.errors import AttackError
from attacks.metering import Meter, MeteredView
from attacks.option_logits import ROWS, OptionLogits, two_way
from targets.base import Batch, Knowledge
from targets.errors import KnowledgeError
from tests.fakes import FakeView, make_batch

OPTIONS = ("yes", "no", "maybe")


def closed(count: int = 4) -> Batch:
    return replace(make_batch(count), options=(OPTIONS,) * count)


@pytest.mark.parametrize("path", ["full", "compressed"])
def test_logits_are_log_probabilities_of_the_options_up_to_a_shift(path: str) -> None:
    batch, view = closed(), FakeView()
    logits = OptionLogits(view, batch, path=path)(batch.images)  # type: ignore[arg-type]
    wanted = view.option_logprobs(batch.images, batch.questions, batch.options, path=path)  # type: ignore[arg-type]
    assert torch.allclose(logits.log_softmax(1), wanted.log_softmax(1), atol=1e-6)
    assert torch.allclose(logits.amin(1), torch.ones(4)), "CW takes positive logits for granted"


def test_the_gradient_is_that_of_the_options() -> None:
    view, batch = FakeView(), closed()
    model = OptionLogits(view, batch)
    slopes = []
    for call in (
        lambda x: model(x).log_softmax(1)[:, 0],
        lambda x: view.option_logprobs(x, batch.questions, batch.options).log_softmax(1)[:, 0],  # type: ignore[arg-type]
    ):
        images = batch.images.clone().requires_grad_(True)
        slopes += torch.autograd.grad(call(images).sum(), images)
    assert torch.allclose(slopes[0], slopes[1], atol=1e-6)
    assert model.first_slope is not None
    assert torch.allclose(model.first_slope, slopes[0].abs().flatten(1).amax(1))


def test_libraries_find_device_mode_and_labels() -> None:
    model = OptionLogits(FakeView(), closed())
    assert next(model.parameters()).device.type == "cpu"
    assert not any(one.requires_grad for one in model.parameters())
    assert not model.training
    assert model.labels.tolist() == [1, 0, 1, 0]
    assert model.classes == 3


def test_any_number_of_pictures_of_one_sample_and_one_each_of_several() -> None:
    batch, view = closed(), FakeView()
    alone = OptionLogits(view, batch.rows([2]))
    many = alone(batch.images[2:3].repeat(5, 1, 1, 1))
    assert torch.allclose(many, OptionLogits(view, batch)(batch.images)[2].expand(5, -1))
    with pytest.raises(AttackError, match="3 pictures for 4 questions"):
        OptionLogits(view, batch)(batch.images[:3])


def test_double_precision_is_taken_and_answered_in_single() -> None:
    batch = closed()
    images = batch.images.double().requires_grad_(True)
    logits = OptionLogits(FakeView(), batch)(images)
    (slope,) = torch.autograd.grad(logits.sum(), images)
    assert (logits.dtype, slope.dtype) == (torch.float32, torch.float64)


def test_the_deployed_target_is_asked_in_portions_and_gives_no_gradient() -> None:
    batch, meter = closed(), Meter()
    inner = FakeView(Knowledge.SCORES)
    view = MeteredView(inner, Knowledge.SCORES, meter)
    model = OptionLogits(view, batch.rows([0]), deployed=True)
    count = ROWS + 3
    images = batch.images[:1].repeat(count, 1, 1, 1).requires_grad_(True)
    logits = model(images)
    assert logits.shape == (count, 3)
    assert not logits.requires_grad
    assert inner.calls == ["option_scores"] * 2
    assert (meter.queries, meter.forwards, meter.backwards) == (count, 0, 0)
    with pytest.raises(KnowledgeError, match="white_box"):
        OptionLogits(view, batch)(batch.images)


@pytest.mark.parametrize("deployed", [False, True])
def test_an_open_question_is_the_right_answer_or_not(deployed: bool) -> None:
    batch, view = make_batch(4), FakeView()
    model = OptionLogits(view, batch, deployed=deployed)
    found = model(batch.images).softmax(1)
    if deployed:
        alone = tuple((answer,) for answer in batch.answers)
        wanted = view.option_scores(batch.images, batch.questions, alone).squeeze(1).exp()
    else:
        wanted = (-view.answer_nll(batch.images, batch.questions, batch.answers)).exp()
    assert torch.allclose(found, torch.stack([wanted, 1 - wanted], 1), atol=1e-5)
    assert model.labels.tolist() == [0] * 4


@pytest.mark.parametrize("p", [1e-30, 1e-4, 0.3, 0.5, 0.7, 0.999, 1.0])
def test_two_ways_are_exact_and_keep_a_gradient(p: float) -> None:
    log_p = torch.tensor([math.log(p)], requires_grad=True)
    found = two_way(log_p)[0]
    assert found[0].item() == pytest.approx(math.log(p), abs=2e-6)
    if p < 1:
        assert found[1].item() == pytest.approx(math.log1p(-p), rel=1e-2, abs=2e-6)
    assert found.isfinite().all()
    loss = torch.nn.functional.cross_entropy(found[None], torch.tensor([0]))
    (slope,) = torch.autograd.grad(loss, log_p)
    assert slope.item() == pytest.approx(-1, abs=0.05), "the loss is −log p, whatever p"


def test_the_right_answer_is_found_in_any_case_and_has_to_be_there() -> None:
    batch = replace(closed(), answers=("Yes ", "no", "NO", "yes"))
    assert OptionLogits(FakeView(), batch).labels.tolist() == [0, 1, 1, 0]
    missing = replace(closed(), answers=("yes", "blue", "no", "yes"))
    with pytest.raises(AttackError, match=r"'blue' of sample s1 is none of its options") as caught:
        _ = OptionLogits(FakeView(), missing).labels
    assert caught.value.sample_ids == ("s1",)
