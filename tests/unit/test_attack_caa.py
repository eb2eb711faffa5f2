"""CAA: its mask, its groups, its switches, and that it does what it is for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attacks import CAA, AttackError, Noise
from attacks.caa import promoted_tokens
from attacks.objectives import (
    absolute_score,
    answer_divergence,
    bpr,
    query_misalignment,
    remaining_content,
    reversed_order,
    score_gap,
)
from targets.base import Batch, Knowledge, Ranking
from targets.compression.fastv import FastV
from tests.fakes import FakeView, make_batch

SEEDS = list(range(8))
EPSILON = 32 / 255


@pytest.fixture
def batch() -> Batch:
    return make_batch(8)


def ranking(score: Tensor, kept: int) -> Ranking:
    places = score.argsort(1, descending=True).argsort(1)
    nothing = torch.zeros(*score.shape, 1)
    return Ranking(score, score, None, None, nothing, places < kept)


@pytest.mark.parametrize(
    ("attack", "kept", "count"),
    [
        (CAA(), 3, 3),  # K, known
        (CAA(), 8, 2),  # no more than are dropped
        (CAA(group="twice_kept"), 3, 6),
        (CAA(group="twice_kept"), 6, 4),
        (CAA(group="dropped"), 3, 7),
        (CAA(preset="strict_preserve"), 3, 7),
        (CAA(preset="strict_preserve", group="kept"), 3, 3),
        (CAA(promote=5), 3, 5),
        (CAA(promote=50), 3, 9),  # something must be left to rank below
        (CAA(), 10, 1),  # nothing dropped: still one token
    ],
)
def test_how_many_tokens_are_promoted(attack: CAA, kept: int, count: int) -> None:
    score = torch.rand(2, 10, generator=torch.Generator().manual_seed(0))
    promoted = promoted_tokens(attack, ranking(score, kept))
    assert promoted.sum(1).tolist() == [count] * 2
    for row in range(2):
        lowest = set(score[row].argsort()[:count].tolist())
        assert set(promoted[row].nonzero().flatten().tolist()) == lowest


def test_most_important_takes_the_other_end() -> None:
    score = torch.arange(10.0).view(1, 10)
    promoted = promoted_tokens(CAA(region="most_important"), ranking(score, 3))
    assert promoted[0].nonzero().flatten().tolist() == [7, 8, 9]


def test_each_sample_has_its_own_count() -> None:
    score = torch.arange(10.0).expand(2, 10)
    both = replace(ranking(score, 3), kept=torch.stack([score[0] > 6, score[1] > 4]))
    assert promoted_tokens(CAA(), both).sum(1).tolist() == [3, 5]


@pytest.mark.parametrize("region", ["low", "most_important"])
@pytest.mark.parametrize("steps", [0, 8])
def test_only_pixels_of_the_group_move(batch: Batch, region: str, steps: int) -> None:
    view = FakeView()
    attack = CAA(region=region, steps=steps)  # type: ignore[arg-type]
    promoted = promoted_tokens(attack, view.rank(batch.images, batch.questions))
    allowed = view.token_mask_to_pixels(promoted, (16, 16)) > 0
    moved = (attack(view, batch, EPSILON, SEEDS).images != batch.images).any(1, keepdim=True)
    assert not moved[~allowed].any()
    assert moved[allowed].float().mean() > 0.9


def jaccard(view: FakeView, batch: Batch, images: Tensor) -> float:
    clean = view.rank(batch.images, batch.questions).kept
    now = view.rank(images, batch.questions).kept
    return float(((clean & now).sum(1) / (clean | now).sum(1)).mean())


def gap(view: FakeView, batch: Batch, images: Tensor) -> float:
    """Mean log-score of the promoted tokens over the others."""
    promoted = promoted_tokens(CAA(), view.rank(batch.images, batch.questions))
    score = view.rank(images, batch.questions).log_score
    return float(score[promoted].mean() - score[~promoted].mean())


@pytest.mark.parametrize("attention", [True, False], ids=["attention", "norm"])
@pytest.mark.parametrize("objective", ["bpr", "score_gap", "absolute"])
def test_infiltrates_where_noise_in_the_same_mask_does_not(
    batch: Batch, attention: bool, objective: str
) -> None:
    view = FakeView(attention=attention)
    attack = CAA(steps=30, ranking=objective)  # type: ignore[arg-type]
    control = CAA(steps=0)(view, batch, EPSILON, SEEDS).images
    attacked = attack(view, batch, EPSILON, SEEDS).images
    assert gap(view, batch, attacked) > gap(view, batch, control) + 0.3
    assert jaccard(view, batch, attacked) < jaccard(view, batch, control)


def test_the_whole_image_infiltrates_more_than_noise(batch: Batch) -> None:
    view = FakeView()
    attacked = CAA(steps=30, region="full_image")(view, batch, EPSILON, SEEDS).images
    noisy = Noise()(view, batch, EPSILON, SEEDS).images
    assert jaccard(view, batch, attacked) < jaccard(view, batch, noisy) - 0.2


def test_most_important_erases_content_and_keeps_the_rank(batch: Batch) -> None:
    view = FakeView()
    attack = CAA(steps=40, region="most_important")
    attacked = attack(view, batch, EPSILON, SEEDS).images
    erased = (view.rank(attacked, batch.questions), view.rank(batch.images, batch.questions))
    promoted = promoted_tokens(attack, erased[1])
    same = torch.cosine_similarity(erased[0].features, erased[1].features, dim=-1)[promoted]
    assert same.mean() < 0.9
    assert jaccard(view, batch, attacked) > 0.9


@pytest.mark.parametrize("region", ["low", "full_image", "most_important"])
@pytest.mark.parametrize("objective", ["bpr", "score_gap", "absolute"])
def test_the_recorded_loss_is_the_formula_at_the_saved_image(
    batch: Batch, region: str, objective: str
) -> None:
    """J put together by hand, every weight different, at the start inside the mask."""
    view = FakeView()
    attack = CAA(
        steps=0,
        region=region,  # type: ignore[arg-type]
        ranking=objective,  # type: ignore[arg-type]
        intra="both",
        tau=0.7,
        intra_weight=2.0,
        query_weight=3.0,
        erase_weight=5.0,
        preserve_weight=700.0,
    )
    result = attack(view, batch, EPSILON, SEEDS)
    clean = view.rank(batch.images, batch.questions)
    now = view.rank(result.images, batch.questions)
    up = promoted_tokens(attack, clean)
    score, order = now.log_score, clean.log_score
    wanted = {
        "bpr": bpr(score, up, ~up, 0.7),
        "score_gap": score_gap(score, up, ~up),
        "absolute": absolute_score(score, up),
    }[objective]
    if region != "most_important":
        wanted = wanted + 2 * reversed_order(score, order, up, 0.7)
        wanted = wanted + 2 * reversed_order(score, order, ~up, 0.7)
    assert now.keys is not None
    assert clean.query is not None
    wanted = wanted + 3 * query_misalignment(now.keys, clean.query, up)
    wanted = wanted + 5 * remaining_content(now.features, clean.features, up)
    said = [
        view.answer_logprobs(x, batch.questions, batch.answers)
        for x in (batch.images, result.images)
    ]
    divergence = answer_divergence(said[0][0], said[1][0], said[0][1])
    assert (700 * divergence > 0.01).all()
    wanted = wanted + 700 * divergence
    assert [trace[0] for trace in result.loss] == pytest.approx(wanted.tolist(), rel=1e-4)


@pytest.mark.parametrize(
    "switch",
    [
        {"intra_weight": 0.0},
        {"query_weight": 0.0},
        {"erase_weight": 0.0},
        {"ranking": "score_gap"},
        {"ranking": "absolute"},
        {"intra": "both"},
        {"intra": "none"},
        {"tau": 0.2},
        {"preserve_weight": 2.0},
        {"promote": 2},
        {"group": "dropped"},
    ],
    ids=str,
)
def test_every_switch_changes_the_loss(batch: Batch, switch: dict[str, object]) -> None:
    view = FakeView()
    plain = CAA(steps=3)(view, batch, EPSILON, SEEDS)
    changed = CAA(steps=3, **switch)(view, batch, EPSILON, SEEDS)  # type: ignore[arg-type]
    assert plain.loss != changed.loss


def test_intra_none_and_weight_zero_are_the_same_attack(batch: Batch) -> None:
    results = [
        attack(FakeView(), batch, EPSILON, SEEDS).images
        for attack in (CAA(steps=3, intra="none"), CAA(steps=3, intra_weight=0.0))
    ]
    assert torch.equal(*results)


def test_query_guidance_is_off_without_a_query_and_says_so(batch: Batch) -> None:
    view = FakeView(attention=False)
    with_, without = (
        CAA(steps=3, query_weight=weight)(view, batch, EPSILON, SEEDS) for weight in (1.0, 0.0)
    )
    assert torch.equal(with_.images, without.images)
    assert "query guidance is off" in with_.notes[0]
    assert without.notes == ()
    assert CAA(steps=3)(FakeView(), batch, EPSILON, SEEDS).notes == ()


def test_presets() -> None:
    assert CAA().preservation == 0
    assert CAA(preset="strict_preserve").preservation == 1
    assert CAA(preset="strict_preserve", preserve_weight=5.0).preservation == 5
    assert CAA(preset="paper", preserve_weight=0.5).preservation == 0.5


def test_a_step_runs_no_further_than_it_must(batch: Batch) -> None:
    view = FakeView()
    CAA(steps=4)(view, batch, EPSILON, SEEDS)
    assert set(view.calls) == {"rank"}
    view = FakeView()
    CAA(steps=4, preset="strict_preserve")(view, batch, EPSILON, SEEDS)
    assert view.calls == ["full_and_rank"] * 6
    view = FakeView()
    CAA(steps=5, preset="strict_preserve", preserve_every=2)(view, batch, EPSILON, SEEDS)
    short = ["full_and_rank", "rank"]
    assert view.calls == ["full_and_rank", *short, *short, *short[:1], "full_and_rank"]


def drift(view: FakeView, batch: Batch, images: Tensor) -> float:
    """KL of the full path from clean to attacked."""
    clean, _ = view.answer_logprobs(batch.images, batch.questions, batch.answers)
    now, _ = view.answer_logprobs(images, batch.questions, batch.answers)
    return float((clean.exp() * (clean - now)).sum(-1).mean())


def test_preservation_spares_the_full_path(batch: Batch) -> None:
    view = FakeView()
    free = CAA(steps=30, region="full_image")(view, batch, EPSILON, SEEDS)
    strict = CAA(steps=30, region="full_image", preset="strict_preserve", preserve_weight=10.0)
    spared = strict(view, batch, EPSILON, SEEDS)
    assert drift(view, batch, spared.images) < 0.2 * drift(view, batch, free.images)
    assert jaccard(view, batch, spared.images) < 0.6


class TwoLayers(FakeView):
    """Ranks by another query at each layer a compressor is imagined at."""

    def rank(self, images: Tensor, questions: tuple[str, ...], *, under: Any = None) -> Ranking:
        assert isinstance(under, FastV), "the compression is not known"
        return super().rank(images, tuple(f"{one} {under.layer}" for one in questions))


UNKNOWN = CAA(steps=0, layers=(1, 3), retentions=(0.1, 0.25))


def test_an_unknown_compression_is_declared_and_known_to_nobody() -> None:
    assert CAA().knows_compression
    assert CAA(preset="strict_preserve").knows_compression
    assert not UNKNOWN.knows_compression
    assert UNKNOWN.needs is Knowledge.WHITE_BOX
    assert UNKNOWN.group_rule == "twice_kept"
    assert CAA(layers=(2,), retentions=(0.5,), group="kept").group_rule == "kept"
    assert CAA(layers=(2,), retentions=(0.5,), preset="strict_preserve").group_rule == "dropped"


def test_under_an_unknown_compression_the_loss_is_the_mean_over_the_range(batch: Batch) -> None:
    view, attack = TwoLayers(), replace(UNKNOWN, query_weight=0.5, erase_weight=2.0)
    result = attack(view, batch, EPSILON, SEEDS)
    cleans, nows = (
        [
            view.rank(images, batch.questions, under=FastV(layer=layer, retention=0.1))
            for layer in (1, 3)
        ]
        for images in (batch.images, result.images)
    )
    mean_rank = sum(one.score.argsort(1).argsort(1).double() for one in cleans)
    assert isinstance(mean_rank, Tensor)
    place = mean_rank.argsort(dim=1, stable=True).argsort(1)
    groups = [place < 2 * round(0.1 * 16), place < 2 * round(0.25 * 16)]
    wanted = torch.zeros(8)
    for clean, now in zip(cleans, nows, strict=True):
        for up in groups:
            assert now.keys is not None
            assert clean.query is not None
            wanted += bpr(now.log_score, up, ~up)
            wanted += reversed_order(now.log_score, clean.log_score, up)
            wanted += 0.5 * query_misalignment(now.keys, clean.query, up)
            wanted += 2.0 * remaining_content(now.features, clean.features, up)
    assert [trace[0] for trace in result.loss] == pytest.approx((wanted / 4).tolist(), rel=1e-4)
    allowed = view.token_mask_to_pixels(groups[1], (16, 16)) > 0
    moved = (result.images != batch.images).any(1, keepdim=True)
    assert not moved[~allowed].any()
    assert moved[allowed].float().mean() > 0.9


def test_a_range_infiltrates_at_both_of_its_layers(batch: Batch) -> None:
    view, attack = TwoLayers(), replace(UNKNOWN, steps=30)
    control = UNKNOWN(view, batch, EPSILON, SEEDS).images
    attacked = attack(view, batch, EPSILON, SEEDS).images
    for layer in (1, 3):
        under = FastV(layer=layer, retention=0.25)
        kept = [
            view.rank(images, batch.questions, under=under).kept
            for images in (batch.images, control, attacked)
        ]
        same = [float((kept[0] & one).sum() / kept[0].sum()) for one in kept]
        assert same[2] < same[1] - 0.1


def test_preservation_under_an_unknown_compression_costs_one_pass_through_the_model(
    batch: Batch,
) -> None:
    view = FakeView()
    attack = replace(UNKNOWN, preset="strict_preserve", steps=1)
    attack(view, batch, EPSILON, SEEDS)
    assert view.calls == ["full_and_rank", "rank"] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (2,)}, "give both"),
        ({"retentions": (0.5,)}, "give both"),
        ({"layers": (0,), "retentions": (0.5,)}, "layers is .0.; allowed: whole numbers"),
        ({"layers": (2, 2), "retentions": (0.5,)}, "each once"),
        ({"layers": (2,), "retentions": (0.5, 1.0)}, "retentions is .0.5, 1.0.; allowed: shares"),
    ],
)
def test_a_range_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AttackError, match=message):
        CAA(**options)
