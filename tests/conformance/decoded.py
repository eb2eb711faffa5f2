"""A model that decodes in some way, and what holds of every method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import tiny
import torch
from families import build
from torch import Tensor

from defenses.base import AdaptiveRoute
from defenses.decoding import DecodingDefense
from targets.compression import FastV, PyramidDrop, Random, compress
from targets.compression.base import Compressor
from targets.decoding import Step
from targets.decoding.assembly import Asked
from targets.lvlm import LVLM

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma")
COMPRESSORS: dict[str, Compressor | None] = {
    "none": None,
    "fastv": FastV(layer=2, retention=0.4),
    "fastv reindexed": FastV(layer=1, retention=0.4, positions="reindex"),
    "random": Random(retention=0.4),
    "pyramiddrop": PyramidDrop(retention=0.3),
}
STEPS = 7


@dataclass(frozen=True, kw_only=True)
class Plain(DecodingDefense):
    """Greedy decoding through the seam."""

    name: ClassVar[str] = "plain"
    adaptive: ClassVar[AdaptiveRoute] = AdaptiveRoute.DIFFERENTIABLE

    def logits(self, step: Step) -> Tensor:
        return step.logits


def target(family: str) -> LVLM:
    if family == "llava":
        return LVLM(tiny.build_model(layers=5), tiny.build_processor())
    return LVLM(*build(family))


def pictures(lvlm: LVLM, count: int = 3) -> Tensor:
    return tiny.pictures(count, seed=3, size=lvlm.family.image_size[0])


def spoken(lvlm: LVLM, method: DecodingDefense, asked: Asked, steps: int = STEPS) -> Tensor:
    passes = lvlm._passes
    return passes.decode(passes.decoder(method, asked), steps)


def asked(lvlm: LVLM, compressor: Compressor | None, rows: slice = slice(None)) -> Asked:
    draws = tuple(range(10, 13))[rows]
    return Asked(
        pictures(lvlm)[rows], tiny.QUESTIONS[rows], compressor=compressor, seeds=draws, draws=draws
    )


def plain_ids(lvlm: LVLM, compressor: Compressor | None, steps: int = STEPS) -> Tensor:
    one = asked(lvlm, compressor)
    session = None
    if compressor is not None:
        session = compress(lvlm.family.model, compressor, family=lvlm.family, seeds=one.seeds)
    with torch.no_grad():
        return lvlm._passes.generate(one.images, one.questions, session, steps, compressor)


def generated_logprobs(lvlm: LVLM, method: DecodingDefense, one: Asked, forced: Tensor) -> Tensor:
    """What is said of each token, one cached step after the other, of given tokens."""
    run = lvlm._passes.decoder(method, one)
    with torch.no_grad():
        found = [run._start()]
        for column in range(forced.shape[1] - 1):
            found.append(run._advance(forced[:, column]))
    return torch.stack(found, 1).log_softmax(-1)


def check_forced(lvlm: LVLM, method: DecodingDefense, compressor: Compressor | None) -> None:
    """Scoring an answer gives what answering would have, cached and token by token."""
    one = asked(lvlm, compressor)
    with torch.no_grad():
        wanted, talk = lvlm._passes.answer_logprobs(
            one.images,
            one.questions,
            tiny.ANSWERS,
            compressor,
            seeds=one.seeds,
            decoding=method,
            draws=one.draws,
        )
    found = generated_logprobs(lvlm, method, one, talk.targets)
    # Tokens ruled out lie near −1000, where float32 has steps of 6e-5; sums of keys sharpen
    # attention, which makes more of rounding.
    assert torch.allclose(found[talk.real], wanted[talk.real], rtol=1e-4, atol=1e-3)


def check_rows(lvlm: LVLM, method: DecodingDefense, compressor: Compressor | None) -> None:
    """A row of a padded batch answers as it does alone."""
    whole = spoken(lvlm, method, asked(lvlm, compressor))
    for row in range(3):
        alone = spoken(lvlm, method, asked(lvlm, compressor, slice(row, row + 1)))
        real = lvlm._passes.until_end(alone)[0].sum()
        assert torch.equal(whole[row, :real], alone[0, :real])


def check_gradient(lvlm: LVLM, method: DecodingDefense, compressor: Compressor | None) -> None:
    """The loss of an adaptive attack reaches the pixels."""
    pixels = pictures(lvlm).requires_grad_()
    through = compressor is not None
    loss = lvlm._passes.nll(
        pixels,
        tiny.QUESTIONS,
        tiny.ANSWERS,
        compressor,
        straight_through=through,
        decoding=method,
        draws=(1, 2, 3),
    )
    (gradient,) = torch.autograd.grad(loss.sum(), pixels)
    assert bool(gradient.isfinite().all())
    assert bool((gradient.flatten(1).abs().amax(1) > 0).all())
