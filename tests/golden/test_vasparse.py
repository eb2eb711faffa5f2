"""VASparse's selection against loops and against every other selection there is (Theorem 1)."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from sight import HEADS, ROWS, Prompt, normal, prompt
from torch import Tensor

from targets.compression.base import Cut, Stage
from targets.compression.sparsevlm import chosen
from targets.compression.trace import choose
from targets.compression.vasparse import VASparse, saliency
from targets.errors import CompressionError

CUT = Cut(Stage.LAYER, 3, 2, attends=True)
DEAD = ((0, 0), (1, 2), (1, 4), (3, 11))


def slow_saliency(one: Prompt, row: int) -> dict[int, float]:
    """Softmax over the prompt's columns of what their last head pays to the images."""
    images = {c for i, cs in enumerate(one.columns) if int(one.seen.rows[i]) == row for c in cs}
    live = [c for c in range(one.text.last + 1) if bool(one.text.live[row, c])]
    mass = {
        c: sum(p for at, p in one.attention(row, HEADS - 1, c).items() if at in images)
        for c in live
    }
    total = sum(math.exp(m) for m in mass.values())
    return {c: math.exp(m) / total for c, m in mass.items()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dead", [(), DEAD])
def test_saliency(seed: int, dead: tuple[tuple[int, int], ...]) -> None:
    one = prompt(ROWS, 3, seed=seed, dead=dead, answers=3)
    found = saliency(one.text)
    for image in range(4):
        weights = slow_saliency(one, int(one.seen.rows[image]))
        truth = [weights[c] for c in one.columns[image]]
        assert found[image][one.seen.valid[image]].tolist() == pytest.approx(truth, abs=1e-9)


def test_saliency_of_long_prompts_is_worked_on_in_chunks() -> None:
    one = prompt(((2, 140, 9),), 3)
    weights = slow_saliency(one, 0)
    truth = [weights[c] for c in one.columns[0]]
    assert saliency(one.text)[0].tolist() == pytest.approx(truth, abs=1e-9)


def slow_score(one: Prompt, image: int, space: str, weight: float) -> list[float]:
    seen, row = one.seen, int(one.seen.rows[image])
    last = [one.attention(row, h, one.text.last) for h in range(HEADS)]
    assert seen.query is not None
    assert seen.keys is not None
    recall = []
    for place in seen.valid[image].nonzero().flatten().tolist():
        column = int(one.text.slots.columns[image, place])
        logits = [float(seen.query[image, h] @ seen.keys[image, h, place]) for h in range(HEADS)]
        mean = sum(paid.get(column, 0.0) for paid in last) / HEADS
        recall.append(mean**2 if space == "prob" else sum(x * x for x in logits) / HEADS)
    weights = slow_saliency(one, row)
    return [r + weight * weights[c] for r, c in zip(recall, one.columns[image], strict=True)]


@pytest.mark.parametrize("space", ["prob", "logit"])
@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
def test_score(space: str, weight: float) -> None:
    one = prompt(ROWS, 3, seed=7, dead=DEAD, attends=True, cut=CUT)
    compressor = VASparse(retention=0.5, score_space=space, saliency=weight)  # type: ignore[arg-type]
    scores, selection = choose(compressor, one.seen)
    for image in range(4):
        truth = slow_score(one, image, space, weight)
        valid = one.seen.valid[image]
        assert scores.score[image][valid].tolist() == pytest.approx(truth, rel=1e-7)
        best = sorted(range(len(truth)), key=lambda i: (-truth[i], i))[:3]
        places = valid.nonzero().flatten()[best].tolist()
        assert selection.kept[image].nonzero().flatten().tolist() == sorted(places)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [1, 3, 8])
def test_no_other_set_has_a_smaller_energy(seed: int, size: int) -> None:
    """Theorem 1 by trying all sets: Σ (a − M a)² − λ P M."""
    one = prompt(((2, 9, 4),), size, seed=seed, attends=True, cut=CUT)
    compressor = VASparse(retention=0.5, saliency=0.1)
    _, selection = choose(compressor, one.seen)
    assert one.seen.attention is not None
    recall = one.seen.attention.mean(1)[0].tolist()
    weight = saliency(one.text)[0].tolist()

    def energy(kept: set[int]) -> float:
        lost = sum(a * a for i, a in enumerate(recall) if i not in kept)
        return lost - 0.1 * sum(p for i, p in enumerate(weight) if i in kept)

    ours = energy(set(selection.kept[0].nonzero().flatten().tolist()))
    best = min(energy(set(s)) for s in itertools.combinations(range(9), size))
    assert ours == pytest.approx(best, abs=1e-12)


def test_strongly_negative_logits_count_only_in_logit_space() -> None:
    """The formula's quirk that the code's form does not have."""
    one = prompt(((2, 4, 2),), 1, attends=True, cut=CUT)
    keys = torch.zeros_like(one.seen.keys)
    query = torch.ones_like(one.seen.query)
    keys[:, :, 2] = -5.0
    keys[:, :, 1] = 1.0
    attention = (keys @ query[..., None]).squeeze(-1).softmax(-1)
    seen = replace(one.seen, keys=keys, query=query, attention=attention)
    _, prob = choose(VASparse(retention=0.25, saliency=0.0), seen)
    _, logit = choose(VASparse(retention=0.25, saliency=0.0, score_space="logit"), seen)
    assert prob.kept[0].tolist() == [False, True, False, False]
    assert logit.kept[0].tolist() == [False, False, True, False]


def test_aggregated_tokens_are_sums_of_what_was_dropped() -> None:
    rows, counts = ((2, 60, 4), (1, 35, 2, 40, 3)), [20, 12, 40]
    compressor = VASparse(retention=0.3, aggregate="sum")
    look = Cut(Stage.LAYER, 2, attends=True, drops=False)
    one = prompt(rows, counts, seed=1, attends=True, cut=look)
    with pytest.raises(CompressionError, match="has not run"):
        compressor.score(replace(one.seen, cut=replace(CUT, looks_at=None)))
    compressor.look(one.seen)
    seen = replace(one.seen, cut=Cut(Stage.LAYER, 3, number=1))
    _, selection = choose(compressor, seen)
    merged = compressor.merge(selection, seen)
    assert merged is not None
    for image, total in enumerate(counts):
        valid = int(seen.valid[image].sum())
        kept = selection.kept[image]
        assert int(kept.sum()) == chosen(valid, total)
        here = merged.valid[image]
        assert int(here.sum()) == total
        # Every token is in exactly one cluster, so that the sums add up to all that was dropped.
        extra = merged.features[image][here & ~merged.dominant[image]].sum(0)
        dropped = seen.features[image][seen.valid[image] & ~kept].sum(0)
        assert torch.allclose(extra, dropped)
        assert torch.equal(
            merged.features[image][merged.dominant[image]], seen.features[image][kept]
        )


def test_an_image_alone_scores_as_in_the_batch() -> None:
    compressor = VASparse(retention=0.5)
    batch = prompt(ROWS, 3, seed=3, attends=True, cut=CUT)
    alone = prompt(ROWS[:1], 3, seed=3, attends=True, cut=CUT)
    together = compressor.score(batch.seen).score[0, :9]
    assert torch.allclose(together, compressor.score(alone.seen).score[0])


@pytest.mark.parametrize("space", ["prob", "logit"])
def test_the_score_has_the_gradient_of_finite_differences(space: str) -> None:
    one = prompt(ROWS, 3, dead=DEAD, attends=True, cut=CUT)
    compressor = VASparse(retention=0.5, score_space=space)  # type: ignore[arg-type]
    weight = normal(4, 12, seed=8) * one.seen.valid
    assert one.seen.attention is not None
    assert one.seen.keys is not None

    def total(hidden: Tensor, attention: Tensor, keys: Tensor) -> Tensor:
        text = replace(one.text, hidden=hidden)
        seen = replace(one.seen, text=text, attention=attention, keys=keys)
        return (compressor.score(seen).score * weight).sum()

    start = [one.text.hidden, one.seen.attention, one.seen.keys]
    leaves = [value.clone().requires_grad_() for value in start]
    gradients = torch.autograd.grad(total(*leaves), leaves, allow_unused=True)
    for index, gradient in enumerate(gradients):
        if gradient is None:
            continue
        assert bool(gradient.isfinite().all())
        step = normal(*start[index].shape, seed=index)
        if index == 0:
            step = step * torch.zeros(1, 18, 1).index_fill(1, torch.tensor([6, 12]), 1.0)
        ends = [
            total(*[v + sign * 1e-6 * step if i == index else v for i, v in enumerate(start)])
            for sign in (1, -1)
        ]
        slope = float(ends[0] - ends[1]) / 2e-6
        assert slope == pytest.approx(float((gradient * step).sum()), rel=1e-4, abs=1e-8)
