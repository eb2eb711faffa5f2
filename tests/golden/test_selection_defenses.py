"""Selection defences against slow references written from their formulas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from seen import seen, seen_by_tower, vision_pass
from torch import Tensor

from defenses.base import DefenseError
from defenses.hybrid import Hybrid, filled_up
from defenses.random_floor import RandomFloor, survival
from defenses.rank_fusion import RankFusion, fused
from defenses.score_smoothing import ScoreSmoothing
from defenses.selection import rank_quantiles, soft_quantiles
from defenses.translation_consensus import (
    Aligned,
    TranslationConsensus,
    half_token,
    public_moves,
    translated,
)
from targets.compression.base import Scores, Seen
from targets.compression.fastervlm import FasterVLM
from targets.compression.scoring import log_probability, top_k_mask
from targets.families.vision import LayerPass
from targets.preprocessing import Layout


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def order(score: Sequence[float]) -> list[int]:
    return sorted(range(len(score)), key=lambda i: (-score[i], i))


def quantiles(score: Sequence[float]) -> list[float]:
    places = order(score)
    last = max(len(score) - 1, 1)
    return [1 - places.index(i) / last for i in range(len(score))]


def best(score: Sequence[float], count: int) -> list[int]:
    return sorted(order(score)[:count])


def scores_of(values: Tensor) -> Scores:
    return Scores(values, log_probability(values), attends=True)


def kept_of(mask: Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in mask]


def test_rank_quantiles_are_ranks() -> None:
    score = rand(4, 9)
    score[1] = 0.5  # all equal: the first is the best
    valid = torch.ones(4, 9, dtype=torch.bool)
    wanted = torch.tensor([quantiles(row) for row in score.tolist()])
    torch.testing.assert_close(rank_quantiles(score, valid), wanted)
    valid[2, 5:] = False
    short = rank_quantiles(score, valid)[2]
    torch.testing.assert_close(short[:5], torch.tensor(quantiles(score[2, :5].tolist())))
    assert not short[5:].any()
    assert rank_quantiles(rand(1, 1), valid[:1, :1]).item() == 1


def test_soft_quantiles_become_ranks() -> None:
    score, valid = rand(3, 12), torch.ones(3, 12, dtype=torch.bool)
    hard = rank_quantiles(score, valid)
    torch.testing.assert_close(soft_quantiles(score, valid, 1e-4), hard, rtol=0, atol=1e-3)
    valid[0, 7:] = False
    other = score.clone()
    other[0, 7:] = 5
    found = soft_quantiles(score, valid)
    assert torch.equal(found, soft_quantiles(other, valid)), "places without a token count nothing"


# Translation consensus --------------------------------------------------------------------------


def slow_translated(image: Tensor, down: int, right: int) -> Tensor:
    height, width = image.shape[-2:]

    def mirrored(place: int, size: int) -> int:
        return -place if place < 0 else 2 * (size - 1) - place if place >= size else place

    found = torch.empty_like(image)
    for row, column in itertools.product(range(height), range(width)):
        found[:, row, column] = image[
            :, mirrored(row - down, height), mirrored(column - right, width)
        ]
    return found


@pytest.mark.parametrize("move", [(0, 3), (3, 0), (2, 3), (-3, 1), (-1, -4), (0, 0)])
def test_pictures_move_and_mirror(move: tuple[int, int]) -> None:
    image = rand(3, 8, 10)
    assert torch.equal(translated(image, *move), slow_translated(image, *move))


def slow_aligned(grid: Tensor, down: float, right: float) -> Tensor:
    rows, columns = grid.shape

    def at(row: int, column: int) -> float:
        row, column = (abs(row), abs(column))
        row = row if row < rows else 2 * (rows - 1) - row
        column = column if column < columns else 2 * (columns - 1) - column
        return float(grid[row, column])

    found = torch.empty_like(grid)
    for row, column in itertools.product(range(rows), range(columns)):
        y, x = row + down, column + right
        top, left = math.floor(y), math.floor(x)
        found[row, column] = sum(
            weight * at(top + i, left + j)
            for i, j, weight in (
                (0, 0, (1 - y + top) * (1 - x + left)),
                (0, 1, (1 - y + top) * (x - left)),
                (1, 0, (y - top) * (1 - x + left)),
                (1, 1, (y - top) * (x - left)),
            )
        )
    return found


@pytest.mark.parametrize("move", [(4, 0), (0, 4), (4, 4), (-3, 7)])
def test_alignment_is_bilinear_and_mirrors(move: tuple[int, int]) -> None:
    values = rand(2, 30, seed=3)
    align = Aligned((5, 6), (8.0, 8.0), ((move[0], 0), (move[1], 0)))
    found = align(values)
    wanted = slow_aligned(values[0].view(5, 6), move[0] / 8, move[1] / 8)
    torch.testing.assert_close(found[0].view(5, 6), wanted)
    assert torch.equal(found[1], values[1]), "a picture that did not move stays, bit for bit"


def test_alignment_of_a_ramp_is_exact_inside() -> None:
    """A shifted picture's ramp lies half a token further on; aligned it is the ramp again."""
    row, column = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    ramp = 3 * row + column
    shifted = 3 * (row - 0.5) + (column - 0.5)
    align = Aligned((6, 7), (8.0, 8.0), ((4,), (4,)))
    found = align(shifted.reshape(1, -1)).view(6, 7)
    assert torch.equal(found[:-1, :-1], ramp[:-1, :-1])


def test_the_shift_is_half_a_token() -> None:
    assert half_token(14, 14) == 7
    assert half_token(8, 8) == 4
    assert half_token(1, 1) == 1
    assert set(public_moves(7)) == {(7, 0), (0, 7), (7, 7)}


@pytest.mark.parametrize("average", ["mean", "median"])
def test_consensus_is_the_mean_quantile(average: str) -> None:
    values = rand(4, 2, 25, seed=5)  # views first
    here = seen(rand(2, 25, 3), 6)
    one = TranslationConsensus(average=average)  # type: ignore[arg-type]
    found = one.combine(scores_of(values[0]), [scores_of(v) for v in values[1:]], here)
    for image in range(2):
        columns = list(zip(*(quantiles(v[image].tolist()) for v in values), strict=True))
        wanted = [sum(c) / 4 if average == "mean" else sorted(c)[1] for c in columns]
        torch.testing.assert_close(found.score[image], torch.tensor(wanted))
    kept = FasterVLM(keep_tokens=6).select(found, here).kept
    assert kept_of(kept) == kept_of(top_k_mask(found.score, 6))


def test_without_a_shift_there_is_no_defence() -> None:
    one, own = TranslationConsensus(shift=0), scores_of(rand(1, 9))
    layout = Layout.grid((3, 3), (0.0, 0.0, 12.0, 12.0))
    assert one.look_again(rand(1, 3, 12, 12), layout, [torch.Generator()]) == ()
    assert one.combine(own, (), seen(rand(1, 9, 2), 3)) is own
    assert one.looks == 0


def test_a_token_promoted_in_one_view_stays_out() -> None:
    """What the defence is for: the top of one view alone is not the top of the consensus."""
    steady = torch.linspace(1, 0.1, 16).repeat(4, 1, 1)
    steady[0, 0, 15] = 9.0
    one, here = TranslationConsensus(), seen(rand(1, 16, 2), 4)
    found = one.combine(scores_of(steady[0]), [scores_of(v) for v in steady[1:]], here)
    assert kept_of(top_k_mask(found.score, 4)) == [[0, 1, 2, 3]]
    assert 15 in kept_of(top_k_mask(steady[0], 4))[0]


def test_the_relaxation_moves_every_view() -> None:
    values = rand(4, 1, 16).requires_grad_()
    found = TranslationConsensus().combine(
        scores_of(values[0]), [scores_of(v) for v in values[1:]], seen(rand(1, 16, 2), 4)
    )
    for score in (found.score, found.log_score):
        (gradient,) = torch.autograd.grad(score[0, 3], values, retain_graph=True)
        assert bool((gradient.abs().amax((1, 2)) > 0).all())
        assert (gradient[:, 0, 3] > 0).all(), "a higher score in any view raises the consensus"


# Score smoothing --------------------------------------------------------------------------------


def test_smoothing_is_the_mean_of_its_statistic() -> None:
    values, here = rand(5, 1, 10, seed=2), seen(rand(1, 10, 2), 3)
    own, others = scores_of(rand(1, 10, seed=9)), [scores_of(v) for v in values]
    rows = [v[0].tolist() for v in values]
    mean = [sum(column) / 5 for column in zip(*rows, strict=True)]
    found = ScoreSmoothing(statistic="score").combine(own, others, here).score
    torch.testing.assert_close(found[0], torch.tensor(mean))
    mean = [sum(column) / 5 for column in zip(*map(quantiles, rows), strict=True)]
    found = ScoreSmoothing(statistic="quantile").combine(own, others, here).score
    torch.testing.assert_close(found[0], torch.tensor(mean))
    votes = [sum(i in best(row, 3) for row in rows) for i in range(10)]
    found = ScoreSmoothing(statistic="indicator").combine(own, others, here).score
    wanted = [vote + quantile / 2 for vote, quantile in zip(votes, mean, strict=True)]
    torch.testing.assert_close(found[0], torch.tensor(wanted))


def test_noise_is_seeded_clipped_and_of_its_size() -> None:
    images, layout = torch.full((2, 3, 40, 40), 0.5), Layout.grid((5, 5))
    one = ScoreSmoothing(sigma=0.1, copies=2)

    def noisy(*seeds: int) -> list[Tensor]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return [v.images for v in one.look_again(images[: len(seeds)], layout, generators)]

    first, second = noisy(1, 2)
    assert not torch.equal(first, second)
    assert torch.equal(first[1], noisy(2)[0][0]), "a sample's noise is its own"
    assert abs(float((first - 0.5).std()) - 0.1) < 0.01
    assert float(noisy(1)[0].amax()) <= 1
    assert ScoreSmoothing(sigma=0).look_again(images, layout, []) == ()


# Rank fusion ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["borda", "rrf", "vote"])
def test_fusion_against_its_formula(fusion: str) -> None:
    scores = [rand(2, 11, seed=s) for s in range(3)]
    valid, counts = torch.ones(2, 11, dtype=torch.bool), torch.tensor([4, 2])
    found = fused(scores, valid, counts, fusion)
    for image in range(2):
        rows = [s[image].tolist() for s in scores]
        borda = [sum(column) / 3 for column in zip(*map(quantiles, rows), strict=True)]
        rrf = [sum(1 / (61 + order(row).index(i)) for row in rows) for i in range(11)]
        votes = [sum(i in best(row, int(counts[image])) for row in rows) for i in range(11)]
        vote = [v + b / 2 for v, b in zip(votes, borda, strict=True)]
        wanted = {"borda": borda, "rrf": rrf, "vote": vote}[fusion]
        torch.testing.assert_close(found[image].float(), torch.tensor(wanted))


@pytest.mark.parametrize("fusion", ["borda", "rrf", "vote"])
def test_fusion_does_not_depend_on_the_order_of_scorers(fusion: str) -> None:
    scores = [rand(2, 11, seed=s) for s in range(4)]
    valid, counts = torch.ones(2, 11, dtype=torch.bool), torch.tensor([4, 2])
    one, other = (fused(s, valid, counts, fusion) for s in (scores, scores[::-1]))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fusion", ["borda", "rrf", "vote"])
def test_one_scorer_is_the_identity(fusion: str) -> None:
    score = rand(3, 11)
    valid, counts = torch.ones(3, 11, dtype=torch.bool), torch.tensor([4, 2, 7])
    found = fused([score], valid, counts, fusion)
    assert torch.equal(top_k_mask(found, counts), top_k_mask(score, counts))
    own = scores_of(score)
    assert RankFusion(layers=()).combine(own, (), seen(rand(3, 11, 2), 4)) is own


def towered() -> Seen:
    def layer(seed: int) -> LayerPass:
        hidden, wide = rand(2, 10, 4, seed=seed), rand(2, 2, 10, 3, seed=seed + 1) * 4
        return LayerPass(hidden, wide, rand(2, 2, 10, 3, seed=seed + 2) * 4)

    last = layer(40)
    vision = vision_pass(
        last.hidden, last.queries, last.keys, feature_layer=2, layers={1: layer(20), 0: layer(30)}
    )
    return seen_by_tower(vision, 3)


def test_fusion_reads_the_layers_it_names() -> None:
    here = towered()
    assert here.vision is not None
    own = FasterVLM(keep_tokens=3).score(here)
    one = RankFusion(layers=(-1, -2, -9))
    assert one.tower_layers(3, 2) == (0, 1), "a layer the tower does not have is left out"
    found = one.combine(own, (), here).score
    others = [here.vision.attention(layer).mean(1) for layer in (0, 1)]
    wanted = fused([own.score, *others], here.valid, here.counts, "borda")
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("layers", [(1,), (0, 0)])
def test_layers_that_have_no_meaning_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(DefenseError, match="layers are"):
        RankFusion(layers=layers)


# Hybrid -----------------------------------------------------------------------------------------


def slow_hybrid(features: Tensor, score: list[float], total: int, share: float) -> list[int]:
    unit = torch.nn.functional.normalize(features, dim=-1)
    kept = order(score)[: total - math.floor(share * total + 0.5)]
    while len(kept) < total:
        free = [i for i in range(len(score)) if i not in kept]
        gaps = {i: min((1 - float(unit[i] @ unit[j]) for j in kept), default=2.0) for i in free}
        kept.append(max(free, key=lambda i: (gaps[i], -i)))
    return sorted(kept)


@pytest.mark.parametrize("share", [0, 0.3, 0.5, 1])
def test_hybrid_fills_up_with_the_farthest(share: float) -> None:
    features, score = rand(3, 14, 5, seed=4) - 0.5, rand(3, 14, seed=6)
    here, one = seen(features, 5), Hybrid(diverse=share)
    scores = one.combine(scores_of(score), (), here)
    kept = one.keep(top_k_mask(scores.score, 5), scores, here, [torch.Generator()] * 3)
    share = share if share != 0.5 else 0.4  # half of 5 rounds to even
    wanted = [slow_hybrid(f, s, 5, share) for f, s in zip(features, score.tolist(), strict=True)]
    assert kept_of(kept) == wanted


def test_filling_up_counts_to_the_token() -> None:
    distance = torch.zeros(2, 6, 6)  # all equal: the first ones
    chosen = torch.zeros(2, 6, dtype=torch.bool)
    chosen[1, 5] = True
    found = filled_up(distance, chosen, torch.tensor([2, 3]), torch.ones(2, 6, dtype=torch.bool))
    assert kept_of(found) == [[0, 1], [0, 1, 5]]


# Random floor -----------------------------------------------------------------------------------


def floor(rho: float, seeds: Sequence[int], keep: int = 8) -> tuple[Tensor, Tensor]:
    score = rand(len(seeds), 30, seed=8)
    here = seen(rand(len(seeds), 30, 2), keep)
    kept = top_k_mask(score, keep)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return kept, RandomFloor(rho=rho).keep(kept, scores_of(score), here, generators)


def test_the_floor_keeps_the_best_and_the_number() -> None:
    kept, found = floor(0.25, range(6))
    assert found.sum(1).tolist() == [8] * 6
    score = rand(6, 30, seed=8)
    assert bool((found | ~top_k_mask(score, 6)).all()), "the top (1 − rho)·K are always there"
    assert not torch.equal(kept, found)
    assert torch.equal(floor(0.25, [3, 3])[1], floor(0.25, [3, 3])[1])


def test_no_floor_is_the_identity_and_a_whole_one_is_random() -> None:
    kept, found = floor(0, range(4))
    assert torch.equal(kept, found)
    _, found = floor(1, range(300))
    share = found.float().mean(0)
    assert float((share - 8 / 30).abs().amax()) < 0.12


def test_survival_against_simulation() -> None:
    assert survival(10, 518, 6) == pytest.approx(0.11, abs=0.005)  # published: rho .1, K 64
    assert survival(0, 20, 5) == 0
    evidence, rest, drawn = 4, 24, 2
    _, found = floor(0.25, range(3000))
    score = rand(3000, 30, seed=8)
    lowest = score.argsort(1)[:, :evidence]  # never among the best
    hit = float(found.gather(1, lowest).any(1).float().mean())
    assert hit == pytest.approx(survival(evidence, rest, drawn), abs=0.03)
