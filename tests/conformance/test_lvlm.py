"""Loading, prompting and answering through the public class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from stages import plan

from targets.base import Knowledge
from targets.compression import FastV, Random
from targets.compression.base import Compressor
from targets.errors import CompressionError, TargetError
from targets.families import family_of
from targets.lvlm import LVLM
from targets.preprocessing import Layout
from targets.prompts import PromptBook


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("checkpoint")
    tiny.build_model().save_pretrained(place)
    tiny.build_processor().save_pretrained(place)
    return place


PICTURE = (Layout.grid((6, 6)), (tiny.SIZE, tiny.SIZE))
"""Layout and size of a picture that fits the tiny model."""


@pytest.fixture(scope="module")
def target() -> LVLM:
    return LVLM(tiny.build_model(), tiny.build_processor())


def test_load_is_the_saved_model(folder: Path, target: LVLM) -> None:
    loaded = LVLM.load(folder)
    images = tiny.pictures(3)
    assert (
        loaded.answer(images, tiny.QUESTIONS).texts == target.answer(images, tiny.QUESTIONS).texts
    )
    assert loaded.layout((48, 48)).shapes == ((6, 6),)
    assert loaded.image_size == (48, 48)
    assert loaded.capabilities == {"gradients", "visual_tokens", "option_scores", "generate"}
    assert loaded.identity["class"] == "LlavaForConditionalGeneration"
    assert loaded.identity["attention"] == "sdpa"
    assert loaded.identity["dtype"] == "float32"
    assert str(folder.parent) not in str(loaded.identity)


def test_identity_changes_with_the_files(folder: Path, tmp_path: Path) -> None:
    first = LVLM.load(folder).identity
    assert first == LVLM.load(folder).identity
    tiny.build_model(seed=1).save_pretrained(tmp_path)
    tiny.build_processor(None).save_pretrained(tmp_path)
    second = LVLM.load(tmp_path).identity
    assert first["weights"] != second["weights"]
    assert first["processor"] != second["processor"]
    assert len(first["weights"]) == len(first["processor"]) == 64


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_is_the_one_asked_for(folder: Path, implementation: str) -> None:
    loaded = LVLM.load(folder, attn_implementation=implementation)
    assert loaded.identity["attention"] == implementation
    assert loaded.identity["vision_attention"] == implementation


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attn_implementation": "flash_attention_2"}, "CUDA device"),
        ({"attn_implementation": "flex_attention"}, "one of auto, eager"),
        ({"dtype": "int8"}, "one of auto, float32"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_impossible_wishes_are_refused(folder: Path, options: Any, reason: str) -> None:
    with pytest.raises(TargetError, match=reason):
        LVLM.load(folder, **options)


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"not opened")
    with pytest.raises(TargetError, match=r"pytorch_model\.bin.*refused"):
        LVLM.load(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(TargetError, match="no safetensors weights"):
        LVLM.load(tmp_path)
    with pytest.raises(TargetError, match=r"no config\.json"):
        LVLM.load(tmp_path / "..")
    with pytest.raises(TargetError, match="does not exist"):
        LVLM.load(tmp_path / "nowhere")


def test_unknown_hub_ids_fail_with_a_target_error() -> None:
    with pytest.raises(TargetError, match="could not be loaded"):
        LVLM.load("nobody/nothing", revision="main")


@pytest.mark.parametrize("template", [tiny.TEMPLATE, None])
def test_prompts_are_those_of_the_processor(template: str | None) -> None:
    processor = tiny.build_processor(template)
    book = PromptBook(processor, family_of(tiny.build_model()))
    prompt = book.prompt(tiny.QUESTIONS, *PICTURE)
    pictures = [Image.fromarray(np.zeros((48, 48, 3), np.uint8))] * 3
    truth = processor(
        images=pictures,
        text=[book.text(question) for question in tiny.QUESTIONS],
        padding=True,
        return_tensors="pt",
        add_special_tokens=template is None,
    )
    assert torch.equal(prompt.ids, truth["input_ids"])
    assert torch.equal(prompt.mask, truth["attention_mask"])
    assert prompt.ids[1].tolist()[: 1 + tiny.TOKENS] == [1] + [4] * tiny.TOKENS


def test_prompts_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = tiny.build_processor()
    book = PromptBook(processor, family_of(tiny.build_model()))
    first = book.dialogue(tiny.QUESTIONS, tiny.ANSWERS, *PICTURE)
    monkeypatch.setattr(book, "_ids", lambda text: pytest.fail(f"tokenised {text!r} again"))
    assert book.dialogue(tiny.QUESTIONS, tiny.ANSWERS, *PICTURE) is first
    once = book.prompt(tiny.QUESTIONS, *PICTURE)
    assert once is book.prompt(list(tiny.QUESTIONS), *PICTURE)


def test_a_placeholder_in_the_question_is_refused(target: LVLM) -> None:
    with pytest.raises(TargetError, match="2 image placeholders"):
        target.answer(tiny.pictures(1), ["what is <image> ?"])


def test_answers_do_not_depend_on_the_batch(target: LVLM, compressor: Compressor) -> None:
    images, seeds = tiny.pictures(3), (4, 5, 6)
    together = target.answer(images, tiny.QUESTIONS, compressor=compressor, seeds=seeds)
    assert together.kept is not None
    assert together.score is not None
    assert together.selection is not None
    for row, question in enumerate(tiny.QUESTIONS):
        here = slice(row, row + 1)
        alone = target.answer(images[here], [question], compressor=compressor, seeds=seeds[here])
        assert alone.texts == together.texts[here]
        assert torch.equal(alone.kept, together.kept[here])
    assert together.seconds > 0
    assert not any(word in text for text in together.texts for word in ("<", "/s"))


def test_answers_of_generate_equal_the_library(target: LVLM) -> None:
    model, processor = tiny.build_model(), tiny.build_processor()
    images = tiny.pictures(2)
    for row, question in enumerate(tiny.QUESTIONS[:2]):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}])
        levels = (images[row] * 255).round().byte().permute(1, 2, 0).numpy()
        inputs = processor(
            images=Image.fromarray(levels), text=text, return_tensors="pt", add_special_tokens=False
        )
        made = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        truth = processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert target.answer(images[row : row + 1], [question]).texts == (truth.strip(),)


def test_swapping_selections(target: LVLM, compressor: Compressor) -> None:
    """An answer's selection goes back in, row by row, and a bool set does too."""
    images, others = tiny.pictures(3), tiny.pictures(3, seed=9)
    first = target.answer(images, tiny.QUESTIONS, compressor=compressor, seeds=(1, 2, 3))
    swapped = target.answer(
        others, tiny.QUESTIONS, compressor=compressor, kept=first.selection, seeds=(4, 5, 6)
    )
    assert torch.equal(swapped.kept, first.kept)
    back = target.answer(images, tiny.QUESTIONS, compressor=compressor, kept=first.selection)
    assert back.texts == first.texts
    anew = compressor.name == "tome"  # merged in the layers otherwise than from a bare set
    if len(compressor.cuts(4)) == 1 and bool(first.kept.any(1).all()) and not anew:
        # A bare set is imposed at every cut, and says nothing of tokens that are made anew.
        plain = target.answer(images, tiny.QUESTIONS, compressor=compressor, kept=first.kept)
        assert plain.texts == first.texts


def test_forcing_needs_sense(target: LVLM) -> None:
    images = tiny.pictures(3)
    kept = torch.ones(3, tiny.TOKENS, dtype=torch.bool)
    with pytest.raises(TargetError, match="name the compressor"):
        target.answer(images, tiny.QUESTIONS, kept=kept)
    with pytest.raises(CompressionError, match="forced selection"):
        target.answer(images, tiny.QUESTIONS, compressor=FastV(retention=0.5), kept=kept[:, :10])
    with pytest.raises(CompressionError, match="keeps no token"):
        target.answer(images, tiny.QUESTIONS, compressor=FastV(retention=0.5), kept=~kept)
    full = target.answer(images, tiny.QUESTIONS)
    assert full.kept is full.score is full.selection is None
    forced = target.answer(images, tiny.QUESTIONS, compressor=FastV(retention=0.5), kept=kept)
    assert forced.texts == full.texts


def test_option_scores_are_log_probabilities(target: LVLM, compressor: Compressor) -> None:
    images, options = tiny.pictures(3), ("yes", "no", "two three")
    scores = target.option_scores(images, tiny.QUESTIONS, options, compressor=compressor)
    view: Any = target.view(Knowledge.WHITE_BOX, compressor)
    for column, option in enumerate(options):
        nll = view.answer_nll(images, tiny.QUESTIONS, (option,) * 3, path="compressed")
        truth = -nll * (len(option.split()) + 1)
        assert torch.allclose(scores[:, column], truth, atol=1e-4)
    full = target.option_scores(images, tiny.QUESTIONS, options)
    assert float((full - scores).abs().max()) > 1e-3
    with pytest.raises(TargetError, match="at least one"):
        target.option_scores(images, tiny.QUESTIONS, ())


def test_seeds_reach_random(target: LVLM) -> None:
    images = tiny.pictures(2)
    one = target.answer(images, tiny.QUESTIONS[:2], compressor=Random(keep_tokens=9), seeds=(1, 2))
    two = target.answer(images, tiny.QUESTIONS[:2], compressor=Random(keep_tokens=9), seeds=(1, 3))
    assert torch.equal(one.kept[0], two.kept[0])
    assert not torch.equal(one.kept[1], two.kept[1])


@pytest.mark.parametrize("size", [(48, 48), (64, 100), (100, 40)])
def test_pictures_of_any_size(target: LVLM, compressor: Compressor, size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    images = (images * 255).round() / 255
    assert len(target.answer(images, tiny.QUESTIONS[:2], compressor=compressor).texts) == 2


def test_processor_of_another_model_is_refused() -> None:
    processor = tiny.build_processor()
    processor.image_processor.crop_size = {"height": 32, "width": 32}
    with pytest.raises(TargetError, match="belongs to the model"):
        LVLM(tiny.build_model(), processor)


def test_bfloat16_answers(folder: Path, compressor: Compressor) -> None:
    target = LVLM.load(folder, dtype="bfloat16")
    assert target.identity["dtype"] == "bfloat16"
    images = tiny.pictures(3).requires_grad_()
    assert len(target.answer(images.detach(), tiny.QUESTIONS, compressor=compressor).texts) == 3
    view: Any = target.view(Knowledge.WHITE_BOX, compressor)
    loss = view.answer_nll(
        images, tiny.QUESTIONS, tiny.ANSWERS, path="compressed", straight_through=True
    )
    (gradient,) = torch.autograd.grad(loss.sum(), images)
    assert gradient.dtype == torch.float32
    assert float(gradient.abs().max()) > 0


def test_siglip_towers_have_no_cls(compressor: Compressor) -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    donor = tiny.build_model()
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=tiny.SIZE,
            patch_size=tiny.PATCH,
            vision_use_head=False,
        ),
        text_config=donor.config.text_config,
        image_token_id=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = 2
    target = LVLM(model, tiny.build_processor())
    answered = target.answer(tiny.pictures(3), tiny.QUESTIONS, compressor=compressor)
    assert answered.left.tolist() == [plan(compressor, 4)[-1]] * 3
    encoded: Any = target.view(Knowledge.ENCODER)
    score = encoded.encode(tiny.pictures(3)).score
    assert torch.allclose(score.sum(1), torch.ones(3), atol=1e-5)
    model.set_attn_implementation("eager")
    truth = model.model.vision_tower(tiny.normalised(tiny.pictures(3)), output_attentions=True)
    assert torch.allclose(score, truth.attentions[-1].mean((1, 2)), atol=1e-6)
