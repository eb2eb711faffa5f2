"""VisionDrop against loops: image rows rate, evenly spaced targets collect."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from seen import seen_by_tower, vision_pass
from sight import Prompt, normal, prompt
from torch import Tensor

from targets.compression.aggregation import evenly
from targets.compression.base import Cut, Stage
from targets.compression.trace import choose
from targets.compression.visiondrop import VisionDrop
from targets.errors import CompressionError

CUT = Cut(Stage.LAYER, 8, number=1)
ONE = VisionDrop(retention=0.1)
ROWS = ((2, 30, 4), (1, 25, 2, 21, 3), (3, 36))
DEAD = (*[(0, p) for p in range(0, 9, 2)], (2, 20), (3, 0))
COUNTS = [14, 7, 13, 1]


def image_columns(one: Prompt, image: int) -> list[int]:
    row = int(one.seen.rows[image])
    return [c for i, cs in enumerate(one.columns) if int(one.seen.rows[i]) == row for c in cs]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("dead", [(), DEAD])
def test_score_is_what_image_rows_pay(seed: int, dead: tuple[tuple[int, int], ...]) -> None:
    one = prompt(ROWS, COUNTS, seed=seed, dead=dead, cut=CUT, answers=2, heads=2)
    scores, _ = choose(ONE, one.seen)
    for image in range(4):
        truth = one.mean_paid(image, image_columns(one, image))
        assert scores.score[image][one.seen.valid[image]].tolist() == pytest.approx(truth, abs=1e-9)


def test_chunks_of_rows_change_nothing() -> None:
    """More image rows than are worked on at a time."""
    one = prompt(((2, 300, 3),), 9, cut=CUT, heads=2)
    rows = torch.zeros_like(one.text.live)
    rows[0, one.columns[0]] = True
    whole = one.text.attention(rows, chunk=10_000).mean(1)
    assert torch.allclose(ONE.score(one.seen).score, whole)
    assert torch.allclose(one.text.attention(rows, chunk=7).mean(1), whole)


def slow_groups(
    keys: Tensor, rest: list[int], number: int
) -> tuple[list[int], dict[int, list[int]]]:
    step = len(rest) // number
    targets = [rest[i * step] for i in range(number)]
    joined: dict[int, list[int]] = {t: [] for t in targets}
    for i in rest:
        if i not in joined:
            near = [float(torch.cosine_similarity(keys[i], keys[t], dim=0)) for t in targets]
            joined[targets[near.index(max(near))]].append(i)
    return targets, joined


def test_evenly_spaced_targets_collect_the_most_alike() -> None:
    keys = normal(4, 20, 5, seed=1).float()
    rest = normal(4, 20, seed=2) > torch.tensor([[0.0], [-9.0], [0.5], [9.0]])
    number = torch.tensor([3, 5, 1, 0])
    found = evenly(keys.masked_fill(~rest[..., None], torch.nan), rest, number)
    for image in range(3):
        places = rest[image].nonzero().flatten().tolist()
        targets, joined = slow_groups(keys[image], places, int(number[image]))
        assert found.targets[image].tolist() == targets + [-1] * (5 - len(targets))
        for entry, target in enumerate(targets):
            members = (found.assignment[image] == entry).nonzero().flatten().tolist()
            assert members == joined[target]
    assert found.targets[3].tolist() == [-1] * 5
    assert bool((found.assignment[3] == -1).all())
    none = evenly(keys, rest, torch.zeros(4, dtype=torch.long))
    assert none.targets.shape == (4, 0)
    assert bool((none.assignment == -1).all())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_stages_in_the_language_model(stage: int) -> None:
    cut = replace(CUT, layer=(8, 16, 24)[stage], number=stage + 1)
    one = prompt(ROWS, COUNTS, seed=stage, dead=DEAD, cut=cut)
    scores, selection = choose(ONE, one.seen)
    merged = ONE.merge(selection, one.seen)
    assert merged is not None
    keys = one.text.keys().mean(1)
    share = ((5, 35), (4, 26), (3, 19))[stage]
    for image, total in enumerate(COUNTS):
        contextual = min(int(total * share[0] / share[1] + 0.5), total - 1)
        valid = one.seen.valid[image].nonzero().flatten().tolist()
        ranked = sorted(valid, key=lambda i: -float(scores.score[image, i]))
        dominant = sorted(ranked[: total - contextual])
        rest = [i for i in valid if i not in dominant]
        features = one.seen.features[image]
        truth = [features[i] for i in dominant]
        targets: list[int] = []
        if contextual:
            targets, joined = slow_groups(keys[image], rest, contextual)
            for target in targets:
                members = [features[i] for i in joined[target]]
                mean = torch.stack(members).mean(0) if members else torch.zeros(10)
                truth.append(features[target] + mean)
        here = merged.valid[image]
        assert int(here.sum()) == total
        assert torch.allclose(merged.features[image][here], torch.stack(truth))
        assert merged.source[image][here].tolist() == dominant + targets
        assert int(merged.dominant[image].sum()) == len(dominant)


def test_published_counts_split_as_published() -> None:
    for number, (total, dominant) in enumerate(((35, 30), (26, 22), (19, 16)), 1):
        cut = replace(CUT, layer=8 * number, number=number)
        one = prompt(((1, 48, 2),), total, cut=cut)
        _, selection = choose(ONE, one.seen)
        assert int(selection.kept.sum()) == dominant
        assert selection.targets is not None
        assert int((selection.targets >= 0).sum()) == total - dominant


def test_images_within_their_budget_stay_as_they_are() -> None:
    one = prompt(ROWS, [30, 25, 9, 36], cut=CUT)
    _, selection = choose(ONE, one.seen)
    merged = ONE.merge(selection, one.seen)
    assert merged is not None
    for image in (0, 1, 3):
        assert torch.equal(selection.kept[image], one.seen.valid[image])
        here = merged.valid[image]
        assert torch.equal(
            merged.features[image][here], one.seen.features[image][one.seen.valid[image]]
        )


def test_a_forced_set_gets_groups_of_its_own() -> None:
    one = prompt(ROWS, [14, 7, 20, 9], cut=CUT)
    kept = torch.zeros_like(one.seen.valid)
    kept[:, 1:13] = True
    _, selection = choose(ONE, one.seen, kept)
    assert torch.equal(selection.kept, kept)
    assert selection.targets is not None
    assert (selection.targets >= 0).sum(1).tolist() == [2, 0, 3, 0]  # within each budget


def test_an_image_alone_is_treated_as_in_the_batch() -> None:
    results = []
    for rows, counts in ((ROWS, COUNTS), (ROWS[:1], COUNTS[:1])):
        one = prompt(rows, counts, seed=6, cut=CUT)
        _, selection = choose(ONE, one.seen)
        merged = ONE.merge(selection, one.seen)
        assert merged is not None
        results.append(merged.features[0][merged.valid[0]])
    assert torch.allclose(*results)


# At the tower


def tower(total: int, tokens: int = 64) -> tuple[int, int]:
    """Dominant patches and merged tokens of 64 patches and CLS."""
    hidden, queries = normal(2, tokens + 1, 8), normal(2, 3, tokens + 1, 4, seed=1)
    vision = vision_pass(hidden, queries, normal(2, 3, tokens + 1, 4, seed=2))
    seen = seen_by_tower(vision, total, cut=Cut(Stage.VISION, attends=True))
    scores, selection = choose(ONE, seen)
    assert torch.allclose(scores.score, vision.attention().sum(1))
    merged = ONE.merge(selection, seen)
    assert merged is not None
    assert merged.valid.sum(1).tolist() == [total] * 2
    assert selection.targets is not None
    return int(selection.kept[0].sum()), int((selection.targets[0] >= 0).sum())


def test_the_tower_keeps_cls_among_the_dominant() -> None:
    assert tower(48) == (41, 6)  # published 42 + 6, CLS being one of the 42
    assert tower(3) == (2, 0)
    assert tower(2) == (1, 0)
    with pytest.raises(CompressionError, match="visiondrop: 1 tokens leave no patch"):
        tower(1)


def test_the_score_has_the_gradient_of_finite_differences() -> None:
    one = prompt(ROWS, COUNTS, dead=DEAD, cut=CUT, heads=2)
    weight = normal(4, 36, seed=8) * one.seen.valid

    def total(hidden: Tensor) -> Tensor:
        text = replace(one.text, hidden=hidden)
        return (ONE.score(replace(one.seen, text=text)).score * weight).sum()

    hidden = one.text.hidden.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(hidden), hidden)
    assert bool(gradient.isfinite().all())
    step = torch.zeros_like(hidden)
    step[1, 12] = normal(10)
    slope = (total(one.text.hidden + 1e-5 * step) - total(one.text.hidden - 1e-5 * step)) / 2e-5
    assert float(slope) == pytest.approx(float((gradient * step).sum()), rel=1e-4, abs=1e-9)
