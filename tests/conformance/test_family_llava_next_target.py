"""LLaVA-NeXT and OneVision as targets: answers, views, and gradients through a session."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import llava_next
from families.anyres_runs import BATCHES, BUILT, COMPRESSORS, SMALL, single
from torch import Tensor

from targets.base import Knowledge, WhiteBoxView
from targets.compression import compress
from targets.compression.base import Compressor
from targets.lvlm import LVLM


@pytest.fixture(params=sorted(COMPRESSORS))
def compressor(request: pytest.FixtureRequest) -> Compressor:
    return COMPRESSORS[request.param]


@pytest.mark.parametrize("relax", [None, 1.0])
@pytest.mark.parametrize("name", BUILT)
def test_gradient_checkpointing_changes_nothing(
    name: str, compressor: Compressor, relax: float | None
) -> None:
    batch = BATCHES[name, "small"]
    found = []
    for checkpointing in (False, True):
        model = BUILT[name].build_model()
        if checkpointing:
            enable = getattr(
                model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
            )
            enable()
            model.train()
        pixels = batch["pixel_values"].clone().requires_grad_()
        with compress(model, compressor, relax=relax) as session:
            logits = model(**{**batch, "pixel_values": pixels}, use_cache=False).logits
            # A second forward before the backward: replays must find their own state.
            model(**single(batch, SMALL, 0), use_cache=False)
            loss = logits[:, -1].log_softmax(-1)[:, 7].sum()
            (gradient,) = torch.autograd.grad(loss, pixels)
        found.append((logits.detach(), gradient))
        assert session.trace.kept is not None
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)
    assert float(found[0][1].abs().max()) > 1e-4


@pytest.fixture(scope="module", params=BUILT)
def target(request: pytest.FixtureRequest) -> LVLM:
    module = BUILT[request.param]
    return LVLM(module.build_model(), module.build_processor())


def images_of(*numbers: int) -> Tensor:
    """Pictures of one size, which is not the model's, ``[B, 3, H, W]``."""
    levels = [np.asarray(llava_next.picture(number)).copy() for number in numbers]
    return torch.stack([torch.from_numpy(one).permute(2, 0, 1) / 255 for one in levels])


def test_answers_are_those_of_processor_and_model(target: LVLM) -> None:
    module = BUILT[target.family.model_types[0]]
    for numbers in ((0, 3), (1, 4), (2, 5)):
        rows = [(q, (n,)) for q, n in zip(module.QUESTIONS, numbers, strict=False)]
        processor = module.build_processor()
        batch = module.inputs(processor, rows)
        made = target.family.model.generate(**batch, max_new_tokens=6, do_sample=False)
        texts = processor.tokenizer.batch_decode(
            made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        ours = target.answer(images_of(*numbers), module.QUESTIONS[:2], max_new_tokens=6)
        assert list(ours.texts) == [text.strip() for text in texts]


def test_answers_under_compression(target: LVLM, compressor: Compressor) -> None:
    module = BUILT[target.family.model_types[0]]
    images, questions = images_of(0, 3), module.QUESTIONS[:2]
    found = target.answer(images, questions, compressor=compressor, max_new_tokens=4)
    layout = target.layout((20, 44))
    assert found.kept is not None
    assert found.kept.shape == (2, layout.tokens)
    again = target.answer(
        images, questions, compressor=compressor, kept=found.selection, max_new_tokens=4
    )
    assert again.texts == found.texts
    scores = target.option_scores(images, questions, ("yes", "no"), compressor=compressor)
    plain = target.option_scores(images, questions, ("yes", "no"))
    assert scores.shape == (2, 2)
    assert float((scores - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("path", ["full", "compressed"])
def test_gradients_reach_the_original_pixels(
    target: LVLM, compressor: Compressor, path: Any
) -> None:
    module = BUILT[target.family.model_types[0]]
    view = target.view(Knowledge.WHITE_BOX, compressor)
    assert isinstance(view, WhiteBoxView)
    images = images_of(0, 3).requires_grad_()
    loss = view.answer_nll(images, module.QUESTIONS[:2], module.ANSWERS[:2], path=path)
    (gradient,) = torch.autograd.grad(loss.sum(), images)
    assert gradient.shape == (2, 3, 20, 44)
    assert float(gradient.abs().amax((1, 2, 3)).min()) > 1e-5
    ranking = view.rank(images, module.QUESTIONS[:2])
    assert ranking.score.shape == (2, target.layout((20, 44)).tokens)
    if compressor.name not in ("random", "uniform"):
        (gradient,) = torch.autograd.grad(ranking.log_score[:, ::2].sum(), images)
        assert float(gradient.abs().amax()) > 1e-5


def test_tokens_cover_pixels_of_tiles_and_of_the_whole(target: LVLM) -> None:
    view = target.view(Knowledge.NONE)
    layout = target.layout((20, 44))
    tokens = torch.zeros(2, layout.tokens, dtype=torch.bool)
    tokens[0, 0] = tokens[1, -1] = True
    pixels = view.token_mask_to_pixels(tokens, (20, 44))
    assert pixels.shape == (2, 1, 20, 44)
    assert bool(pixels[0, 0, 0, 0])
    assert not bool(pixels[0, 0, 10:].any())
    assert bool(pixels[1, 0, :, 30:].any())
    assert not bool(pixels[1, 0, :, :22].any())
