"""Attacks on the answer: what they lower, on which path, towards which answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attacks import APGD, FGSM, PGD, AttackError
from attacks.answers import Aim, AnswerLoss, choose_targets, log_odds, wrong_options
from attacks.objectives import answer_divergence
from targets.base import Batch
from tests.fakes import FakeView, make_batch, pick

SEEDS = [1, 2, 3, 4, 5]
EPSILON = 16 / 255


@pytest.fixture
def view() -> FakeView:
    return FakeView()


@pytest.fixture
def batch() -> Batch:
    """Two, three, no, four and two options."""
    options = (("yes", "no"), ("no", "three", "green"), (), ("1234", "no", "a", "yes"), ("no", "a"))
    answers = ("yes", "three", "open", "no", "no")
    return replace(make_batch(5), answers=answers, options=options)


def attacked(batch: Batch, seed: int = 0) -> Tensor:
    noise = torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(seed))
    return (batch.images + 0.1 * noise).clamp(0, 1)


def scores(view: FakeView, batch: Batch, images: Tensor, row: int, path: Any) -> list[float]:
    """Log-probability of each option of one sample."""
    one = pick(batch, row)
    found = [
        -float(view.answer_nll(images[row : row + 1], one.questions, (text,), path=path))
        for text in (batch.options or ())[row]
    ]
    return found


@pytest.mark.parametrize("path", ["full", "compressed"])
def test_margins_of_a_mixed_batch_are_each_samples_own(
    view: FakeView, batch: Batch, path: Any
) -> None:
    images = attacked(batch)
    found = AnswerLoss(view, batch, Aim(path=path, loss="margin"))(images, 0)
    for row in (0, 1, 3, 4):
        options, answer = (batch.options or ())[row], batch.answers[row]
        each = dict(zip(options, scores(view, batch, images, row, path), strict=True))
        wanted = each.pop(answer) - max(each.values())
        assert float(found[row]) == pytest.approx(wanted, rel=1e-4)
    nll = view.answer_nll(images, batch.questions, batch.answers, path=path)
    tokens = 2  # of the fake's answers
    torch.testing.assert_close(found[2:3], log_odds(-nll[2:3] * tokens))


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_a_sample_does_not_depend_on_its_neighbours(
    view: FakeView, batch: Batch, loss: Any
) -> None:
    images = attacked(batch)
    aim = Aim(path="both", loss=loss, full_weight=0.3)
    targets = ("no", None, None, "yes", None)
    together = AnswerLoss(view, batch, aim, targets)(images, 0)
    for row in range(5):
        alone = AnswerLoss(view, pick(batch, row), aim, targets[row : row + 1])
        torch.testing.assert_close(alone(images[row : row + 1], 0), together[row : row + 1])


def test_dlr_falls_back_to_the_margin_and_says_so(view: FakeView, batch: Batch) -> None:
    images = attacked(batch)
    ratio = AnswerLoss(view, batch, Aim(loss="dlr"))
    margin = AnswerLoss(view, batch, Aim(loss="margin"))
    same = (ratio(images, 0) == margin(images, 0)).tolist()
    assert same == [True, False, True, False, True]
    assert any("dlr needs 3 options" in note for note in ratio.notes)
    assert not margin.notes
    three = pick(batch, 1)
    assert not AnswerLoss(view, three, Aim(loss="dlr")).notes
    assert AnswerLoss(view, three, Aim(loss="dlr"), ("no",)).notes  # a target needs a fourth


def test_both_paths_are_a_weighted_sum(view: FakeView, batch: Batch) -> None:
    images = attacked(batch)
    one = {
        path: AnswerLoss(view, batch, Aim(path=path))(images, 0)  # type: ignore[arg-type]
        for path in ("full", "compressed")
    }
    both = AnswerLoss(view, batch, Aim(path="both", full_weight=0.3))(images, 0)
    torch.testing.assert_close(both, one["compressed"] + 0.3 * one["full"])


def test_preservation_adds_the_divergence_of_the_full_path(view: FakeView, batch: Batch) -> None:
    images = attacked(batch)
    plain = AnswerLoss(view, batch, Aim(path="compressed"))
    kept = AnswerLoss(view, batch, Aim(path="compressed", preserve_weight=2.0))
    torch.testing.assert_close(kept(batch.images, 0), plain(batch.images, 0))
    clean, real = view.answer_logprobs(batch.images, batch.questions, batch.answers)
    now, _ = view.answer_logprobs(images, batch.questions, batch.answers)
    drift = answer_divergence(clean, now, real)
    assert drift.min() > 0
    torch.testing.assert_close(kept(images, 0) - plain(images, 0), 2 * drift, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [PGD, APGD])
def test_preservation_keeps_the_full_path_closer(kind: Any, view: FakeView) -> None:
    batch = make_batch(5)
    clean, real = view.answer_logprobs(batch.images, batch.questions, batch.answers)

    def drift(weight: float) -> float:
        attack = kind(path="compressed", preserve_weight=weight, steps=20)
        images = attack(view, batch, EPSILON, SEEDS).images
        now, _ = view.answer_logprobs(images, batch.questions, batch.answers)
        return float(answer_divergence(clean, now, real).mean())

    assert drift(20.0) < 0.5 * drift(0.0)


def nll(view: FakeView, images: Tensor, batch: Batch, text: str, path: Any) -> Tensor:
    return view.answer_nll(images, batch.questions, (text,) * len(images), path=path)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("path", ["full", "compressed"])
@pytest.mark.parametrize("kind", [PGD, FGSM])
def test_a_target_becomes_likelier(kind: Any, path: Any, norm: Any, view: FakeView) -> None:
    batch = make_batch(5)
    steps = {"steps": 15} if kind is PGD else {}
    attack = kind(path=path, target="green", norm=norm, **steps)
    result = attack(view, batch, EPSILON if norm == "linf" else 1.5, SEEDS)
    before = nll(view, batch.images, batch, "green", path)
    after = nll(view, result.images, batch, "green", path)
    assert (after <= before).all()
    assert (after < before - 0.05).sum() >= 4
    assert not result.notes


def test_the_likeliest_wrong_option_is_the_target(view: FakeView, batch: Batch) -> None:
    chosen, notes = choose_targets(view, batch, "option", "compressed")
    ranked = wrong_options(view, batch, "compressed", 9)
    assert any("no wrong one to aim at" in note for note in notes)
    for row, options in enumerate(batch.options or ()):
        each = dict(zip(options, scores(view, batch, batch.images, row, "compressed"), strict=True))
        each.pop(batch.answers[row], None)
        wanted = sorted(each, key=lambda text: -each[text])
        assert list(ranked[row]) == wanted
        assert chosen[row] == (wanted[0] if wanted else None)


def test_a_target_that_is_the_right_answer_is_no_target(view: FakeView) -> None:
    batch = make_batch(4)  # no, yes, no, yes
    chosen, notes = choose_targets(view, batch, "yes", "full")
    assert chosen == ("yes", None, "yes", None)
    assert any("right answer to some samples" in note for note in notes)
    result = PGD(target="yes", steps=10)(view, batch, EPSILON, SEEDS[:4])
    after = view.answer_nll(result.images, batch.questions, ("yes",) * 4)
    before = view.answer_nll(batch.images, batch.questions, ("yes",) * 4)
    assert (after < before).tolist() == [True, False, True, False]


@pytest.mark.parametrize("attack", [PGD, APGD])
@pytest.mark.parametrize("path", ["full", "both"])
def test_the_full_path_cannot_be_attacked_and_preserved(attack: Any, path: str) -> None:
    with pytest.raises(AttackError, match="attacked and preserved at once"):
        attack(path=path, preserve_weight=0.5)


def test_a_right_answer_outside_its_options_is_named(view: FakeView, batch: Batch) -> None:
    wrong = replace(batch, answers=("maybe", *batch.answers[1:]))
    with pytest.raises(AttackError, match="sample s0: the answer 'maybe' is not among") as caught:
        APGD(loss="margin")(view, wrong, EPSILON, SEEDS)
    assert caught.value.sample_ids == ("s0",)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgsm_is_one_step_of_pgd(norm: Any, view: FakeView) -> None:
    batch, epsilon = make_batch(5), EPSILON if norm == "linf" else 1.0
    one = FGSM(norm=norm)(view, batch, epsilon, SEEDS)
    pgd = PGD(norm=norm, steps=1, alpha=epsilon, random_start=False)
    other = pgd(view, batch, epsilon, SEEDS)
    assert torch.equal(one.images, other.images)
    assert one.loss == other.loss
    assert (one.forwards, one.backwards) == (2, 1)


def test_fgsm_moves_every_pixel_by_epsilon_along_the_sign(view: FakeView) -> None:
    batch = make_batch(5)
    live = batch.images.clone().requires_grad_()
    loss = view.answer_nll(live, batch.questions, batch.answers)
    (gradient,) = torch.autograd.grad(loss.sum(), live)
    wanted = (batch.images + EPSILON * gradient.sign()).clamp(0, 1)
    result = FGSM()(view, batch, EPSILON, SEEDS)
    taken = [row for row in range(5) if min(result.loss[row]) < result.loss[row][0]]
    assert len(taken) >= 3
    torch.testing.assert_close(result.images[taken], wanted[taken])


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["rfgsm", "fast"])
def test_random_starts_of_fgsm_differ_by_seed_and_stay_inside(
    start: Any, norm: Any, view: FakeView
) -> None:
    batch, epsilon = make_batch(5), EPSILON if norm == "linf" else 1.0
    attack = FGSM(start=start, norm=norm)
    one, two = (attack(view, batch, epsilon, [s + i for s in SEEDS]) for i in (0, 9))
    assert not torch.equal(one.images, two.images)
    assert float((one.linf if norm == "linf" else one.l2).max()) <= epsilon
    assert one.loss[0][0] != FGSM(norm=norm)(view, batch, epsilon, SEEDS).loss[0][0]


def test_restarts_and_targets_are_declared_and_spent(view: FakeView, batch: Batch) -> None:
    attack = APGD(targets=3, restarts=2, steps=4, loss="margin")
    budget = attack.budget(EPSILON)
    assert (budget.steps, budget.restarts) == (4, 6)
    three = pick(batch, 3)  # has four options, so three targets
    result = attack(view, three, EPSILON, SEEDS[:1])
    assert result.backwards == 4 * 6
    assert len(result.loss[0]) == 5


def test_targeted_apgd_keeps_the_lowest_margin_of_all_targets(view: FakeView, batch: Batch) -> None:
    def margins(targets: int) -> Tensor:
        attack = APGD(targets=targets, steps=8, loss="margin", path="compressed")
        images = attack(view, batch, 8 / 255, SEEDS).images
        return AnswerLoss(view, batch, Aim(path="compressed", loss="margin"))(images, 0)

    one, three = margins(1), margins(3)
    assert (three <= one).all()
    torch.testing.assert_close(three[[0, 2, 4]], one[[0, 2, 4]])  # have no second wrong option


def test_targeted_apgd_says_which_questions_had_no_target(view: FakeView, batch: Batch) -> None:
    notes = APGD(targets=2, steps=2, loss="dlr")(view, batch, EPSILON, SEEDS).notes
    assert any("no wrong one to aim at" in note for note in notes)
    assert any("dlr needs 3 options" in note for note in notes)


@pytest.mark.parametrize("path", ["full", "compressed"])
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_apgd_flips_the_margin_where_noise_does_not(
    view: FakeView, batch: Batch, loss: Any, path: Any
) -> None:
    judge = AnswerLoss(view, batch, Aim(path=path, loss="margin"))
    noise, found = (
        judge(APGD(loss=loss, path=path, steps=n)(view, batch, EPSILON, SEEDS).images, 0)
        for n in (0, 25)
    )
    # The ratio is -1 and flat where the right option is the third: such a sample is broken already.
    flat = (noise < 0) if loss == "dlr" else torch.zeros(5, dtype=torch.bool)
    assert ((found < noise) | flat).all()
    assert (found < 0).sum() >= 4
