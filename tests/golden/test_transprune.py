"""TransPrune against loops over tokens: transitions, attention of the words, and their mixture."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from sight import ROWS, Prompt, normal, prompt
from torch import Tensor

from targets.compression.base import Cut, Stage
from targets.compression.trace import choose
from targets.compression.transprune import TransPrune, transition
from targets.errors import CompressionError

CUT = Cut(Stage.LAYER, 9, number=1)
DEAD = ((0, 0), (1, 2), (1, 4), (3, 11))
ONE = TransPrune(retention=0.125)


def slow_transition(x: Tensor, y: Tensor, absolute: bool) -> list[float]:
    """‖y‖ / ‖x‖ · softmax(1 − cos) of the tokens of one image, in loops."""
    sizes, turns = [], []
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        dot = sum(p * q for p, q in zip(a, b, strict=True))
        na, nb = math.hypot(*a), math.hypot(*b)
        sizes.append(nb / na)
        turns.append(1 - (abs(dot / na / nb) if absolute else dot / na / nb))
    total = sum(math.exp(t) for t in turns)
    return [s * math.exp(t) / total for s, t in zip(sizes, turns, strict=True)]


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_transition(seed: int, absolute: bool) -> None:
    x, y = normal(3, 7, 5, seed=seed), normal(3, 7, 5, seed=seed + 50)
    valid = normal(3, 7, seed=seed + 9) > -0.7
    x, y = (one.masked_fill(~valid[..., None], torch.nan) for one in (x, y))
    found = transition(x, y, valid, absolute=absolute)
    for image in range(3):
        here = valid[image]
        truth = slow_transition(x[image][here], y[image][here], absolute)
        assert found[image][here].tolist() == pytest.approx(truth, abs=1e-6)
        assert bool((found[image][~here] == 0).all())


def test_directions_differ_where_a_module_turns_back() -> None:
    x = torch.tensor([[[1.0, 0], [1, 0], [1, 0]]])
    y = torch.tensor([[[1.0, 0], [0, 1], [-1, 0]]])
    valid = torch.ones(1, 3, dtype=torch.bool)
    signed = transition(x, y, valid)[0]
    assert signed[2] > signed[1] > signed[0]  # 1 − cos is 2, 1, 0
    absolute = transition(x, y, valid, absolute=True)[0]
    assert absolute[1] > absolute[0]
    assert torch.allclose(absolute[0], absolute[2])


def watched(one: Prompt, compressor: TransPrune, seed: int) -> dict[tuple[int, str], list[Tensor]]:
    """Let it watch layers 6 to 11; returns what it saw."""
    shape = one.seen.features.shape
    found = {}
    for layer in range(6, 12):
        for number, module in enumerate(("attention", "mlp")):
            pair = [normal(*shape, seed=seed + 100 * layer + 10 * number + i) for i in range(2)]
            compressor.watch(layer, module, pair[0], pair[1], one.seen)
            found[layer, module] = pair
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("direction", ["signed", "absolute"])
def test_score_mixes_transitions_so_far_and_attention(alpha: float, direction: str) -> None:
    one = prompt(ROWS, 3, seed=4, dead=DEAD, cut=CUT)
    compressor = replace(ONE, alpha=alpha, direction=direction)  # type: ignore[arg-type]
    pairs = watched(one, compressor, 3)
    scores, selection = choose(compressor, one.seen)
    for image in range(4):
        valid = one.seen.valid[image]
        count = int(valid.sum())
        transitions = [0.0] * count
        for (layer, _), (x, y) in pairs.items():
            if layer < 9:  # what layers 9 to 11 do is not known at the input of layer 9
                parts = slow_transition(x[image][valid], y[image][valid], direction == "absolute")
                transitions = [a + b for a, b in zip(transitions, parts, strict=True)]
        paid = one.mean_paid(image, one.words(int(one.seen.rows[image])))
        truth = [
            alpha * t / sum(transitions) + (1 - alpha) * p / sum(paid)
            for t, p in zip(transitions, paid, strict=True)
        ]
        assert scores.score[image][valid].tolist() == pytest.approx(truth, abs=1e-6)
        assert float(scores.score[image].sum()) == pytest.approx(1, abs=1e-6)
        best = sorted(range(count), key=lambda i: -truth[i])[:3]
        places = valid.nonzero().flatten()[best].tolist()
        assert selection.kept[image].nonzero().flatten().tolist() == sorted(places)


def test_it_has_to_have_watched() -> None:
    with pytest.raises(CompressionError, match="has not watched"):
        ONE.score(prompt(ROWS, 3, cut=CUT).seen)


def test_alpha_is_a_weight() -> None:
    with pytest.raises(CompressionError, match=r"alpha is 1\.5"):
        TransPrune(retention=0.5, alpha=1.5)


def test_an_image_alone_scores_as_in_the_batch() -> None:
    """The official softmax runs over the whole batch; ours must not."""
    one = prompt(ROWS, 3, seed=2, cut=CUT)
    pairs = watched(one, ONE, 1)
    batch, selection = choose(ONE, one.seen)
    alone = prompt(ROWS[:1], 3, seed=2, cut=CUT)
    for (layer, module), (x, y) in pairs.items():
        ONE.watch(layer, module, x[:1, :9], y[:1, :9], alone.seen)
    single, kept = choose(ONE, alone.seen)
    assert torch.allclose(batch.score[0, :9], single.score[0])
    assert torch.equal(selection.kept[0, :9], kept.kept[0])


def test_a_module_that_gives_nothing_has_gradients() -> None:
    """Zero outputs and zero inputs: no NaN, forward or backward."""
    x = torch.zeros(1, 3, 4, requires_grad=True)
    y = torch.zeros(1, 3, 4, requires_grad=True)
    valid = torch.tensor([[True, True, False]])
    found = transition(x, y, valid)
    for gradient in torch.autograd.grad(found.sum(), (x, y)):
        assert bool(gradient.isfinite().all())


def test_the_score_has_the_gradient_of_finite_differences() -> None:
    one = prompt(ROWS, 3, seed=1, dead=DEAD, cut=CUT)
    pairs = watched(one, ONE, 5)
    weight = normal(4, 12, seed=8) * one.seen.valid

    def total(x: Tensor, hidden: Tensor) -> Tensor:
        seen = replace(one.seen, text=replace(one.text, hidden=hidden), memory={})
        for (layer, module), (before, after) in pairs.items():
            ONE.watch(layer, module, x if layer == 7 else before, after, seen)
        return (ONE.score(seen).score * weight).sum()

    x, hidden = (v.clone().requires_grad_() for v in (pairs[7, "mlp"][0], one.text.hidden))
    gradients = torch.autograd.grad(total(x, hidden), (x, hidden))
    for index, gradient in enumerate(gradients):
        assert bool(gradient.isfinite().all())
        steps = [torch.zeros_like(x), torch.zeros_like(hidden)]
        steps[index][1, 6] = normal(10, seed=index)
        ends = [
            total(x + sign * 1e-5 * steps[0], hidden + sign * 1e-5 * steps[1]) for sign in (1, -1)
        ]
        slope = float((ends[0] - ends[1]).detach()) / 2e-5
        truth = float((gradient * steps[index]).sum())
        assert slope == pytest.approx(truth, rel=1e-4, abs=1e-9)
