"""Rank margin on a real model: when it falls back, to what, and what an adaptive attack gets."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from shifted import shifted_scores
from torch import Tensor

from attacks.caa import CAA
from attacks.force_fallback import BLIND, ForceFallback
from defenses.adaptive import defended, passes_of
from defenses.base import AdaptiveRoute, DefenseError, DefenseKind
from defenses.guard import Guard
from defenses.hybrid import Hybrid
from defenses.rank_margin import RankMargin, calibrated, larger
from defenses.selection import Protected
from defenses.translation_consensus import TranslationConsensus
from targets.base import Batch, Knowledge
from targets.compression import FasterVLM, FastV, Random, VisionZip
from targets.compression.base import Compressor
from targets.lvlm import LVLM

COUNT = 3
QUESTIONS = tiny.QUESTIONS[:COUNT]
SEEDS = (4, 9, 2)
KINDS = ("fastv", "visionzip", "fastervlm", "vispruner", "hired")


@pytest.fixture(scope="module")
def target() -> LVLM:
    return LVLM(tiny.build_model(), tiny.build_processor())


@pytest.fixture
def images() -> Tensor:
    return tiny.pictures(COUNT, seed=3)


def middle(one: RankMargin, target: LVLM, images: Tensor, plain: Compressor) -> RankMargin:
    """With a threshold between the least and the most stable picture."""
    stable = one.stability(target, images, QUESTIONS, plain, SEEDS)
    assert float(stable.amax()) > float(stable.amin()), "pictures that differ"
    return replace(one, threshold=float(stable.amax() + stable.amin()) / 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signal", ["jaccard", "gap", "kendall"])
def test_it_falls_back_below_the_threshold(
    kind: str, signal: Any, target: LVLM, images: Tensor
) -> None:
    plain = tiny.COMPRESSORS[kind]
    one = middle(RankMargin(signal=signal), target, images, plain)
    stable = one.stability(target, images, QUESTIONS, plain, SEEDS)
    assert bool(((stable >= 0) & (stable <= 1)).all())
    found = one.choose(target, images, QUESTIONS, plain, SEEDS)
    wanted = [plain if value >= one.threshold else None for value in stable.tolist()]
    assert found == wanted
    assert plain in found and None in found  # noqa: PT018
    back = one.choose(target, images.flip(0), QUESTIONS[::-1], plain, SEEDS[::-1])
    assert back == wanted[::-1], "whatever the neighbours are"
    alone = one.choose(target, images[1:2], QUESTIONS[1:2], plain, SEEDS[1:2])
    assert alone == wanted[1:2]


def test_the_overlap_of_the_whole_model(target: LVLM, images: Tensor) -> None:
    """Four pictures ranked one by one, moved back by the middle of two tokens, K best, pairs."""
    plain = FasterVLM(keep_tokens=9)
    sets = []
    for score in shifted_scores(target, plain, images, QUESTIONS):
        best = score.argsort(dim=1, descending=True, stable=True)[:, :9]
        sets.append([set(row) for row in best.tolist()])
    wanted = []
    for row in range(COUNT):
        pairs = list(itertools.combinations([one[row] for one in sets], 2))
        wanted.append(sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs))
    found = RankMargin().stability(target, images, QUESTIONS, plain, SEEDS)
    torch.testing.assert_close(found, torch.tensor(wanted))


@pytest.mark.parametrize("fallback", ["full", "double_then_full"])
def test_0_never_and_1_always(fallback: Any, target: LVLM, images: Tensor) -> None:
    plain = FastV(layer=2, keep_tokens=9)
    never = RankMargin(threshold=0, fallback=fallback)
    always = RankMargin(threshold=1, fallback=fallback)
    assert never.choose(target, images, QUESTIONS, plain, SEEDS) == [plain] * COUNT
    assert always.choose(target, images, QUESTIONS, plain, SEEDS) == [None] * COUNT
    one = RankMargin(threshold=1e-9, signal="jaccard").choose(
        target, images, QUESTIONS, FastV(layer=2, retention=1.0), SEEDS
    )
    assert None not in one, "where nothing is dropped, nothing is unstable"


def test_twice_the_tokens_come_first(target: LVLM, images: Tensor) -> None:
    plain = FastV(layer=2, keep_tokens=9)
    straight = RankMargin()
    at_k = straight.stability(target, images, QUESTIONS, plain, SEEDS).tolist()
    doubled = FastV(layer=2, keep_tokens=18)
    at_2k = straight.stability(target, images, QUESTIONS, doubled, SEEDS).tolist()
    outcomes = set()
    for threshold in sorted({*at_k, *at_2k, 0.99}):
        one = RankMargin(threshold=threshold, fallback="double_then_full")
        # 18 of 36 tokens are fewer than all, so twice the budget is offered
        wanted = [
            plain if a >= threshold else larger(plain, 36) if b >= threshold else None
            for a, b in zip(at_k, at_2k, strict=True)
        ]
        assert one.choose(target, images, QUESTIONS, plain, SEEDS) == wanted
        outcomes |= {str(one) for one in wanted}
    assert len(outcomes) == 3, "all three happened"


def test_twice_a_budget() -> None:
    assert larger(FastV(layer=2, retention=0.2), 36) == FastV(layer=2, retention=0.4)
    assert larger(VisionZip(keep_tokens=8), 36) == VisionZip(keep_tokens=16)
    assert larger(VisionZip(keep_tokens=18), 36) is None
    assert larger(FastV(layer=2, retention=0.5), 36) is None
    inside = Hybrid().protect(VisionZip(keep_tokens=8), salt=3)
    found = larger(inside, 36)
    assert isinstance(found, Protected)
    assert found.base == VisionZip(keep_tokens=16)
    assert (found.defense, found.salt, found.keep_tokens) == (Hybrid(), 3, 16)


def test_random_views_follow_the_seeds(target: LVLM, images: Tensor) -> None:
    one, plain = RankMargin(views="random", number=3), FasterVLM(keep_tokens=9)
    assert one.draws
    assert one.route is AdaptiveRoute.EOT
    first = one.stability(target, images, QUESTIONS, plain, SEEDS)
    assert torch.equal(first, one.stability(target, images, QUESTIONS, plain, SEEDS))
    other = one.stability(target, images, QUESTIONS, plain, (5, 9, 2))
    assert torch.equal(first[1:], other[1:])
    assert not torch.equal(first, one.stability(target, images, QUESTIONS, plain, (7, 8, 1)))


def test_a_gap_ranks_once(target: LVLM, images: Tensor) -> None:
    runs: list[int] = []
    tower = target.family.model.model.vision_tower
    handle = tower.register_forward_pre_hook(
        lambda m, a, k: runs.append(len(k.get("pixel_values", a[0] if a else ()))),
        with_kwargs=True,
    )
    plain = VisionZip(keep_tokens=9)
    RankMargin(signal="gap").stability(target, images, QUESTIONS, plain, SEEDS)
    assert runs == [COUNT]
    RankMargin().stability(target, images, QUESTIONS, plain, SEEDS)
    handle.remove()
    assert runs == [COUNT, COUNT, 3 * COUNT], "and the others their views in one batch"


def test_calibration_meets_the_rate(target: LVLM) -> None:
    images = tiny.pictures(20, seed=8)
    questions = (tiny.QUESTIONS * 7)[:20]
    plain = FasterVLM(keep_tokens=9)
    for rate in (0.0, 0.1, 0.5):
        one = calibrated(target, plain, images, questions, rate, RankMargin(signal="kendall"))
        assert one.signal == "kendall"
        fell = one.choose(target, images, questions, plain, range(20)).count(None)
        assert fell == rate * 20, "no ties among these"
    with pytest.raises(DefenseError, match="one signal at least"):
        calibrated(target, plain, images[:0], ())


@pytest.mark.parametrize("kind", ["divprune", "pyramiddrop", "tome", "prumerge"])
def test_what_it_has_no_meaning_for(kind: str, target: LVLM, images: Tensor) -> None:
    plain = tiny.COMPRESSORS[kind]
    assert RankMargin().refuses(plain) is not None
    with pytest.raises(DefenseError, match=f"does not go with compressor {plain.name}"):
        RankMargin().choose(target, images, QUESTIONS, plain, SEEDS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threshold": 1.5}, r"threshold is 1.5; allowed is \[0, 1\]"),
        ({"threshold": -0.1}, "0 never"),
        ({"signal": "kendall", "fallback": "double_then_full"}, "would never stop there"),
    ],
)
def test_options_without_meaning(options: dict[str, Any], says: str) -> None:
    with pytest.raises(DefenseError, match=says):
        RankMargin(**options)


# Attacks ------------------------------------------------------------------------------------------


def batch(images: Tensor) -> Batch:
    ids = tuple(f"s{i}" for i in range(COUNT))
    return Batch(ids=ids, images=images, questions=QUESTIONS, answers=tiny.ANSWERS[:COUNT])


def test_what_an_adaptive_attack_goes_through(target: LVLM, images: Tensor) -> None:
    one, plain = RankMargin(shift=3), VisionZip(keep_tokens=9)
    assert one.kind is DefenseKind.FALLBACK
    assert Guard.of(one).fallback is one
    assert one.verifiable
    stand_in = one.stand_in()
    assert stand_in == TranslationConsensus(shift=3)
    assert passes_of(one, 5) == 4 == 1 + one.looks
    assert RankMargin(signal="gap").stand_in() is None
    assert passes_of(RankMargin(signal="gap"), 5) == 1
    attack = CAA(steps=2)

    def make(compressor: Compressor | None, decoding: Any = None, draw: int = 0) -> Any:
        del decoding, draw
        return target.view(attack.needs, compressor)

    def through(defense: Any) -> Tensor:
        view = defended(make, attack.needs, defense, compressor=plain, layout=target.layout)
        return attack(view, batch(images), 16 / 255, SEEDS).images

    assert torch.equal(through(one), through(stand_in))
    assert not torch.equal(through(one), attack(make(plain), batch(images), 16 / 255, SEEDS).images)


@pytest.mark.parametrize("signal", ["jaccard", "kendall"])
@pytest.mark.parametrize("plain", [FasterVLM(keep_tokens=9), FastV(layer=2, keep_tokens=9)])
def test_the_attack_makes_the_ranking_less_stable(
    plain: Compressor, signal: Any, target: LVLM, images: Tensor
) -> None:
    defense = RankMargin(signal=signal)
    attack = ForceFallback(signal=signal, steps=15)
    view: Any = target.view(Knowledge.COMPRESSED, plain)
    found = attack(view, batch(images), 24 / 255, SEEDS)
    before = defense.stability(target, images, QUESTIONS, plain, SEEDS)
    after = defense.stability(target, found.images, QUESTIONS, plain, SEEDS)
    assert float(after.mean()) < float(before.mean())
    assert found.backwards == 15 * 4 == attack.gradients(attack.budget(24 / 255))


def test_the_attack_knows_what_it_is_against() -> None:
    attack = ForceFallback(steps=7, shift=2)
    options = {"signal": "kendall", "shift": None, "views": "public"}
    assert attack.against("rank_margin", options) == ForceFallback(steps=7, signal="kendall")
    assert attack.against("rank_margin", {**options, "shift": 4}) == ForceFallback(
        steps=7, signal="kendall", shift=4
    )
    assert attack.against("rank_margin", {**options, "views": "random"}) is None
    assert attack.against("hybrid", options) is None


def test_a_blind_ranking_is_left_alone(target: LVLM, images: Tensor) -> None:
    plain = Random(keep_tokens=9)
    found = ForceFallback(steps=2)(
        target.view(Knowledge.COMPRESSED, plain), batch(images), 16 / 255, SEEDS
    )
    assert torch.equal(found.images, images)
    assert any(BLIND in note for note in found.notes)
    assert ForceFallback().idle(plain) == BLIND
    assert ForceFallback().idle(FasterVLM(keep_tokens=9)) is None
