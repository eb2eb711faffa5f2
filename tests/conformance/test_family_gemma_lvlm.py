"""PaliGemma and Gemma 3 as targets: prompts, token types, answers, views, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from families import gemma, gemma3, paligemma
from torch import Tensor
from transformers.cache_utils import DynamicCache, StaticCache

from targets.base import Knowledge, WhiteBoxView
from targets.caches import cache_name
from targets.compression import DivPrune, FastV, VisionZip, compress
from targets.compression.base import Compressor
from targets.errors import CompressionError, TargetError
from targets.families import family_of
from targets.lvlm import LVLM

BUILT = {
    "paligemma": (paligemma, paligemma.build_model),
    "paligemma 2": (paligemma, paligemma.build_second),
    "gemma3": (gemma3, gemma3.build_model),
}
SCAN = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 16,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
CLOSE = {"rtol": 0, "atol": 5e-5}
COMPRESSORS = {
    "fastv": FastV(layer=2, retention=0.25),
    "divprune": DivPrune(retention=0.25),
    "visionzip": VisionZip(retention=0.25),
}


@pytest.fixture(scope="module", params=sorted(BUILT))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def module(name: str) -> ModuleType:
    return BUILT[name][0]


@pytest.fixture(scope="module")
def target(name: str) -> LVLM:
    module, build = BUILT[name]
    return LVLM(build(), module.build_processor())


@pytest.fixture(params=sorted(COMPRESSORS))
def compressor(request: pytest.FixtureRequest) -> Compressor:
    return COMPRESSORS[request.param]


def levels(*numbers: int, size: tuple[int, int] = (40, 61)) -> Tensor:
    """Pictures that do not have the model's size, in [0, 1]."""
    parts = [torch.from_numpy(np.array(gemma.picture(number, size))) for number in numbers]
    return torch.stack(parts).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("question", gemma.QUESTIONS)
def test_prompts_and_pictures_are_those_of_the_processor(
    target: LVLM, module: ModuleType, question: str
) -> None:
    truth = module.inputs(module.build_processor(), ((question, (1,)),))
    inputs, layout, size = target._passes.inputs(levels(1))
    prompt = target._passes.prompts.prompt([question], layout, size)
    assert prompt.ids.tolist() == truth["input_ids"].tolist()
    assert torch.allclose(inputs["pixel_values"], truth["pixel_values"], rtol=0, atol=1e-5)
    extras = target.family.extras(prompt.ids, prompt.mask)
    assert torch.equal(extras["token_type_ids"], truth["token_type_ids"])
    assert layout.tokens == target.family.fixed_tokens() == 36


def test_answers_are_those_of_generate(target: LVLM, module: ModuleType) -> None:
    questions = gemma.QUESTIONS[:2]
    rows = tuple((question, (number,)) for number, question in enumerate(questions))
    inputs = module.inputs(module.build_processor(), rows)
    model = target.family.model
    made = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    texts = module.build_processor().tokenizer.batch_decode(
        made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    answered = target.answer(levels(0, 1), questions, max_new_tokens=5)
    assert list(answered.texts) == [text.strip() for text in texts]


def test_compressed_answers_keep_what_was_asked(target: LVLM, compressor: Compressor) -> None:
    answered = target.answer(
        levels(0, 1, 2), gemma.QUESTIONS, compressor=compressor, max_new_tokens=4
    )
    assert answered.kept is not None
    assert answered.kept.shape == (3, 36)
    assert bool((answered.kept.sum(1) <= 9).all())
    again = target.answer(
        levels(0, 1, 2),
        gemma.QUESTIONS,
        compressor=compressor,
        kept=answered.selection,
        max_new_tokens=4,
    )
    assert again.texts == answered.texts


def stepwise(target: LVLM, module: ModuleType, question: str, answer: list[int]) -> float:
    """Log-probability of an answer, token by token, each step a forward of its own."""
    inputs = module.inputs(module.build_processor(), ((question, (0,)),))
    model, total = target.family.model, 0.0
    text_type = 1 if module is paligemma else 0
    for token in answer:
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1].float()
        total += float(logits.log_softmax(-1)[token])
        for key, value in (
            ("input_ids", token),
            ("attention_mask", 1),
            ("token_type_ids", text_type),
        ):
            inputs[key] = torch.cat([inputs[key], torch.tensor([[value]])], 1)
    return total


def test_option_scores_do_not_see_the_answer(target: LVLM, module: ModuleType) -> None:
    """Answers are causal: scored one token at a time they score the same."""
    options, question = ("yes", "two three"), gemma.QUESTIONS[0]
    scores = target.option_scores(levels(0), [question], options)
    for column, option in enumerate(options):
        ids = [gemma.WORDS.index(word) for word in option.split()] + [gemma.END]
        assert abs(float(scores[0, column]) - stepwise(target, module, question, ids)) < 1e-3


def test_option_scores_under_compression_are_batched(target: LVLM, compressor: Compressor) -> None:
    options = ("yes", "two three")
    images = levels(0, 1, 2)
    scores = target.option_scores(images, gemma.QUESTIONS, options, compressor=compressor)
    assert bool(scores.isfinite().all())
    full = target.option_scores(images, gemma.QUESTIONS, options)
    assert float((scores - full).abs().max()) > 1e-2
    for row, question in enumerate(gemma.QUESTIONS):
        alone = target.option_scores(
            images[row : row + 1], [question], options, compressor=compressor
        )
        assert torch.allclose(scores[row], alone[0], rtol=0, atol=1e-3)


def test_views_give_gradients_on_the_picture_as_it_is(target: LVLM, compressor: Compressor) -> None:
    view = target.view(Knowledge.WHITE_BOX, compressor)
    assert isinstance(view, WhiteBoxView)
    images = levels(0, 1).requires_grad_()
    questions, answers = gemma.QUESTIONS[:2], ("yes", "blue")
    full = view.answer_nll(images, questions, answers)
    short = view.answer_nll(images, questions, answers, path="compressed")
    ranking = view.rank(images, questions)
    assert ranking.score.shape == (2, 36)
    for value in (full, short, ranking.log_score.square().sum(1)):
        (gradient,) = torch.autograd.grad(value.sum(), images, retain_graph=True)
        assert gradient.shape == images.shape
        assert bool(gradient.isfinite().all())
        assert bool((gradient.flatten(1).abs().amax(1) > 0).all())


def test_newlines_that_hide_the_end_of_a_prompt_are_refused() -> None:
    target = LVLM(paligemma.build_model(), paligemma.build_processor())
    # Whoever knows where the answers begin may use newlines anywhere.
    many = target.option_scores(levels(0), ["how many ?\nis there"], ["yes", "two\nthree"])
    assert bool(many.isfinite().all())
    family, ids = target.family, torch.tensor([[gemma.IMAGE] * 36 + [2, 9, 5, 9, 5, 20, 21]])
    with pytest.raises(TargetError, match="newlines"):
        family.extras(ids, torch.ones_like(ids))
    types = family.extras(ids, torch.ones_like(ids), answers=2)["token_type_ids"]
    assert types.tolist() == [[0] * 41 + [1] * 2]


# Pan and scan -----------------------------------------------------------------------------------


def scanned() -> LVLM:
    return LVLM(gemma3.build_model(window=512), gemma3.build_processor(**SCAN))


@pytest.mark.parametrize("size", [(40, 130), (90, 30), (40, 44)])
def test_pan_and_scan_prompts_are_those_of_the_processor(size: tuple[int, int]) -> None:
    target, processor = scanned(), gemma3.build_processor(**SCAN)
    question = gemma.QUESTIONS[0]
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    truth = processor(images=[[gemma.picture(0, size)]], text=[text], return_tensors="pt")
    inputs, layout, _ = target._passes.inputs(levels(0, size=size))
    prompt = target._passes.prompts.prompt([question], layout, size)
    assert prompt.ids.tolist() == truth["input_ids"].tolist()
    assert torch.allclose(inputs["pixel_values"], truth["pixel_values"], rtol=0, atol=1e-5)
    assert layout.placeholders == int((prompt.ids == gemma.IMAGE).sum())
    found = target.family.images(prompt.ids == gemma.IMAGE, {"input_ids": prompt.ids})
    assert [(one.shapes, one.placeholders) for one in found] == [
        (layout.shapes, layout.placeholders)
    ]


def test_pan_and_scan_has_one_budget_for_a_picture(compressor: Compressor) -> None:
    target, images = scanned(), levels(0, 1, size=(40, 130))
    tiles = len(target.layout((40, 130)).shapes)
    assert tiles == 4
    one = replace(compressor, retention=None, keep_tokens=20)  # type: ignore[type-var]
    answered = target.answer(images, gemma.QUESTIONS[:2], compressor=one, max_new_tokens=3)
    assert answered.kept is not None
    assert answered.kept.shape == (2, 36 * tiles)
    assert bool((answered.kept.sum(1) <= 20).all())
    view = target.view(Knowledge.WHITE_BOX, one)
    assert isinstance(view, WhiteBoxView)
    pixels = images.clone().requires_grad_()
    loss = view.answer_nll(pixels, gemma.QUESTIONS[:2], ("yes", "blue"), path="compressed").sum()
    (gradient,) = torch.autograd.grad(loss, pixels)
    assert bool((gradient.flatten(1).abs().amax(1) > 0).all())


def test_crops_are_told_from_pictures() -> None:
    """Three pictures in a row are three; a picture with two crops is one."""
    model, processor = gemma3.build_model(), gemma3.build_processor(**SCAN)
    family = family_of(model)
    near = gemma3.inputs(gemma3.build_processor(), ((gemma.QUESTIONS[0], (0, 1, 2)),))["input_ids"]
    plain = family.images(near == gemma.IMAGE, {"input_ids": near})
    family.preprocessing(processor)
    same = family.images(near == gemma.IMAGE, {"input_ids": near})
    assert [len(one.shapes) for one in plain] == [len(one.shapes) for one in same] == [1, 1, 1]
    sizes = ((40, 80), (40, 41), (80, 30))
    pictures = [[gemma.picture(number, size) for number, size in enumerate(sizes)]]
    text = "<bos>user \n <open> and <open><open> many ? \n model \n"
    ids = processor(images=pictures, text=[text], return_tensors="pt")["input_ids"]
    found = family.images(ids == gemma.IMAGE, {"input_ids": ids})
    assert [len(one.shapes) for one in found] == [3, 1, 4]


# What is refused --------------------------------------------------------------------------------


def test_attention_without_masks_for_pairs_is_refused(name: str) -> None:
    """Flash attention knows neither prefixes nor image blocks; it is not there to be loaded."""
    model = BUILT[name][1]()
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(TargetError, match="attn_implementation 'flash_attention_2'"):
        family_of(model)


def test_an_encoder_is_refused() -> None:
    model = gemma3.build_model()
    model.config.text_config.use_bidirectional_attention = True
    with pytest.raises(TargetError, match="use_bidirectional_attention"):
        family_of(model)


def test_static_caches_are_refused(target: LVLM, module: ModuleType) -> None:
    inputs = module.inputs(module.build_processor(), gemma.CASES["one image"])
    model = target.family.model
    cache = StaticCache(config=model.config.text_config, max_cache_len=128)
    with (
        pytest.raises(CompressionError, match="StaticCache"),
        compress(model, FastV(keep_tokens=9)),
    ):
        model(**inputs, **{cache_name(): cache}, use_cache=True)


def test_a_full_sliding_cache_is_refused() -> None:
    """One that was filled without a session has already forgotten."""
    model = gemma3.build_model()
    inputs = gemma3.inputs(gemma3.build_processor(), gemma.CASES["one image"])
    cache = DynamicCache(config=model.config)
    model(**inputs, **{cache_name(): cache}, use_cache=True)
    step = {"input_ids": torch.tensor([[9]]), cache_name(): cache}
    with (
        pytest.raises(CompressionError, match="DynamicCache"),
        compress(model, FastV(keep_tokens=9)),
    ):
        model(**step)


def test_pooled_towers_cannot_be_shortened() -> None:
    class Inside(FastV):
        """Claims to act inside the tower."""

        @property
        def stage(self) -> Any:
            from targets.compression.base import Stage

            return Stage.TOWER

    assert "vision tower" in str(family_of(gemma3.build_model()).refuses(Inside(keep_tokens=9)))
    assert family_of(paligemma.build_model()).refuses(Inside(keep_tokens=9)) is None


def test_unknown_prompts_are_refused() -> None:
    family = family_of(gemma3.build_model())
    layout = family.images(torch.ones(1, 36, dtype=torch.bool), {})[0]
    with pytest.raises(TargetError, match="call preprocessing"):
        family.expand("<open> how", "<open>", layout)
