"""Detectors on tiny models: a sample's score is its own, live, and 0 where there is nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import families
import pytest
import tiny
import torch
from torch import Tensor

from attacks.attention_only import AttentionOnly
from attacks.noise import Noise
from defenses.activation_trajectory import ActivationTrajectory
from defenses.base import AdaptiveRoute, DefenseError
from defenses.detector import Detector, Traffic, stacked
from defenses.disagreement_monitor import DisagreementMonitor
from defenses.feature_squeezing import FeatureSqueezing
from defenses.mahalanobis import Mahalanobis
from defenses.rank_volatility import RankVolatility
from targets.base import Batch
from targets.compression import DivPrune, FasterVLM, FastV, Random, VisionZip
from targets.compression.base import Compressor
from targets.lvlm import LVLM

DETECTORS: dict[str, Detector] = {
    "answers": DisagreementMonitor(signal="answer", max_new_tokens=3),
    "jsd": DisagreementMonitor(),
    "kl": DisagreementMonitor(signal="kl"),
    "gap": DisagreementMonitor(signal="gap", max_new_tokens=3),
    "half": DisagreementMonitor(share=0.5),
    "volatility": RankVolatility(),
    "volatility by noise": RankVolatility(views="noise", copies=2, measure="spearman"),
    "squeezing": FeatureSqueezing(search=3, patch=1),
    "mahalanobis": Mahalanobis(dimensions=3),
    "trajectory": ActivationTrajectory(),
}
WATCHED: dict[str, Compressor] = {
    "fastv": FastV(layer=2, keep_tokens=9),
    "visionzip": VisionZip(keep_tokens=9),
}
COUNT = 3


@pytest.fixture(scope="module")
def target() -> LVLM:
    return LVLM(tiny.build_model(), tiny.build_processor())


def traffic(model: LVLM, compressor: Compressor | None, images: Tensor, first: int = 0) -> Traffic:
    rows = range(first, first + len(images))
    questions = tuple(tiny.QUESTIONS[row % 3] for row in rows)
    return Traffic(model, compressor, images, questions, tuple(rows), tuple(rows))


def taught(detector: Detector, model: LVLM, compressor: Compressor) -> Any:
    """What a detector learns from twelve pictures."""
    if not detector.learns:
        return {}
    images = tiny.pictures(12, seed=9)
    requests = traffic(model, compressor, images)
    with torch.no_grad():
        clean = stacked([detector.observe(requests)])
    if not detector.contrasts:
        return detector.fit(clean, {}, {})
    batch = Batch(tuple(map(str, range(12))), images, requests.questions, ("yes",) * 12)
    parts = []
    for attack in (Noise(), AttentionOnly(steps=2)):
        made = attack(model.view(attack.needs), batch, 8 / 255, range(12))
        with torch.no_grad():
            parts.append(stacked([detector.observe(requests.showing(made.images))]))
    return detector.fit(clean, *parts)


PAIRS = [(name, "visionzip") for name in DETECTORS] + [
    ("jsd", "fastv"),
    ("volatility", "fastv"),
    ("squeezing", "fastv"),
]
"""Of the others a compressor behind the tower changes nothing."""


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_score_is_its_own_and_live(name: str, kind: str, target: LVLM) -> None:
    detector, compressor = DETECTORS[name], WATCHED[kind]
    state = taught(detector, target, compressor)
    images = tiny.pictures(COUNT, seed=3)
    whole = traffic(target, compressor, images)
    with torch.no_grad():
        found = detector.score(whole, state)
        again = detector.score(whole, state)
        turned = Traffic(
            target,
            compressor,
            images.flip(0),
            whole.questions[::-1],
            whole.seeds[::-1],
            whole.seeds[::-1],
        )
        alone = [
            detector.score(traffic(target, compressor, images[row : row + 1], row), state)
            for row in range(COUNT)
        ]
        torch.testing.assert_close(detector.score(turned, state).flip(0), found)
    torch.testing.assert_close(again, found, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat(alone), found, rtol=1e-4, atol=1e-4)
    assert found.shape == (COUNT,)
    live = images.clone().requires_grad_()
    score = detector.score(replace(whole.showing(live), relax=True), state)
    torch.testing.assert_close(score.detach(), found, rtol=1e-4, atol=1e-4)
    (slope,) = torch.autograd.grad(score.sum(), live)
    assert bool(slope.isfinite().all())
    flat = slope.abs().flatten(1).sum(1)
    seen = torch.ones(COUNT, dtype=torch.bool)
    if name in ("half", "answers", "gap"):
        seen = found > 0  # what is not watched has no gradient, nor what both paths say alike
    assert bool((flat[seen] > 0).all())
    assert detector.route is not AdaptiveRoute.NONE


@pytest.mark.parametrize("signal", ["answer", "jsd", "kl", "gap"])
def test_equal_paths_are_never_flagged(signal: Any, target: LVLM) -> None:
    detector = DisagreementMonitor(signal=signal, max_new_tokens=3)
    images = tiny.pictures(COUNT, seed=5)
    for compressor in (None, Random(layer=2, keep_tokens=tiny.TOKENS)):
        requests = traffic(target, compressor, images)
        with torch.no_grad():
            assert detector.score(requests, {}).tolist() == [0.0] * COUNT
    with torch.no_grad():
        requests = traffic(target, FastV(layer=1, keep_tokens=1), images)
        assert bool((detector.score(requests, {}) > 0).any()) or signal in ("answer", "gap")


def test_what_is_not_sampled_costs_nothing(target: LVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    images, compressor = tiny.pictures(COUNT, seed=5), FastV(layer=1, keep_tokens=2)
    assert DisagreementMonitor(share=0).cost(3.0).language == 0
    assert DisagreementMonitor(share=0.25).cost(4.0).language == 1
    with torch.no_grad():
        every = DisagreementMonitor().score(traffic(target, compressor, images), {})
        some = Traffic(target, compressor, images, tiny.QUESTIONS[:COUNT], (1, 2, 3), (0, 1, 2))
        half = DisagreementMonitor(share=0.5).score(some, {})
    drawn = [float(torch.rand((), generator=torch.Generator().manual_seed(s))) for s in (1, 2, 3)]
    wanted = [v if d < 0.5 else 0.0 for v, d in zip(every.tolist(), drawn, strict=True)]
    assert half.tolist() == pytest.approx(wanted, abs=1e-5)
    assert 0 < sum(d < 0.5 for d in drawn) < 3

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was run")

    monkeypatch.setattr(type(target.passes), "answer_logprobs", never)
    nothing = DisagreementMonitor(share=0).score(traffic(target, compressor, images), {})
    assert nothing.tolist() == [0.0] * COUNT


def test_answers_that_differ_are_seen(target: LVLM) -> None:
    images, compressor = tiny.pictures(8, seed=5), FastV(layer=1, keep_tokens=1)
    requests = traffic(target, compressor, images)
    full = target.answer(images, requests.questions, max_new_tokens=4).texts
    said = target.answer(images, requests.questions, compressor=compressor, max_new_tokens=4).texts
    assert full != said
    with torch.no_grad():
        found = DisagreementMonitor(signal="answer", max_new_tokens=4).score(requests, {}).tolist()
        gap = DisagreementMonitor(signal="gap", max_new_tokens=4).score(requests, {}).tolist()
    assert found == [float(a != b) for a, b in zip(full, said, strict=True)]
    assert [one > 0 for one in gap] == [a != b for a, b in zip(full, said, strict=True)]


def test_volatility_watches_a_ranking(target: LVLM) -> None:
    assert RankVolatility().refuses(FasterVLM(keep_tokens=9)) is None
    assert "attention" in str(RankVolatility().refuses(DivPrune(keep_tokens=9)))
    with pytest.raises(DefenseError, match="name a compressor"):
        RankVolatility().observe(traffic(target, None, tiny.pictures(1)))


def test_other_picture_sizes(target: LVLM) -> None:
    """Pictures of one size in a batch, whatever the size."""
    small = torch.nn.functional.interpolate(tiny.pictures(2, seed=1), size=(64, 80))
    for name, detector in DETECTORS.items():
        state = taught(detector, target, WATCHED["visionzip"])
        with torch.no_grad():
            found = detector.score(traffic(target, WATCHED["visionzip"], small), state)
        assert found.shape == (2,), name


def test_options_are_checked() -> None:
    with pytest.raises(DefenseError, match=r"disagreement_monitor: share is 1\.5"):
        DisagreementMonitor(share=1.5)
    with pytest.raises(DefenseError, match="feature_squeezing: bit_depth is 9"):
        FeatureSqueezing(bit_depth=9)
    with pytest.raises(DefenseError, match="search is 4; allowed is an odd side"):
        FeatureSqueezing(search=4)
    with pytest.raises(DefenseError, match="are all null"):
        FeatureSqueezing(bit_depth=None, window=None, search=None)
    with pytest.raises(DefenseError, match="2 images but 1 questions"):
        Traffic(None, None, torch.zeros(2, 3, 4, 4), ("a",), (1, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next", "smolvlm"])
def test_other_families(family: str) -> None:
    """Towers without CLS, of several tiles, with merged patches."""
    model, processor = families.build(family)
    target = LVLM(model, processor)
    size = target.image_size
    images = torch.rand((4, 3, *size), generator=torch.Generator().manual_seed(0))
    compressor = FastV(layer=1, retention=0.5)
    questions = ("is there a red circle ?",) * 4
    requests = Traffic(target, compressor, images, questions, (0, 1, 2, 3))
    for detector in (Mahalanobis(dimensions=2), ActivationTrajectory(), DisagreementMonitor()):
        with torch.no_grad():
            seen = detector.observe(requests)
            state = detector.fit(seen, seen, seen) if detector.learns else {}
            assert bool(detector.score(requests, state).isfinite().all()), detector
