"""SparseVLM against loops: raters, corrected attention, rank, and density peaks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from sight import DIM, HEADS, ROWS, WIDTH, Prompt, normal, prompt
from torch import Tensor

from targets.compression.aggregation import density_peaks
from targets.compression.base import Cut, Stage
from targets.compression.raters import raters
from targets.compression.sparsevlm import SparseVLM, clusters, gravity
from targets.compression.trace import choose
from targets.errors import CompressionError

LOOK = Cut(Stage.LAYER, 2, drops=False)
CUT = Cut(Stage.LAYER, 3, number=1)
DEAD = ((0, 0), (1, 2), (1, 4), (3, 11))
PLUS = SparseVLM(retention=0.5, variant="v2.0")


def slow_raters(one: Prompt, row: int) -> list[int]:
    """Text columns above the mean of the averaged softmax."""
    words, embeds = one.words(row), one.text.embeds[row]
    if not words:
        return [one.text.last]
    images = [i for i in range(len(one.columns)) if int(one.seen.rows[i]) == row]
    tokens = [c for i in images for c in one.columns[i]]
    mean = dict.fromkeys(words, 0.0)
    for token in tokens:
        weights = {w: float(embeds[token] @ embeds[w]) for w in words}
        top = max(weights.values())
        total = sum(math.exp(x - top) for x in weights.values())
        for word, x in weights.items():
            mean[word] += math.exp(x - top) / total / len(tokens)
    bar = sum(mean.values()) / len(mean)
    return [w for w in words if mean[w] > bar] or words


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dead", [(), DEAD])
def test_raters(seed: int, dead: tuple[tuple[int, int], ...]) -> None:
    one = prompt(ROWS, 2, seed=seed, dead=dead, answers=2)
    found = raters(one.seen)
    for row in range(3):
        assert found[row].nonzero().flatten().tolist() == slow_raters(one, row)


def test_equal_words_all_rate() -> None:
    one = prompt(((1, 4, 3),), 2)
    same = one.text.embeds.clone()
    same[0, -3:] = same[0, -1]
    text = replace(one.text, embeds=same)
    assert raters(replace(one.seen, text=text))[0, -3:].all()


def test_without_text_behind_the_image_the_last_column_rates() -> None:
    one = prompt(((3, 5),), 2)
    assert raters(one.seen).nonzero().tolist() == [[0, 7]]


def test_raters_are_chosen_once_and_follow_their_columns() -> None:
    one = prompt(ROWS, 2, seed=1)
    first = raters(one.seen)
    # Later some columns are gone and hidden states are others; only the memory is the same.
    later = prompt(ROWS, 2, seed=9, dead=DEAD)
    index = torch.stack([torch.cat([row[:5], row[6:]]) for row in torch.arange(18).expand(3, -1)])
    text = replace(
        later.text,
        words=later.text.words.gather(1, index),
        live=later.text.live.gather(1, index),
        embeds=later.text.embeds[:, :17],
        last=later.text.last - 1,
    )
    again = raters(replace(later.seen, text=text, memory=one.seen.memory))
    assert torch.equal(again, first.gather(1, index))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dead", [(), DEAD])
def test_score_is_what_the_raters_pay(seed: int, dead: tuple[tuple[int, int], ...]) -> None:
    one = prompt(ROWS, 2, seed=seed, dead=dead, cut=LOOK)
    compressor = SparseVLM(retention=0.5)
    compressor.look(one.seen)
    scores, _ = choose(compressor, replace(one.seen, cut=CUT))
    for image in range(4):
        truth = one.mean_paid(image, slow_raters(one, int(one.seen.rows[image])))
        assert scores.score[image][one.seen.valid[image]].tolist() == pytest.approx(truth, abs=1e-9)


def slow_gravity(one: Prompt, row: int, query: int, key: int) -> float:
    """Vectors of ones, rotated by the position of each column."""
    live = one.text.live[row].long()
    apart = int(live[: query + 1].sum()) - int(live[: key + 1].sum())
    angles = [rate * apart for rate in (1.0, 0.3, 0.05)]
    found = sum(2 * math.cos(angle) for angle in angles) / WIDTH**0.5
    return found if abs(found) >= 1e-3 else math.copysign(1e-3, found)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_v2_divides_by_gravity_and_takes_the_best_heads(seed: int, heads: int) -> None:
    one = prompt(ROWS, 2, seed=seed, dead=DEAD, cut=CUT)
    scores = replace(PLUS, heads=heads).score(one.seen)
    for image in range(4):
        row = int(one.seen.rows[image])
        by = slow_raters(one, row)
        table = [
            [
                sum(
                    one.attention(row, head, r).get(c, 0.0) / slow_gravity(one, row, r, c)
                    for r in by
                )
                / len(by)
                for c in one.columns[image]
            ]
            for head in range(HEADS)
        ]
        best = sorted(range(HEADS), key=lambda h: -sum(table[h]))[:heads]
        truth = [sum(table[h][i] for h in best) / heads for i in range(len(table[0]))]
        found = scores.score[image][one.seen.valid[image]]
        assert found.tolist() == pytest.approx(truth, abs=1e-9)


def test_gravity_is_one_sided_and_never_zero() -> None:
    one = prompt(((40, 5, 30),), 2)
    columns = torch.arange(75)[None]
    found = gravity(one.text, columns)
    assert float(found.abs().min()) >= 1e-3
    assert torch.allclose(found[0, 7, 7], torch.tensor(6 / WIDTH**0.5, dtype=found.dtype))
    assert bool((found < 0).any())  # which is why the floor keeps the sign


@pytest.mark.parametrize(
    ("options", "number", "count"),
    [({}, 32, 14), ({}, 28, 14), ({}, 40, 14), ({}, 4, 2), ({}, 1, 1), ({"heads": 9}, 4, 4),
     ({"head_share": 0.5}, 28, 14), ({"head_share": 0.1}, 4, 1)],
)  # fmt: skip
def test_heads_that_count(options: dict[str, float], number: int, count: int) -> None:
    one = replace(PLUS, **options)  # type: ignore[arg-type]
    assert one._heads(number) == count


def test_heads_are_named_once() -> None:
    with pytest.raises(CompressionError, match="not both"):
        replace(PLUS, heads=3, head_share=0.5)


# Rank


@pytest.mark.parametrize("seed", range(3))
def test_rank_limits_the_choice(seed: int) -> None:
    one = prompt(ROWS, [9, 5, 7, 12], seed=seed, cut=CUT)
    compressor = SparseVLM(retention=1.0, variant="rank", rank_scale=1.7, recycling=False)
    scores, selection = choose(compressor, one.seen)
    for image in range(4):
        row = int(one.seen.rows[image])
        by = slow_raters(one, row)
        matrix = torch.tensor([one.mean_paid(image, [r]) for r in by])
        wanted = min(int(torch.linalg.matrix_rank(matrix)) * 1.7, len(one.columns[image]))
        kept = selection.kept[image]
        assert int(kept.sum()) == max(1, int(wanted))
        dropped = one.seen.valid[image] & ~kept
        if bool(dropped.any()):
            score = scores.score[image]
            assert float(score[kept].min()) >= float(score[dropped].max())


def test_rank_has_no_more_than_its_budget() -> None:
    one = prompt(ROWS, [3, 2, 2, 4], cut=CUT)
    compressor = SparseVLM(retention=0.3, variant="rank", recycling=False)
    _, selection = choose(compressor, one.seen)
    assert selection.kept.sum(1).tolist() == [3, 2, 2, 4]


# Recycling


def slow_peaks(
    tokens: Tensor, number: int, order: list[int]
) -> tuple[list[int], dict[int, list[int]]]:
    """Centres by density peaks, best first, and the members of each; `order` breaks ties."""

    def apart(i: int, j: int) -> float:
        return float((tokens[i] - tokens[j]).norm()) / tokens.shape[1] ** 0.5

    density = {}
    for i in order:
        near = sorted(apart(i, j) for j in order)[:number]
        density[i] = math.exp(-sum(d * d for d in near) / number)
    farthest = max(apart(i, j) for i in order for j in order)
    peak = {}
    for n, i in enumerate(order):
        denser = [j for m, j in enumerate(order) if (density[j], n) > (density[i], m)]
        peak[i] = density[i] * min((apart(i, j) for j in denser), default=farthest)
    centres = sorted(order, key=lambda i: -peak[i])[:number]
    members: dict[int, list[int]] = {c: [c] for c in centres}
    for i in order:
        if i not in members:
            members[min(centres, key=lambda c: apart(i, c))].append(i)
    return centres, members


def test_density_peaks() -> None:
    features = normal(3, 20, 4, seed=3)
    score = normal(3, 20, seed=4)
    pool = normal(3, 20, seed=5) > torch.tensor([[-0.5], [0.3], [-9.0]])
    number = torch.tensor([3, 1, 5])
    found = density_peaks(features, pool, number, score)
    for image in range(3):
        order = sorted(pool[image].nonzero().flatten().tolist(), key=lambda i: -score[image, i])
        centres, members = slow_peaks(features[image], int(number[image]), order)
        assert found.targets[image].tolist() == centres + [-1] * (5 - len(centres))
        for entry, centre in enumerate(centres):
            joined = (found.assignment[image] == entry).nonzero().flatten().tolist()
            assert sorted([centre, *joined]) == sorted(members[centre])
        outside = ~pool[image]
        assert bool((found.assignment[image][outside] == -1).all())


def test_density_peaks_of_one_point_and_of_none() -> None:
    """All tokens coincide: the one with the largest score is the first peak."""
    features, score = torch.ones(2, 6, 3), torch.tensor([[1.0, 5, 3, 2, 4, 0]] * 2)
    pool = torch.tensor([[True] * 6, [False] * 6])
    found = density_peaks(features, pool, torch.tensor([2, 0]), score)
    assert found.targets[0, 0] == 1
    assert len(set(found.targets[0].tolist())) == 2
    joined = found.assignment[0][found.assignment[0] >= 0]
    assert joined.tolist() == [0, 0, 0, 0]
    assert found.targets[1].tolist() == [-1, -1]
    assert bool((found.assignment[1] == -1).all())


LONG = ((2, 60, 5), (1, 35, 2, 40, 3), (3, 64, 1))
TOTALS = [20, 12, 33, 2]


@pytest.mark.parametrize("seed", range(2))
def test_recycled_tokens_are_the_means_of_clusters(seed: int) -> None:
    dead = (*[(0, p) for p in range(0, 20, 3)], (3, 5), (3, 63))
    one = prompt(LONG, TOTALS, seed=seed, dead=dead, cut=LOOK)
    compressor = SparseVLM(retention=0.5)
    compressor.look(one.seen)
    seen = replace(one.seen, cut=CUT)
    scores, selection = choose(compressor, seen)
    merged = compressor.merge(selection, seen)
    assert merged is not None
    for image in range(4):
        valid = seen.valid[image].nonzero().flatten().tolist()
        score = scores.score[image]
        ranked = sorted(valid, key=lambda i: (-float(score[i]), i))
        fits = [
            k for k in range(1, len(valid) + 1) if k + clusters(len(valid) - k) <= TOTALS[image]
        ]
        kept, dropped = sorted(ranked[: max(fits, default=1)]), ranked[max(fits, default=1) :]
        pool = dropped[: int(0.3 * len(dropped)) + 1]
        number = min(int(len(pool) / 10) + 1, TOTALS[image] - len(kept))
        centres, members = slow_peaks(seen.features[image], number, pool)
        truth = [seen.features[image, i] for i in kept]
        truth += [seen.features[image, members[c]].mean(0) for c in centres]
        assert len(truth) == TOTALS[image]
        here = merged.valid[image]
        assert int(here.sum()) == TOTALS[image]
        assert torch.allclose(merged.features[image][here], torch.stack(truth))
        assert merged.source[image][here].tolist() == [*kept, *centres]
        assert (
            merged.dominant[image].tolist()[: len(truth)] == [True] * len(kept) + [False] * number
        )


def test_a_forced_set_gets_clusters_of_its_own() -> None:
    one = prompt(LONG, [20, 10, 30, 64], cut=LOOK)
    compressor = SparseVLM(retention=0.5)
    compressor.look(one.seen)
    seen = replace(one.seen, cut=CUT)
    kept = torch.zeros_like(seen.valid)
    kept[:, :9] = True
    _, selection = choose(compressor, seen, kept)
    assert torch.equal(selection.kept, kept)
    assert selection.targets is not None
    # ⌊(⌊0.3 · 51⌋ + 1) / 10⌋ + 1 = 2 and so on; the second image has room for one only
    assert (selection.targets >= 0).sum(1).tolist() == [2, 1, 2, 2]
    assert not bool(kept.gather(1, selection.targets.clamp_min(0))[selection.targets >= 0].any())


def test_an_image_within_its_budget_is_left_alone() -> None:
    one = prompt(LONG, [60, 35, 10, 64], cut=LOOK)
    compressor = SparseVLM(retention=0.5)
    compressor.look(one.seen)
    seen = replace(one.seen, cut=CUT)
    _, selection = choose(compressor, seen)
    merged = compressor.merge(selection, seen)
    assert merged is not None
    assert merged.valid.sum(1).tolist() == [60, 35, 10, 64]
    for image in (0, 1, 3):
        here = seen.valid[image]
        assert torch.equal(selection.kept[image], here)
        assert torch.equal(merged.features[image][merged.valid[image]], seen.features[image][here])


@pytest.mark.parametrize("variant", ["v1.5", "v2.0", "rank"])
def test_an_image_alone_is_treated_as_in_the_batch(variant: str) -> None:
    compressor = SparseVLM(retention=0.5, variant=variant)  # type: ignore[arg-type]
    results = []
    for rows, counts in ((LONG, TOTALS), (LONG[:1], TOTALS[:1])):
        one = prompt(rows, counts, seed=3, cut=LOOK if compressor.recycles else CUT)
        if compressor.recycles:
            compressor.look(one.seen)
        seen = replace(one.seen, cut=CUT)
        scores, selection = choose(compressor, seen)
        results.append((scores, selection, compressor.merge(selection, seen)))
    batch, single = results
    assert torch.allclose(batch[0].score[0, :60], single[0].score[0])
    assert torch.equal(batch[1].kept[0, :60], single[1].kept[0])
    if compressor.recycles:
        assert batch[2] is not None
        assert single[2] is not None
        here = batch[2].valid[0]
        assert torch.allclose(batch[2].features[0][here], single[2].features[0][single[2].valid[0]])


@pytest.mark.parametrize("variant", ["v1.5", "v2.0"])
def test_the_score_has_the_gradient_of_finite_differences(variant: str) -> None:
    one = prompt(ROWS, 2, dead=DEAD, cut=CUT)
    compressor = SparseVLM(retention=0.5, variant=variant, recycling=False)  # type: ignore[arg-type]
    weight = normal(4, 12, seed=8) * one.seen.valid

    def total(hidden: Tensor) -> Tensor:
        text = replace(one.text, hidden=hidden)
        return (compressor.score(replace(one.seen, text=text)).score * weight).sum()

    hidden = one.text.hidden.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(hidden), hidden)
    assert bool(gradient.isfinite().all())
    for row, column in ((0, 5), (1, 3), (2, 17)):
        step = torch.zeros_like(hidden)
        step[row, column] = normal(DIM, seed=row)
        slope = (total(one.text.hidden + 1e-5 * step) - total(one.text.hidden - 1e-5 * step)) / 2e-5
        assert float(slope) == pytest.approx(float((gradient * step).sum()), rel=1e-4, abs=1e-9)


def test_merged_tokens_carry_gradients() -> None:
    one = prompt(LONG, TOTALS, cut=LOOK)
    compressor = SparseVLM(retention=0.5)
    compressor.look(one.seen)
    features = one.seen.features.clone().requires_grad_()
    seen = replace(one.seen, cut=CUT, features=features)
    _, selection = choose(compressor, seen)
    merged = compressor.merge(selection, seen)
    assert merged is not None
    (gradient,) = torch.autograd.grad(merged.features[merged.valid].sum(), features)
    assert selection.targets is not None
    assert selection.assignment is not None
    used = selection.kept | (selection.assignment >= 0)
    for image, targets in enumerate(selection.targets):
        used[image, targets[targets >= 0]] = True
    assert torch.equal(gradient.abs().sum(-1) > 0, used)


def test_half_precision_is_ranked_in_float32() -> None:
    one = prompt(LONG, TOTALS, seed=2, cut=CUT)
    text = replace(
        one.text,
        hidden=one.text.hidden.bfloat16(),
        embeds=one.text.embeds.bfloat16(),
        rope=tuple(part.bfloat16() for part in one.text.rope or ()),
    )
    seen = replace(one.seen, text=text, features=one.seen.features.bfloat16())
    for variant in ("v1.5", "v2.0", "rank"):
        compressor = SparseVLM(retention=0.5, variant=variant)  # type: ignore[arg-type]
        if compressor.recycles:
            compressor.look(seen)
        scores, selection = choose(compressor, seen)
        assert scores.score.dtype == torch.float32
        merged = compressor.merge(selection, seen)
        assert merged is None or merged.features.dtype == torch.bfloat16
