"""The encoder attacks on the fake target: published settings, ablations, and what they look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from attacks import CAGE, CIRA, FATA, AttackError, AttentionOnly, Budget, Descent, VEAttack
from attacks.cira import half_token, translations
from attacks.descent import descend
from attacks.encoder import EncoderAttack, kept_range, present_layers
from attacks.encoder_losses import (
    best_tokens,
    displacement,
    drift,
    inverted_ranking,
    ranks,
    weighted_mean,
)
from attacks.seeds import SeedBank
from targets.base import EncoderView, Knowledge, TowerLayer
from tests.fakes import FakeView, make_batch

SEEDS = [5, 6, 7, 8]
EPSILON = 8 / 255
ALL: list[Callable[..., EncoderAttack]] = [CAGE, FATA, AttentionOnly, CIRA, VEAttack]


def fake(**options: Any) -> FakeView:
    return FakeView(Knowledge.ENCODER, **options)


def as_encoder(view: object) -> EncoderView:
    return cast(EncoderView, view)


@pytest.mark.parametrize("kind", ALL)
def test_published_settings(kind: Callable[..., EncoderAttack]) -> None:
    attack = kind()
    budget = attack.budget(2 / 255)
    assert (budget.steps, budget.restarts, budget.norm) == (100, 1, "linf")
    assert budget.alpha == pytest.approx(1 / 255 if kind is VEAttack else 0.5 / 255)
    assert attack.budget(4 / 255).alpha == pytest.approx(1 / 255)  # of all five
    assert kind(alpha=0.25).budget(2 / 255).alpha == 0.25
    assert attack.needs is Knowledge.ENCODER
    assert not attack.knows_compression


def test_published_weights_and_starts() -> None:
    assert (CAGE().efd_weight, CAGE().rda_weight, CAGE().layer) == (1, 0.005, -2)
    assert FATA().semantic_weight == 1
    assert (CIRA().gsh_weight, CIRA().hep_weight, CIRA().layers) == (1, 0.8, (-1, -3, -5))
    assert VEAttack().momentum == 0.9
    starts = [cast(Any, kind()).random_start for kind in ALL]
    assert starts == [False, True, True, False, True]


@pytest.mark.parametrize("kind", ALL)
def test_only_the_tower_is_looked_at(kind: Callable[..., EncoderAttack]) -> None:
    view = fake()
    result = kind(steps=3)(view, make_batch(), EPSILON, SEEDS)
    assert set(view.calls) == {"layers"}
    assert (result.forwards, result.backwards) == (5, 3)  # the clean images, and T + 1


@pytest.mark.parametrize("kind", ALL)
def test_questions_and_answers_do_not_matter(kind: Callable[..., EncoderAttack]) -> None:
    batch = make_batch()
    other = replace(batch, questions=("what ?",) * 4, answers=("maybe",) * 4)
    attack = kind(steps=3)
    one, two = (attack(fake(), samples, EPSILON, SEEDS) for samples in (batch, other))
    assert torch.equal(one.images, two.images)


@pytest.mark.parametrize("kind", ALL)
def test_no_radius_is_no_change(kind: Callable[..., EncoderAttack]) -> None:
    batch = make_batch()
    assert torch.equal(kind()(fake(), batch, 0.0, SEEDS).images, batch.images)


def test_without_its_semantic_term_fata_is_attention_only() -> None:
    batch = make_batch()
    base = AttentionOnly(steps=6, top=3)(fake(), batch, EPSILON, SEEDS)
    same = FATA(steps=6, top=3, semantic_weight=0)(fake(), batch, EPSILON, SEEDS)
    full = FATA(steps=6, top=3)(fake(), batch, EPSILON, SEEDS)
    assert torch.equal(base.images, same.images)
    assert base.loss == same.loss
    assert not torch.equal(base.images, full.images)


def test_fata_keeps_features_that_attention_only_breaks() -> None:
    batch, view = make_batch(), fake()
    (clean,) = view.layers(batch.images, (-1,))
    group = best_tokens(clean.score, 4)

    def left(attack: EncoderAttack) -> tuple[float, float]:
        images = attack(view, batch, 24 / 255, SEEDS).images
        (seen,) = view.layers(images, (-1,))
        moved = weighted_mean(drift(seen.hidden, clean.hidden), group.float())
        return float(moved.mean()), float((seen.score * group).sum(1).mean())

    drifts, attention = zip(
        *(left(one) for one in (FATA(top=4, semantic_weight=4), AttentionOnly(top=4))), strict=True
    )
    untouched = float((clean.score * group).sum(1).mean())
    assert drifts[0] < drifts[1] / 2
    assert max(attention) < untouched


def test_the_group_is_that_of_the_clean_image() -> None:
    """At a start where other tokens lead, the loss still counts the clean leaders."""
    batch, view = make_batch(), fake()
    attack = AttentionOnly(steps=0, top=2)
    result = attack(view, batch, 1.0, SEEDS)
    (clean,), (seen,) = view.layers(batch.images, (-1,)), view.layers(result.images, (-1,))
    ours = (seen.score * best_tokens(clean.score, 2)).sum(1)
    theirs = (seen.score * best_tokens(seen.score, 2)).sum(1)
    assert [trace[0] for trace in result.loss] == pytest.approx(ours.tolist(), abs=1e-5)
    assert float((theirs - ours).min()) > 0.01


def test_cage_climbs_its_own_objective() -> None:
    """The traced loss of the last judged image, recomputed from the formulas."""
    batch, view = make_batch(), fake()
    attack = CAGE(steps=8, k_min=2, k_max=6, rda_weight=0, random_start=True)
    result = attack(view, batch, EPSILON, SEEDS)
    (clean,), (seen,) = (view.layers(one, (-2,)) for one in (batch.images, result.images))
    alive = ((6 - ranks(seen.score)) / 4).clamp(0, 1)
    gain = weighted_mean(drift(seen.hidden, clean.hidden), alive)
    assert [-min(trace) for trace in result.loss] == pytest.approx(gain.tolist(), abs=1e-5)


@pytest.mark.parametrize("score", ["attention", "norm"])
def test_cage_moves_scores_towards_what_drifted(score: str) -> None:
    """With L_RDA alone the tokens that drift and the tokens that score become the same."""
    batch, view = make_batch(6), fake()
    attack = CAGE(steps=60, efd_weight=0, rda_weight=1, score=cast(Any, score), random_start=True)
    seeds = [*SEEDS, 9, 10]
    (clean,) = view.layers(batch.images, (-2,))
    found = []
    for images in (
        attack(view, batch, 16 / 255, seeds).images,
        replace(attack, steps=0)(view, batch, 16 / 255, seeds).images,
    ):
        (seen,) = view.layers(images, (-2,))
        value = seen.score if score == "attention" else seen.hidden.norm(dim=-1)
        moved = drift(seen.hidden, clean.hidden)
        pairs = torch.stack([moved, value], 1)
        found.append(torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs]).mean())
    assert float(found[0]) > float(found[1]) + 0.3


def test_cira_climbs_its_own_objective() -> None:
    batch, view = make_batch(), fake()
    attack = CIRA(steps=8, k_min=2, k_max=6)
    result = attack(view, batch, EPSILON, SEEDS)

    def looked(images: Tensor) -> tuple[Tensor, Tensor]:
        last, other = view.layers(images, (-1, -3), normalised=True)
        return (last.score + other.score) / 2, last.hidden

    (before, kept), (after, seen) = looked(batch.images), looked(result.images)
    weights = displacement(ranks(before), ranks(after), 2, 6)
    loss = 0.8 * weighted_mean(drift(seen, kept) / 2, weights)
    loss = loss - inverted_ranking(after, ranks(before))
    assert [min(trace) for trace in result.loss] == pytest.approx(loss.tolist(), abs=1e-5)
    assert any("3 layers; [-5]" in note for note in result.notes)


def test_cira_turns_the_ranking_and_keeps_what_it_displaces() -> None:
    batch, view = make_batch(), fake()
    (clean,) = view.layers(batch.images, (-1,), normalised=True)
    order = ranks(clean.score)

    def state(attack: EncoderAttack) -> tuple[float, float]:
        images = attack(view, batch, 24 / 255, SEEDS).images
        (seen,) = view.layers(images, (-1,), normalised=True)
        weights = displacement(order, ranks(seen.score), 2, 6)
        moved = weighted_mean(drift(seen.hidden, clean.hidden), weights)
        return float(inverted_ranking(seen.score, order).mean()), float(moved.mean())

    common = {"k_min": 2, "k_max": 6, "layers": (-1,), "steps": 60}
    start = float(inverted_ranking(clean.score, order).mean())
    whole, bare = state(CIRA(**common)), state(CIRA(**common, hep_weight=0))  # type: ignore[arg-type]
    assert start < -0.5 < 0 < bare[0]
    assert whole[1] < bare[1]


def test_without_gsh_nothing_moves_from_the_clean_image() -> None:
    result = CIRA(steps=3, gsh_weight=0)(fake(), make_batch(), EPSILON, SEEDS)
    assert float(result.linf.max()) == 0
    assert all(any(c.startswith("zero-gradient") for c in found) for found in result.checks)


def test_adaptive_cira_averages_four_views() -> None:
    batch, view = make_batch(), fake()
    attack = CIRA(steps=0, random_start=True, views="translations", shift=3, layers=(-1,))
    result = attack(view, batch, EPSILON, SEEDS)
    single = []
    for clean, seen in zip(
        translations(batch.images, 3).chunk(4), translations(result.images, 3).chunk(4), strict=True
    ):
        (before,), (after,) = (view.layers(x, (-1,), normalised=True) for x in (clean, seen))
        weights = displacement(ranks(before.score), ranks(after.score), 1, 5)
        loss = 0.8 * weighted_mean(drift(after.hidden, before.hidden) / 2, weights)
        single.append(loss - inverted_ranking(after.score, ranks(before.score)))
    wanted = torch.stack(single).mean(0)
    assert [trace[0] for trace in result.loss] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert (result.forwards, result.backwards) == (8, 0)


def test_translations_move_pictures_and_reflect_the_edge() -> None:
    image = torch.arange(20.0).view(1, 1, 4, 5).expand(1, 3, 4, 5)
    still, right, down, both = translations(image, 2)
    assert torch.equal(still, image[0])
    assert torch.equal(right[:, :, 2:], image[0, :, :, :3])
    assert right[0, 0].tolist() == [2, 1, 0, 1, 2]
    assert torch.equal(down[:, 2:], image[0, :, :2])
    assert down[0, :, 0].tolist() == [10, 5, 0, 5]
    assert torch.equal(both[:, 2:, 2:], image[0, :, :2, :3])


def test_a_shift_is_half_a_token() -> None:
    assert half_token(as_encoder(fake()), make_batch().images) == 2  # tokens of 4 × 4
    assert half_token(as_encoder(fake(patch=2)), make_batch().images) == 1
    with pytest.raises(AttackError, match="shift is 16 pixels in pictures of 16 × 16"):
        CIRA(steps=1, views="translations", shift=16)(fake(), make_batch(), EPSILON, SEEDS)


@pytest.mark.parametrize(
    ("k_min", "k_max", "tokens", "wanted"),
    [
        (None, None, 576, (16, 192)),
        (None, None, 144, (4, 48)),
        (None, None, 4, (1, 1)),
        (3, 9, 144, (3, 9)),
        (None, 2, 144, (2, 2)),
        (50, None, 144, (48, 48)),
        (100, 700, 144, (100, 144)),
        (300, 700, 144, (144, 144)),
    ],
)
def test_budgets_imagined(
    k_min: int | None, k_max: int | None, tokens: int, wanted: tuple[int, int]
) -> None:
    found = kept_range(k_min, k_max, (16, 192), tokens)
    assert (found.low, found.high) == wanted
    changed = [x for x, y in ((k_min, found.low), (k_max, found.high)) if x not in (None, y)]
    assert bool(found.notes) == bool(changed)
    assert all(str(number) in found.notes[0] for number in changed)


@pytest.mark.parametrize("kind", [CAGE, CIRA])
def test_budgets_the_wrong_way_round_are_refused(kind: Callable[..., EncoderAttack]) -> None:
    with pytest.raises(AttackError, match="k_min is 9 and k_max is 4"):
        kind(k_min=9, k_max=4)
    assert kind(k_min=4, k_max=4)(fake(), make_batch(), EPSILON, SEEDS).notes is not None
    notes = kind(steps=1, k_min=4, k_max=100)(fake(), make_batch(), EPSILON, SEEDS).notes
    assert any("budgets from 4 to 16" in note for note in notes)


def test_layers_a_tower_does_not_have() -> None:
    view = as_encoder(fake())
    assert present_layers(view, (-1, -3)) == ((-1, -3), ())
    found, notes = present_layers(view, (-1, -5, 7))
    assert found == (-1,)
    assert "[-5, 7]" in notes[0]
    with pytest.raises(AttackError, match="from -3 to 2"):
        CIRA(steps=1, layers=(-4,))(fake(), make_batch(), EPSILON, SEEDS)


def test_veattack_moves_features_further_the_longer_it_runs() -> None:
    result = VEAttack(steps=12, alpha=1 / 255)(fake(), make_batch(), EPSILON, SEEDS)
    for trace in result.loss:
        assert min(trace) == trace[-1] < trace[6] < trace[0] < 0


def test_a_velocity_of_signs_is_the_sign_of_the_gradient_unless_that_is_zero() -> None:
    """As published: momentum below 1 cannot outvote a gradient, it only fills its zeros."""
    batch = make_batch(1, size=4)
    weight = torch.ones(1, 3, 4, 4)
    weight[:, 0] = -1

    def loss(images: Tensor, step: int) -> Tensor:
        # Channel 0 turns round after the first step, channel 1 falls silent, channel 2 goes on.
        seen = weight.clone()
        if step > 0:
            seen[:, 0] = 1
            seen[:, 1] = 0
        return (seen * images).flatten(1).sum(1)

    def moved(velocity: str, momentum: float) -> Tensor:
        middle = replace(batch, images=torch.full_like(batch.images, 128 / 255))
        how = Descent(
            momentum=momentum, velocity=cast(Any, velocity), random_start=False, rounded=False
        )
        budget = Budget(0.4, alpha=0.1, steps=2)
        seen: list[Tensor] = []

        def spy(images: Tensor, step: int) -> Tensor:
            seen.append(images.detach())
            return loss(images, step)

        descend(spy, middle, budget, SeedBank([0]), how=how)
        return (seen[-1] - middle.images)[0, :, 0, 0]

    # Two steps of 0.1: there and back; on, though the gradient is zero; on.
    torch.testing.assert_close(moved("direction", 0.9), torch.tensor([0.0, -0.2, -0.2]))
    torch.testing.assert_close(moved("direction", 0.0), torch.tensor([0.0, -0.1, -0.2]))
    torch.testing.assert_close(moved("direction", 1.0), torch.tensor([0.1, -0.2, -0.2]))


class Watching:
    """An encoder view that notes which layers are asked for, and how."""

    def __init__(self) -> None:
        self.inner, self.asked = fake(), list[tuple[tuple[int, ...], bool]]()
        self.knowledge = Knowledge.ENCODER

    def tower_depth(self) -> int:
        return 24

    def layers(
        self, images: Tensor, numbers: Sequence[int], *, normalised: bool = False
    ) -> tuple[TowerLayer, ...]:
        self.asked.append((tuple(numbers), normalised))
        return self.inner.layers(images, [max(n, -3) for n in numbers], normalised=normalised)


@pytest.mark.parametrize(
    ("attack", "wanted"),
    [
        (CAGE(steps=1), ((-2,), False)),
        (CAGE(steps=1, layer=-3), ((-3,), False)),
        (FATA(steps=1), ((-1,), False)),
        (AttentionOnly(steps=1), ((-1,), False)),
        (CIRA(steps=1), ((-1, -1, -3, -5), True)),
        (VEAttack(steps=1), ((-1,), False)),
        (VEAttack(steps=1, layer=-2, normalised=True), ((-2,), True)),
    ],
    ids=repr,
)
def test_published_layers(attack: EncoderAttack, wanted: tuple[tuple[int, ...], bool]) -> None:
    view = Watching()
    result = attack(as_encoder(view), make_batch(), EPSILON, SEEDS)
    assert set(view.asked) == {wanted}
    assert result.notes == ()
