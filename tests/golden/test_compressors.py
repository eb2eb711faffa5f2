"""Each selector against a slow reference written from its description, and hand-made examples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from seen import seen as saw
from seen import seen_by_tower, vision_pass
from torch import Tensor

from targets.compression import DivPrune, FastV, Random, Selection, Uniform, VisionZip
from targets.compression.base import Seen
from targets.compression.layout import columns_kept, find_slots, reindexed
from targets.compression.scoring import (
    attention_row,
    received_attention,
    standardised,
    standardised_log,
    top_k_mask,
)
from targets.compression.trace import choose
from targets.errors import CompressionError
from targets.families.vision import VisionPass
from targets.preprocessing.layout import Layout

SEEDS = range(6)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attended(seed: int, images: int = 2, heads: int = 3, tokens: int = 20) -> Tensor:
    return (normal(images, heads, tokens, seed=seed) * 2).softmax(-1)


# Slow references: lists and loops, one image at a time


def best(score: list[float], count: int) -> set[int]:
    return set(sorted(range(len(score)), key=lambda i: (-score[i], i))[:count])


def slow_fastv(attention: Tensor, count: int) -> set[int]:
    heads, tokens = attention.shape
    mean = [sum(float(attention[h, i]) for h in range(heads)) / heads for i in range(tokens)]
    return best(mean, count)


def slow_divprune(features: Tensor, count: int) -> list[int]:
    def distance(i: int, j: int) -> float:
        a, b = features[i].double(), features[j].double()
        return 1 - float(a @ b / (a.norm() * b.norm()))

    tokens = range(len(features))
    first = max(tokens, key=lambda i: min(distance(i, j) for j in tokens if j != i))
    chosen = [first]
    while len(chosen) < count:
        left = [i for i in tokens if i not in chosen]
        chosen.append(max(left, key=lambda i: min(distance(i, j) for j in chosen)))
    return chosen


def slow_visionzip(
    hidden: Tensor, attention: Tensor, keys: Tensor, total: int
) -> tuple[set[int], list[Tensor]]:
    """Dominant set and the tokens [CLS, dominant, contextual] of one image with CLS."""
    heads, tokens = attention.shape
    contextual = round(total / 6.4)
    summed = [sum(float(attention[h, i]) for h in range(heads)) for i in range(tokens)]
    dominant = best(summed, total - contextual - 1)
    rest = [i for i in range(tokens) if i not in dominant]
    targets = [rest[k * (len(rest) // contextual)] for k in range(contextual)]
    metric = keys.mean(0)
    groups: dict[int, list[int]] = {t: [] for t in targets}
    for i in rest:
        if i not in groups:
            cosine = [float(torch.cosine_similarity(metric[i], metric[t], dim=0)) for t in targets]
            groups[targets[cosine.index(max(cosine))]].append(i)
    out = [hidden[0], *(hidden[1 + i] for i in sorted(dominant))]
    for target in targets:
        joined = [hidden[1 + i] for i in groups[target]]
        mean = torch.stack(joined).mean(0) if joined else torch.zeros_like(hidden[0])
        out.append(hidden[1 + target] + mean)
    return dominant, out


def indices(kept: Tensor) -> set[int]:
    return set(kept.nonzero().flatten().tolist())


# Selectors


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [1, 5, 19])
def test_fastv(seed: int, count: int) -> None:
    attention = attended(seed)
    seen = saw(normal(2, 20, 4), count, attention=attention)
    _, selection = choose(FastV(keep_tokens=count), seen)
    for image in range(2):
        assert indices(selection.kept[image]) == slow_fastv(attention[image], count)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [1, 2, 7, 31])
def test_divprune(seed: int, count: int) -> None:
    features = normal(3, 32, 5, seed=seed)
    scores, selection = choose(DivPrune(keep_tokens=count), saw(features, count))
    for image in range(3):
        order = slow_divprune(features[image], count)
        assert indices(selection.kept[image]) == set(order)
        score = scores.score[image]
        if count > 1:  # for one token the farthest ties with it
            assert best(score.tolist(), count) == set(order)
        unit = features[image] / features[image].norm(dim=1, keepdim=True)
        distance = 1 - unit @ unit.T
        for place, token in enumerate(order):
            to = distance[token]
            truth = to.max() if place == 0 else min(to[j] for j in order[:place])
            assert float(score[token]) == pytest.approx(float(truth), abs=1e-5)
        for token in set(range(32)) - set(order):
            truth = min(distance[token, j] for j in order)
            assert float(score[token]) == pytest.approx(float(truth), abs=1e-5)


def test_divprune_never_takes_a_token_twice() -> None:
    """Coinciding tokens leave nothing but zero distances."""
    features = torch.ones(1, 8, 3)
    features[0, 5] = torch.tensor([1.0, -1.0, 0.0])
    _, selection = choose(DivPrune(keep_tokens=6), saw(features, 6))
    assert int(selection.kept.sum()) == 6
    assert bool(selection.kept[0, 5])


def zip_inputs(seed: int, tokens: int = 30, heads: int = 3) -> tuple[Seen, VisionPass]:
    queries, keys = (normal(2, heads, tokens + 1, 6, seed=seed + i) for i in (1, 2))
    hidden = normal(2, tokens + 1, 8, seed=seed)
    vision = vision_pass(hidden, queries, keys)
    seen = seen_by_tower(vision, 16)
    return seen, vision


@pytest.mark.parametrize("seed", SEEDS)
def test_visionzip(seed: int) -> None:
    compressor = VisionZip(keep_tokens=16)
    seen, vision = zip_inputs(10 * seed)
    _, selection = choose(compressor, seen)
    merged = compressor.merge(selection, seen)
    hidden = vision.layers[0].hidden
    for image in range(2):
        attention = vision.attention()[image]
        keys = vision.patch_keys[image]
        dominant, tokens = slow_visionzip(hidden[image], attention, keys, 16)
        assert indices(selection.kept[image]) == dominant
        assert bool(merged.valid[image].all())
        assert torch.allclose(merged.features[image], torch.stack(tokens), atol=1e-5)
        places = sorted(dominant)
        assert merged.source[image].tolist()[: 1 + len(places)] == [0, *places]
        assert merged.dominant[image].tolist() == [False] + [True] * 13 + [False] * 2


def test_visionzip_by_hand() -> None:
    """Six patches, keep 4 tokens: CLS, two patches, and one contextual token."""
    hidden = torch.arange(7.0)[None, :, None].repeat(1, 1, 2)  # CLS is 0, patch i is i + 1
    keys = torch.zeros(1, 1, 7, 2)
    keys[0, 0, 1:] = torch.tensor([[1, 0], [9, 0], [0, 1], [8, 0], [1, 1], [0, 2]]).float()
    queries = torch.zeros(1, 1, 7, 2)
    queries[0, 0, 0] = torch.tensor([1.0, 0.0])
    seen = seen_by_tower(vision_pass(hidden, queries, keys, scaling=1.0), 4)
    compressor = VisionZip(keep_tokens=4)
    _, selection = choose(compressor, seen)
    assert indices(selection.kept[0]) == {1, 3}
    assert selection.targets is not None
    assert selection.assignment is not None
    assert selection.targets.tolist() == [[0]]
    assert selection.assignment.tolist() == [[-1, -1, 0, -1, 0, 0]]
    merged = compressor.merge(selection, seen)
    # Target patch 0 (value 1) plus the mean of patches 2, 4, 5 (values 3, 5, 6).
    assert merged.features[0, :, 0].tolist() == pytest.approx([0, 2, 4, 1 + 14 / 3])
    assert merged.source.tolist() == [[0, 1, 3, 0]]


@pytest.mark.parametrize(
    ("total", "patches", "contextual"),
    [(64, 53, 10), (32, 26, 5), (128, 107, 20), (192, 161, 30), (36, 29, 6)],
)
def test_visionzip_splits_like_the_published_settings(
    total: int, patches: int, contextual: int
) -> None:
    assert VisionZip(keep_tokens=total).split(total, has_cls=True) == (patches, contextual)
    assert VisionZip(keep_tokens=total).split(total, has_cls=False) == (patches + 1, contextual)
    with pytest.raises(CompressionError, match="leave no patch"):
        VisionZip(keep_tokens=4, contextual_tokens=3).split(4, has_cls=True)


def test_visionzip_takes_a_forced_assignment() -> None:
    seen, _ = zip_inputs(0)
    other, vision = zip_inputs(70)
    compressor = VisionZip(keep_tokens=16)
    _, first = choose(compressor, seen)
    _, forced = choose(compressor, other, first)
    assert torch.equal(forced.kept, first.kept)
    assert torch.equal(forced.assignment, first.assignment)
    _, dominant_only = choose(compressor, other, first.kept)
    assert torch.equal(dominant_only.kept, first.kept)
    assert not torch.equal(dominant_only.assignment, first.assignment)
    merged = compressor.merge(first, other)
    targets = first.targets
    for image in range(2):
        members = (first.assignment[image] == 0).nonzero().flatten()
        mean = vision.patches[image, members].mean(0)
        truth = vision.patches[image, targets[image, 0]] + mean
        assert torch.allclose(merged.features[image, 14], truth, atol=1e-5)


@pytest.mark.parametrize("count", [1, 4, 9, 20])
def test_uniform(count: int) -> None:
    _, selection = choose(Uniform(keep_tokens=count), saw(normal(2, 20, 3), count))
    truth = {math.floor((i + 0.5) * 20 / count) for i in range(count)}
    assert len(truth) == count
    assert indices(selection.kept[0]) == indices(selection.kept[1]) == truth


def test_random_is_seeded_uniform_and_blind() -> None:
    compressor = Random(keep_tokens=5)
    seen = saw(normal(400, 20, 3), 5, seeds=range(400))
    _, selection = choose(compressor, seen)
    assert selection.kept.sum(1).tolist() == [5] * 400
    share = selection.kept.float().mean(0)
    assert float((share - 0.25).abs().max()) < 4 * (0.25 * 0.75 / 400) ** 0.5
    _, again = choose(compressor, saw(normal(400, 20, 3, seed=1), 5, seeds=range(400)))
    assert torch.equal(selection.kept, again.kept)
    _, shifted = choose(Random(keep_tokens=5, seed=1), seen)
    assert torch.equal(shifted.kept[:-1], selection.kept[1:])


# Budgets and options


ALL: list[Any] = [FastV, VisionZip, DivPrune, Random, Uniform]


@pytest.mark.parametrize("kind", ALL)
def test_budgets(kind: Any) -> None:
    assert kind(retention=0.25).budget(144) == 36
    assert kind(retention=1.0).budget(144) == 144
    assert kind(retention=0.001).budget(144) == 1
    assert kind(keep_tokens=7).budget(144) == 7
    for options in (
        {},
        {"retention": 0.5, "keep_tokens": 3},
        {"retention": 0.0},
        {"retention": 1.5},
        {"keep_tokens": 0},
    ):
        with pytest.raises(CompressionError, match=kind.name):
            kind(**options)
    assert kind(keep_tokens=6).budget(5) == 5  # of a small image all


def test_fastv_needs_a_layer_to_look_at() -> None:
    with pytest.raises(CompressionError, match="layer is 0"):
        FastV(layer=0, retention=0.5)


@pytest.mark.parametrize("kind", ALL)
def test_provenance_is_the_repr(kind: Any) -> None:
    one = kind(retention=0.25)
    assert eval(repr(one), {kind.__name__: kind}) == one  # noqa: S307 - our own repr
    assert hash(one) == hash(kind(retention=0.25))


# Pieces


def test_attention_row_against_a_matrix() -> None:
    query, keys = normal(2, 3, 4), normal(2, 3, 9, 4, seed=1)
    visible = torch.ones(2, 9, dtype=torch.bool)
    visible[1, :4] = False
    row = attention_row(query, keys, 0.5, visible=visible, softcap=2.0)
    for b in range(2):
        for h in range(3):
            logits = [float(query[b, h] @ keys[b, h, j]) * 0.5 for j in range(9)]
            weights = [
                math.exp(2 * math.tanh(x / 2)) * bool(visible[b, j]) for j, x in enumerate(logits)
            ]
            truth = [w / sum(weights) for w in weights]
            assert row[b, h].tolist() == pytest.approx(truth, abs=1e-6)


def test_received_attention_does_not_depend_on_the_chunk() -> None:
    queries, keys = normal(2, 3, 17, 4), normal(2, 3, 17, 4, seed=1)
    full = (queries @ keys.transpose(2, 3) * 0.5).softmax(-1).mean(2)
    for chunk in (1, 5, 17, 100):
        assert torch.allclose(received_attention(queries, keys, 0.5, chunk), full, atol=1e-6)


def test_top_k_prefers_the_first_of_equals() -> None:
    score = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    assert top_k_mask(score, 2).tolist() == [[False, True, True, False, False]]
    assert int(top_k_mask(score, 0).sum()) == 0


def test_standardising_survives_constant_rows() -> None:
    score = torch.tensor([[3.0, 3.0, 3.0], [1.0, 2.0, 3.0]]).requires_grad_()
    out = standardised(score)
    assert torch.allclose(out[1], torch.tensor([-1.0, 0.0, 1.0]) * 1.5**0.5, atol=1e-5)
    (gradient,) = torch.autograd.grad((out * torch.randn(2, 3)).sum(), score)
    assert bool(gradient.isfinite().all())
    assert float(out.detach()[0].abs().max()) == 0


def test_the_standardised_logarithm_shows_what_large_values_hide() -> None:
    score = torch.tensor([[4.0, 1e-3, 1e-4, 7.0, 0.0]]).requires_grad_()
    valid = torch.tensor([[True, True, True, False, True]])
    out = standardised_log(score, valid)
    logs = [math.log(one + 1e-6) for one in (4.0, 1e-3, 1e-4, 0.0)]
    mean = sum(logs) / 4
    deviation = math.sqrt(sum((one - mean) ** 2 for one in logs) / 4)
    wanted = [(one - mean) / deviation for one in logs]
    assert out[0, [0, 1, 2, 4]].tolist() == pytest.approx(wanted, rel=1e-5)
    assert float(out.detach()[0, 3]) == 0
    (gradient,) = torch.autograd.grad(out.square().sum(), score)
    assert bool(gradient.isfinite().all())
    plain = standardised(score, valid).detach()
    assert (
        float(plain[0, 1] - plain[0, 2])
        < 1e-3
        < 0.3
        < float(out.detach()[0, 1] - out.detach()[0, 2])
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_divprune_gives_ranking_losses_the_logarithm_of_its_distances(seed: int) -> None:
    what = saw(normal(2, 12, 5, seed=seed), 4)
    scores = DivPrune(keep_tokens=4).score(what)
    logs = (scores.score.double() + 1e-6).log()
    wanted = (logs - logs.mean(1, keepdim=True)) / logs.std(1, keepdim=True, correction=0)
    assert torch.allclose(scores.log_score.double(), wanted, atol=1e-4)
    # Pushing a token over the last one chosen is what gets it chosen.
    assert scores.chosen is not None
    last = scores.log_score.masked_fill(~scores.chosen, torch.inf).amin(1, keepdim=True)
    assert bool(((scores.log_score >= last) == scores.chosen).all())


def test_columns_stay_in_order_and_the_last_stays_last() -> None:
    keep = torch.tensor([[1, 0, 1, 0, 1], [1, 0, 0, 0, 1]]).bool()
    index = columns_kept(keep)
    assert index is not None
    assert index[0].tolist() == [0, 2, 4]
    assert index[1, 1:].tolist() == [0, 4]
    assert not bool(keep[1, index[1, 0]])
    assert columns_kept(torch.ones(2, 5, dtype=torch.bool)) is None


def test_reindexing_closes_gaps_and_counts_them() -> None:
    positions = torch.tensor([[0, 0, 1, 5, 6, 9], [3, 4, 5, 6, 7, 8]])
    live = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 0, 0, 1, 1, 0]]).bool()
    fresh, shift = reindexed(positions, live)
    assert fresh[0].tolist() == [0, 0, 1, 2, 3, 4]
    assert fresh[1][live[1]].tolist() == [3, 4, 5]
    assert shift.tolist() == [5, 2]


def test_slots_count_images_in_reading_order() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    slots = find_slots(mask, [Layout.grid((1, 2))] * 3)
    assert slots is not None
    assert slots.rows.tolist() == [0, 0, 1]
    assert slots.columns.tolist() == [[1, 2], [4, 5], [0, 1]]
    assert slots.ordinals() == (0, 1, 0)
    assert find_slots(mask[2:], []) is None
    with pytest.raises(CompressionError, match=r"\[4, 2, 0\]"):
        find_slots(mask, [Layout.grid((1, 4))])


def test_selections_stack_and_split() -> None:
    kept = torch.tensor([[True, False], [False, True]])
    both = Selection(kept, torch.tensor([[1], [0]]), torch.tensor([[-1, -1], [-1, -1]]))
    again = Selection.stack([both.row(0), both.row(1)])
    assert torch.equal(again.kept, kept)
    assert torch.equal(again.targets, both.targets)
    with pytest.raises(CompressionError, match="cannot be stacked"):
        Selection.stack([both.row(0), Selection(kept[1:])])
