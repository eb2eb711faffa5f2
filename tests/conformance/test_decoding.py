"""Decoding at work: like plain decoding, like transformers, and scored as it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny
import torch
from decoded import (
    COMPRESSORS,
    FAMILIES,
    STEPS,
    Plain,
    asked,
    check_forced,
    check_gradient,
    check_rows,
    generated_logprobs,
    pictures,
    plain_ids,
    spoken,
    target,
)
from torch import Tensor

from defenses.beam import BeamSearch
from defenses.decoding import DecodingDefense
from targets.compression import FastV, VisionZip
from targets.compression.base import Compressor
from targets.decoding import AttentionCall, AttentionRule, Step, View
from targets.decoding.assembly import Asked
from targets.decoding.attention import softmax
from targets.lvlm import LVLM


class Again(AttentionRule):
    """The model's own attention, worked out anew at the answer positions."""

    def layers(self, depth: int) -> range:
        return range(depth)

    def __call__(self, call: AttentionCall) -> Tensor:
        logits = call.scaled(call.dots(call.answers()))
        return call.put(call.attend(softmax(logits, call.answers_added())))


@dataclass(frozen=True, kw_only=True)
class Everything(Plain):
    """Asks for all there is, and lets some of it in."""

    name: ClassVar[str] = "everything"
    weight: float = 0.3

    def views(self) -> tuple[View, ...]:
        def noise(pixels: Tensor, seeds: Any) -> Tensor:
            draws = [torch.Generator().manual_seed(seed) for seed in seeds]
            shape = pixels.shape[1:]
            return pixels + torch.stack([torch.randn(shape, generator=one) for one in draws])

        return (
            View(question=lambda text: f"how many ? {text}"),
            View(image=False),
            View(disturb=noise),
            View(attention=Again),
        )

    def attention(self) -> AttentionRule:
        return Again()

    def depths(self, layers: int) -> tuple[int, ...]:
        return (0, layers // 2)

    @property
    def looks_at_entry(self) -> bool:
        return True

    def logits(self, step: Step) -> Tensor:
        assert step.entered is not None
        assert step.visual is not None
        assert step.entered.shape[:2] == step.visual.shape
        early = step.head(step.hidden[max(step.hidden)])
        words = step.head(step.hidden[0])
        count = step.visual.sum(1)[:, None, None].float()
        return step.logits - self.weight * (sum(step.views) + early + words) / count.sqrt()


@pytest.fixture(scope="module", params=FAMILIES)
def lvlm(request: pytest.FixtureRequest) -> LVLM:
    return target(request.param)


@pytest.fixture(params=COMPRESSORS)
def compressor(request: pytest.FixtureRequest) -> Compressor | None:
    return COMPRESSORS[request.param]


def test_plain_decoding_is_that_of_transformers(lvlm: LVLM, compressor: Compressor | None) -> None:
    assert torch.equal(spoken(lvlm, Plain(), asked(lvlm, compressor)), plain_ids(lvlm, compressor))


def test_answers_come_with_the_session_that_made_them(lvlm: LVLM) -> None:
    one = COMPRESSORS["fastv"]
    pixels = pictures(lvlm)
    wanted = lvlm.answer(pixels, tiny.QUESTIONS, compressor=one)
    found = lvlm.answer(pixels, tiny.QUESTIONS, compressor=one, decoding=Plain())
    assert found.texts == wanted.texts
    assert found.generated == wanted.generated
    assert wanted.kept is not None
    assert found.kept is not None
    assert torch.equal(found.kept, wanted.kept)
    forced = lvlm.answer(
        pixels.flip(0), tiny.QUESTIONS, compressor=one, kept=wanted.selection, decoding=Plain()
    )
    assert forced.kept is not None
    assert torch.equal(forced.kept, wanted.kept)


def test_attention_worked_out_anew_is_that_of_the_kernel(
    lvlm: LVLM, compressor: Compressor | None
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Anew(Plain):
        name: ClassVar[str] = "anew"

        def attention(self) -> AttentionRule:
            return Again()

    for answers in (tiny.ANSWERS, ("yes",) * 3):
        args = (pictures(lvlm), tiny.QUESTIONS, answers, compressor)
        with torch.no_grad():
            wanted, _ = lvlm._passes.answer_logprobs(*args)
            found, _ = lvlm._passes.answer_logprobs(*args, decoding=Anew())
            same, _ = lvlm._passes.answer_logprobs(*args, decoding=Plain())
        assert torch.equal(same, wanted)
        assert torch.allclose(found, wanted, rtol=0, atol=5e-5)
    assert torch.equal(spoken(lvlm, Anew(), asked(lvlm, compressor)), plain_ids(lvlm, compressor))


def test_everything_asked_for_agrees(lvlm: LVLM, compressor: Compressor | None) -> None:
    check_forced(lvlm, Everything(), compressor)
    check_rows(lvlm, Everything(), compressor)
    check_gradient(lvlm, Everything(), compressor)


def test_everything_matters(lvlm: LVLM) -> None:
    one = asked(lvlm, None)
    args = (one.images, one.questions, tiny.ANSWERS)
    with torch.no_grad():
        plain, _ = lvlm._passes.answer_logprobs(*args)
        other, _ = lvlm._passes.answer_logprobs(*args, decoding=Everything(), draws=one.draws)
    assert float((plain - other).abs().amax()) > 1e-2


@pytest.mark.parametrize(("width", "penalty"), [(1, 1.0), (2, 1.0), (3, 0.0), (4, 2.0)])
def test_beams_are_those_of_transformers(lvlm: LVLM, width: int, penalty: float) -> None:
    from transformers import GenerationConfig

    passes, one = lvlm._passes, asked(lvlm, None)
    inputs, layout, size = passes.inputs(one.images)
    prompt = passes.prompts.prompt(one.questions, layout, size)
    config = GenerationConfig(
        max_new_tokens=STEPS,
        do_sample=False,
        num_beams=width,
        length_penalty=penalty,
        eos_token_id=sorted(passes.ends),
        pad_token_id=passes.prompts.pad,
    )
    wanted = lvlm.family.model.generate(
        input_ids=prompt.ids,
        attention_mask=prompt.mask,
        generation_config=config,
        **inputs,
        **lvlm.family.extras(prompt.ids, prompt.mask, 0),
    )[:, prompt.ids.shape[1] :]
    found = spoken(lvlm, BeamSearch(beams=width, length_penalty=penalty), one)
    # They take the end token for padding where the padding id is 0.
    wanted = wanted.masked_fill(~passes.until_end(wanted), passes.prompts.pad)
    assert torch.equal(found, wanted[:, : found.shape[1]])
    assert bool((wanted[:, found.shape[1] :] == passes.prompts.pad).all())


@pytest.mark.parametrize("method", [BeamSearch(beams=3), Everything(beams=3)], ids=str)
def test_beams_under_compression(
    lvlm: LVLM, compressor: Compressor | None, method: DecodingDefense
) -> None:
    """Against a search without reordering: every hypothesis is run from the start."""
    for row in range(2):
        one = asked(lvlm, compressor, slice(row, row + 1))
        found = spoken(lvlm, method, one, 3)[0].tolist()
        assert found == slow_beams(lvlm, method, one, 3)


def slow_beams(lvlm: LVLM, method: DecodingDefense, one: Asked, most: int) -> list[int]:
    """Beam search over hypotheses that are each run from the start."""
    ends = lvlm._passes.ends
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, most + 1):
        grown = []
        for score, said in running:
            forced = torch.tensor([[*said, 0]])
            logprobs = generated_logprobs(lvlm, method, one, forced)[0, -1]
            grown += [(score + float(p), [*said, t]) for t, p in enumerate(logprobs)]
        grown.sort(key=lambda item: -item[0])
        grown = grown[: max(2, 1 + len(ends)) * method.beams]
        for place, (score, said) in enumerate(grown):
            if (said[-1] in ends or length == most) and place < method.beams:
                finished.append((score / length**method.length_penalty, said))
        finished = sorted(finished, key=lambda item: -item[0])[: method.beams]
        running = [item for item in grown if item[1][-1] not in ends][: method.beams]
        best = running[0][0] / length**method.length_penalty
        if len(finished) == method.beams and best <= finished[-1][0]:
            break
    return finished[0][1]


def test_nothing_is_left_in_the_model() -> None:
    lvlm = target("llava")
    before = {name: dict(module.__dict__) for name, module in lvlm.family.model.named_modules()}
    hooks = {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in lvlm.family.model.named_modules()
    }
    spoken(lvlm, Everything(), asked(lvlm, VisionZip(keep_tokens=9)))

    @dataclass(frozen=True, kw_only=True)
    class Broken(Everything):
        name: ClassVar[str] = "broken"

        def attention(self) -> AttentionRule:
            class Raising(Again):
                def __call__(self, call: AttentionCall) -> Tensor:
                    raise RuntimeError("inside attention")

            return Raising()

    with pytest.raises(RuntimeError, match="inside attention"):
        spoken(lvlm, Broken(), asked(lvlm, FastV(layer=2, keep_tokens=9)))
    for name, module in lvlm.family.model.named_modules():
        assert set(module.__dict__) == set(before[name])
        assert module.__dict__.get("config") is before[name].get("config")
        assert (len(module._forward_hooks), len(module._forward_pre_hooks)) == hooks[name]
