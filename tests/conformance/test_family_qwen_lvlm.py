"""Qwen-VL end to end: pictures of any size, answers, options, views, and gradients to pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import qwen, qwen2_5_vl, qwen2_vl, qwen3_vl
from families.qwen_runs import decode
from PIL import Image
from torch import Tensor

from targets.base import Knowledge
from targets.compression import DivPrune, FastV, Random, VisionZip, compress
from targets.compression.base import Compressor
from targets.errors import CompressionError
from targets.lvlm import LVLM

BUILT = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}
SIZE = (37, 29)
"""Resampled to 40 × 32, which is 5 × 4 tokens."""
ANSWERS = ("yes", "blue", "two three")
COMPRESSORS: dict[str, Compressor] = {
    "fastv": FastV(layer=2, retention=0.3),
    "fastv reindexed": FastV(layer=1, retention=0.3, positions="reindex"),
    "visionzip": VisionZip(retention=0.5),
    "divprune kept": DivPrune(keep_tokens=6, positions="keep"),
}


@pytest.fixture(scope="module", params=BUILT)
def target(request: pytest.FixtureRequest) -> LVLM:
    built = BUILT[request.param]
    return LVLM(built.build_model(), built.build_processor())


@pytest.fixture(params=COMPRESSORS)
def compressor(request: pytest.FixtureRequest) -> Compressor:
    return COMPRESSORS[request.param]


def pictures(count: int = 3) -> Tensor:
    """Three pictures of one size that is not the model's, ``[count, 3, 37, 29]``."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8))
        made.append(np.asarray(coarse.resize(SIZE[::-1], Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float() / 255


def images(pixels: Tensor) -> list[Image.Image]:
    levels = (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(one) for one in levels]


def prompts(target: LVLM, texts: tuple[str, ...], pixels: Tensor) -> dict[str, Any]:
    """What the real processor makes of pictures and questions."""
    processor = qwen2_vl.build_processor()
    talks = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        for text in texts
    ]
    words = [processor.apply_chat_template(talk, add_generation_prompt=True) for talk in talks]
    made = processor(images=images(pixels), text=words, padding=True, return_tensors="pt")
    return dict(made)


def test_answers_are_those_of_the_real_processor(target: LVLM) -> None:
    pixels = pictures()
    batch = prompts(target, qwen.QUESTIONS, pixels)
    model = target.family.model
    made = model.generate(**batch, max_new_tokens=6, do_sample=False)
    texts = qwen.tokenizer().batch_decode(
        made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    answered = target.answer(pixels, qwen.QUESTIONS, max_new_tokens=6)
    assert answered.texts == tuple(text.strip() for text in texts)
    assert len(set(answered.texts)) > 1
    assert target.layout(SIZE).shapes == ((5, 4),)


def test_compressed_answers_are_those_of_a_session(target: LVLM, compressor: Compressor) -> None:
    pixels = pictures()
    batch, model = prompts(target, qwen.QUESTIONS, pixels), target.family.model
    answered = target.answer(pixels, qwen.QUESTIONS, compressor=compressor, max_new_tokens=4)
    with compress(model, compressor) as session:
        made = decode(model, batch, 4).argmax(-1)
    assert torch.equal(answered.kept, session.trace.kept)
    assert torch.allclose(answered.score, session.trace.score, rtol=0, atol=1e-5)
    for text, ids in zip(answered.texts, made.tolist(), strict=True):
        end = qwen.ids("<|im_end|>")[0]
        until = ids[: ids.index(end)] if end in ids else ids
        assert text == qwen.tokenizer().decode(until, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", [None, *COMPRESSORS])
def test_option_scores_are_log_probabilities(target: LVLM, name: str | None) -> None:
    """Against one forward a row, with the answer written into the prompt."""
    one = None if name is None else COMPRESSORS[name]
    pixels, model = pictures(2), target.family.model
    scores = target.option_scores(pixels, qwen.QUESTIONS[:2], ("yes", "two three"), compressor=one)
    for row in range(2):
        batch = prompts(target, qwen.QUESTIONS[row : row + 1], pixels[row : row + 1])
        for column, words in enumerate((("yes",), ("two", "three"))):
            wanted = [*qwen.ids(*words), *qwen.ids("<|im_end|>")]
            total = 0.0
            ids, mask = batch["input_ids"], batch["attention_mask"]
            kinds = batch["mm_token_type_ids"]
            for number, token in enumerate(wanted):
                told = torch.tensor([wanted[:number]], dtype=torch.long)
                longer = {
                    **batch,
                    "input_ids": torch.cat([ids, told], 1),
                    "attention_mask": torch.cat([mask, torch.ones_like(told)], 1),
                    "mm_token_type_ids": torch.cat([kinds, torch.zeros_like(told).to(kinds)], 1),
                }
                if one is None:
                    logits = model(**longer).logits
                else:
                    with compress(model, one, answer_columns=number):
                        logits = model(**longer).logits
                total += float(logits[0, -1].log_softmax(-1)[token])
            assert float(scores[row, column]) == pytest.approx(total, abs=2e-4)


def test_gradients_of_a_view_reach_the_original_pixels(
    target: LVLM, compressor: Compressor
) -> None:
    view = target.view(Knowledge.WHITE_BOX, compressor)
    pixels = pictures().requires_grad_()
    ask = (pixels, qwen.QUESTIONS, ANSWERS)
    for path in ("full", "compressed"):
        loss = view.answer_nll(*ask, path=path, straight_through=path == "compressed")
        (gradient,) = torch.autograd.grad(loss.sum(), pixels)
        assert gradient.shape == (3, 3, *SIZE)
        # Full attention in the tower: every pixel has a say.
        assert float((gradient != 0).float().mean()) > 0.99
        assert float(gradient.abs().amax((1, 2, 3)).min()) > 1e-5


def test_attacking_along_the_gradient_lowers_the_answer(target: LVLM) -> None:
    """One small step on the original pixels changes the loss as the gradient foretells."""
    view = target.view(Knowledge.WHITE_BOX, COMPRESSORS["fastv"])
    pixels = (pictures() * 0.8 + 0.1).requires_grad_()
    before = view.answer_nll(pixels, qwen.QUESTIONS, ANSWERS, path="full")
    (gradient,) = torch.autograd.grad(before.sum(), pixels)
    step = 8 / 255  # well above the rounding of the resampling
    after = view.answer_nll(pixels + step * gradient.sign(), qwen.QUESTIONS, ANSWERS, path="full")
    assert float((after - before).detach().sum()) > 0.02


@pytest.mark.parametrize("name", ["fastv", "fastv reindexed", "visionzip"])
def test_score_gradient_agrees_with_finite_differences(name: str) -> None:
    """Through the patches, since resampled levels are rounded."""
    for built in BUILT.values():
        model = built.build_model().double()
        batch = qwen.inputs(qwen2_vl.build_processor(), qwen.CASES["padded"])
        start = batch["pixel_values"].double()
        generator = torch.Generator().manual_seed(3)
        weights = torch.randn(3, 20, generator=generator).double()
        direction = torch.randn(start.shape, generator=generator).double()

        def loss(
            patches: Tensor, model: Any = model, batch: Any = batch, weights: Tensor = weights
        ) -> Tensor:
            with compress(model, COMPRESSORS[name], mode="observe") as session:
                model(**{**batch, "pixel_values": patches})
            found = session.trace.scores
            valid = session.trace.cuts[0].seen.valid
            return (found.log_score * weights).masked_fill(~valid, 0).sum()

        patches = start.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(patches), patches)
        slope = float((gradient * direction).sum())
        with torch.no_grad():
            step = 1e-4  # rotary tables and norms stay float32
            ahead, behind = loss(start + step * direction), loss(start - step * direction)
        assert abs(slope) > 1e-2
        assert float(ahead - behind) / 2 / step == pytest.approx(slope, rel=1e-2, abs=1e-2)


def checkpointed(model: Any) -> None:
    """Switch checkpointing on under the name the installed version has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()


@pytest.mark.parametrize("name", BUILT)
def test_gradient_checkpointing_changes_nothing(name: str, compressor: Compressor) -> None:
    batch = qwen.inputs(qwen2_vl.build_processor(), qwen.CASES["mixed"])
    found = []
    for saving in (False, True):
        model = BUILT[name].build_model()
        if saving:
            checkpointed(model)
            assert model.model.language_model.layers[0].gradient_checkpointing
        patches = batch["pixel_values"].clone().requires_grad_()
        with compress(model, compressor, relax=1.0) as session:
            logits = model(**{**batch, "pixel_values": patches}, use_cache=False).logits
            score = session.trace.scores.log_score
            # A second forward before the backward: replays must find their own state.
            model(**{**batch, "pixel_values": patches.flip(1)}, use_cache=False)
            loss = logits[:, -1].log_softmax(-1)[:, 7].sum() + score[:, :12:2].sum()
            (gradient,) = torch.autograd.grad(loss, patches)
        found.append(gradient)
    assert torch.allclose(*found, rtol=1e-4, atol=1e-5)
    assert float(found[0].abs().max()) > 1e-3


def test_changing_the_tower_from_inside_is_refused(target: LVLM) -> None:
    """Packed, windowed blocks have no place for merged or missing patches."""
    from targets.compression.base import Stage

    class Inside(Random):
        @property
        def stage(self) -> Stage:
            return Stage.TOWER

    with pytest.raises(CompressionError, match="vision tower with fewer patches"):
        compress(target.family.model, Inside(retention=0.5))
