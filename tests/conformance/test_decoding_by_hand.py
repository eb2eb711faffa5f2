"""Decoding methods inside a model, against a language model written out query by query."""

from __future__ import annotations

import math
from typing import Any

import pytest
import slow_decoder as slow
import tiny
import torch
from decoded import target
from torch import Tensor

from defenses.decoding import OFF, DecodingDefense
from defenses.dola import DoLa
from defenses.icd import ICD
from defenses.m3id import M3ID
from defenses.pai import PAI
from defenses.sid import SID
from defenses.vasparse import VASparse
from defenses.vcd import VCD, diffused
from targets.lvlm import LVLM
from targets.prompts import Dialogue

CLOSE = {"rtol": 1e-4, "atol": 2e-3}
ANSWER = "two three one yes blue"


@pytest.fixture(scope="module")
def lvlm() -> LVLM:
    return target("llava")


class ByHand:
    """One question about one picture, with an answer of some tokens."""

    def __init__(self, lvlm: LVLM, question: str = tiny.QUESTIONS[1]) -> None:
        self.lvlm, self.model = lvlm, lvlm.family.model
        self.pixels, self.question = tiny.pictures(1, seed=5), question
        self.talk = self._talk(question)
        self.ids = self.talk.ids[0]
        self.answers = self.talk.targets.shape[1]
        self.first = len(self.ids) - self.answers
        self.visual = (self.ids == self.model.config.image_token_id).tolist()

    def _talk(self, question: str) -> Dialogue:
        passes = self.lvlm._passes
        _, layout, size = passes.inputs(self.pixels)
        return passes.prompts.dialogue((question,), (ANSWER,), layout, size)

    def found(self, method: DecodingDefense, draw: int = 7) -> Tensor:
        with torch.no_grad():
            return self.lvlm._passes.answer_logprobs(
                self.pixels, (self.question,), (ANSWER,), decoding=method, draws=(draw,)
            )[0][0]

    def run(self, change: Any = slow.plain, ids: Tensor | None = None, pixels: Any = None) -> Any:
        """Logits ``[A, vocabulary]`` of the answer's positions, and depths."""
        if pixels is None:
            pixels = tiny.normalised(self.pixels)[0]
        with torch.no_grad():
            embeds = slow.entered(
                self.model, self.ids if ids is None else ids, None if pixels is False else pixels
            )
            logits, depths = slow.run(self.model, embeds, change)
        return logits[-self.answers :], [depth[-self.answers :] for depth in depths]


@pytest.fixture(scope="module")
def hand(lvlm: LVLM) -> ByHand:
    return ByHand(lvlm)


def ruled_out(score: Tensor, logits: Tensor, cutoff: float = 0.1) -> Tensor:
    p = logits.softmax(-1)
    return score - OFF * (p < cutoff * p.amax(-1, keepdim=True))


def test_the_slow_model_is_the_model(hand: ByHand) -> None:
    logits, _ = hand.run()
    with torch.no_grad():
        wanted, _ = hand.lvlm._passes.answer_logprobs(hand.pixels, (hand.question,), (ANSWER,))
    assert hand.answers > 4
    assert torch.allclose(logits.log_softmax(-1), wanted[0], **CLOSE)


def test_vcd(hand: ByHand) -> None:
    plain, _ = hand.run()
    noised = diffused(tiny.normalised(hand.pixels), (7,), 500)[0]
    other, _ = hand.run(pixels=noised)
    wanted = ruled_out(1.6 * plain - 0.6 * other, plain).log_softmax(-1)
    assert torch.allclose(hand.found(VCD(alpha=0.6)), wanted, **CLOSE)


def test_icd(hand: ByHand, lvlm: LVLM) -> None:
    plain, _ = hand.run()
    other, _ = hand.run(ids=ByHand(lvlm, f"how many ? {hand.question}").ids)
    wanted = ruled_out(1.6 * plain - 0.6 * other, plain).log_softmax(-1)
    assert torch.allclose(hand.found(ICD(alpha=0.6, role="how many ?")), wanted, **CLOSE)


def text_alone(hand: ByHand) -> Tensor:
    ids = hand.ids[hand.ids != hand.model.config.image_token_id]
    logits: Tensor = hand.run(ids=ids, pixels=False)[0]
    return logits


def test_m3id(hand: ByHand) -> None:
    plain, _ = hand.run()
    seen, blind = plain.log_softmax(-1), text_alone(hand).log_softmax(-1)
    rows = []
    for t, (c, u) in enumerate(zip(seen, blind, strict=True), start=1):
        gamma = math.exp(-0.2 * t)
        on = float(c.max()) < math.log(0.9)
        rows.append((c + on * (1 - gamma) / gamma * (c - u)).log_softmax(-1))
    assert torch.allclose(hand.found(M3ID(forgetting=0.2)), torch.stack(rows), **CLOSE)


def test_dola(hand: ByHand) -> None:
    plain, depths = hand.run()
    rows = []
    for place, logits in enumerate(plain):
        p, best = logits.softmax(-1), (-1.0, logits)
        for depth in (0, 3):
            early = hand.model.lm_head(depths[depth][place])
            q = early.softmax(-1)
            m = (p + q) / 2
            distance = float((p * (p / m).log() + q * (q / m).log()).sum())
            best = max(best, (distance, early), key=lambda pair: pair[0])
        score = p.log() - best[1].log_softmax(-1)
        rows.append(ruled_out(score, logits).log_softmax(-1))
    assert torch.allclose(hand.found(DoLa(candidates=(0, 3))), torch.stack(rows), **CLOSE)


def test_pai(hand: ByHand) -> None:
    def raised(
        layer: int, i: int, logits: Tensor, query: Tensor, keys: Tensor, v: Tensor
    ) -> Tensor:
        logits = logits.clone()
        if i >= hand.first and layer >= 1:
            for column in range(i + 1):
                if hand.visual[column]:
                    logits[:, column] += 0.5 * logits[:, column].abs()
        return slow.plain(layer, i, logits, query, keys, v)

    seen = hand.run(raised)[0].log_softmax(-1)
    blind = text_alone(hand).log_softmax(-1)
    wanted = ruled_out(1.3 * (seen - blind) + blind, seen).log_softmax(-1)
    found = hand.found(PAI(alpha=0.5, gamma=1.3, start_layer=1))
    assert torch.allclose(found, wanted, **CLOSE)


def test_sid(hand: ByHand) -> None:
    """Position by position: the pass of each token sees what that token attends to least."""
    plain, _ = hand.run()
    count = round(0.3 * sum(hand.visual))
    chosen: dict[int, set[int]] = {}

    def choosing(layer: int, i: int, logits: Tensor, q: Tensor, keys: Tensor, v: Tensor) -> Tensor:
        if layer == 1 and i >= hand.first:
            paid = logits.softmax(-1).mean(0).tolist()
            columns = [c for c in range(i + 1) if hand.visual[c]]
            chosen[i] = set(sorted(columns, key=lambda c: paid[c])[:count])
        if layer >= 2:
            left = chosen[max(i, hand.first)]
            gone = [c for c in range(i + 1) if hand.visual[c] and c not in left]
            logits = logits.clone()
            logits[:, gone] = torch.finfo(torch.float32).min
        return slow.plain(layer, i, logits, q, keys, v)

    other, _ = hand.run(choosing)
    wanted = ruled_out(1.6 * plain - 0.6 * other, plain).log_softmax(-1)
    assert torch.allclose(hand.found(SID(alpha=0.6, retention=0.3)), wanted, **CLOSE)


class Sparse:
    """VASparse's attention, one query and one head after the other."""

    def __init__(self, hand: ByHand, method: VASparse) -> None:
        self.hand, self.method = hand, method
        self.received: dict[int, dict[int, float]] = {}
        self.mass: dict[int, list[float]] = {}

    def __call__(
        self, layer: int, i: int, logits: Tensor, query: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        method, hand = self.method, self.hand
        a = logits.softmax(-1)
        received = self.received.setdefault(layer, {})
        for column in range(i + 1):
            received[column] = received.get(column, 0.0) + float(a[:, column].mean())
        self.mass.setdefault(layer, []).append(
            sum(float(a[-1, c]) for c in range(i + 1) if hand.visual[c])
        )
        if i < hand.first:
            return slow.plain(layer, i, logits, query, keys, values)
        w = torch.tensor([received[c] for c in range(i + 1)]).softmax(0)
        p = torch.tensor(self.mass[layer]).softmax(0)
        assert float(w.sum()) == pytest.approx(1)
        out = []
        for head in range(len(logits)):
            sharp = (1 + method.beta) * logits[head] - method.beta * w * logits[head]
            dots = keys[head] @ query[head]
            recall = a[head] if method.score_space == "prob" else dots
            delta = (recall**2 + method.saliency * p).tolist()
            count = max(1, round(method.keep * (i + 1)))
            kept = sorted(sorted(range(i + 1), key=lambda c: -delta[c])[:count])
            gone = [c for c in range(i + 1) if c not in kept]
            rows, vectors = list(sharp[kept]), list(values[head][kept])
            if method.merge == "mean" and gone:
                key = keys[head][gone].mean(0)
                rows.append((1 + method.beta) * (key @ query[head]) * len(key) ** -0.5)
                vectors.append(values[head][gone].mean(0))
            out.append(torch.stack(rows).softmax(0) @ torch.stack(vectors))
        return torch.stack(out)


@pytest.mark.parametrize(
    "method",
    [
        VASparse(keep=0.6, beta=0.4, saliency=2.0),
        VASparse(keep=0.6, beta=0.4, score_space="logit"),
        VASparse(keep=0.6, beta=0.4, merge="mean"),
        VASparse(keep=0.5, sink=False, beta=0),
        VASparse(select=False, keep=1, beta=0.8),
    ],
    ids=str,
)
def test_vasparse(hand: ByHand, method: VASparse) -> None:
    theta, depths = hand.run(Sparse(hand, method))
    phi = hand.model.lm_head(depths[0])
    wanted = ruled_out(1.1 * theta - 0.1 * phi, theta).log_softmax(-1)
    assert torch.allclose(hand.found(method), wanted, **CLOSE)


def test_vasparse_of_the_repository(hand: ByHand) -> None:
    """Twenty generated tokens in intervals of ten: at most two merge, in layer 0 only."""
    hand = ByHand(hand.lvlm)
    long = " ".join(["two three one yes blue"] * 5)
    passes = hand.lvlm._passes
    _, layout, size = passes.inputs(hand.pixels)
    talk = passes.prompts.dialogue((hand.question,), (long,), layout, size)
    hand.ids, hand.answers = talk.ids[0], talk.targets.shape[1]
    first = len(hand.ids) - hand.answers

    def oldest(
        layer: int, i: int, logits: Tensor, query: Tensor, keys: Tensor, v: Tensor
    ) -> Tensor:
        said = i - first
        old = int(0.1 * (said // 10 * 10)) if said > 0 else 0
        if layer or not old:
            return slow.plain(layer, i, logits, query, keys, v)
        gone = list(range(first + 1, first + 1 + old))
        kept = [c for c in range(i + 1) if c not in gone]
        key, value = keys[:, gone].mean(1), v[:, gone].mean(1)
        beside = (key * query).sum(-1, keepdim=True) * query.shape[1] ** -0.5
        rows = torch.cat([logits[:, kept], beside], 1).softmax(-1)
        return (rows[:, None] @ torch.cat([v[:, kept], value[:, None]], 1))[:, 0]

    plain, depths = hand.run(oldest)
    final, phi = plain.log_softmax(-1), hand.model.lm_head(depths[0])
    score = final - phi.log_softmax(-1) - 0.1 * phi
    wanted = ruled_out(score, plain).log_softmax(-1)
    method = VASparse(variant="repo_compat", interval=10)
    with torch.no_grad():
        found, _ = passes.answer_logprobs(hand.pixels, (hand.question,), (long,), decoding=method)
    assert talk.targets.shape[1] > 21
    assert torch.allclose(found[0], wanted, **CLOSE)
