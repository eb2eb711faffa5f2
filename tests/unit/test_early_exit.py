"""Samples that are broken leave, and the others go on as if they had never been there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from answered import answered
from torch import Tensor

from attacks import APGD, PGD, AttackError
from attacks.answers import Aim, AnswerLoss
from attacks.autostep import autostep
from attacks.budget import Budget, quantise
from attacks.descent import descend, random_point
from attacks.early_exit import CONFIDENCE, EarlyExit
from attacks.evade import Evade
from attacks.goal import Judge
from attacks.seeds import SeedBank
from defenses.adaptive import draws_at_random
from defenses.random_floor import RandomFloor
from defenses.translation_consensus import TranslationConsensus
from redteam.plan import make_plan
from redteam.scenario import Scenario, load_scenario
from targets.base import Batch
from tests.fakes import FakeView, make_batch, pick

SEEDS = [1, 2, 3, 4, 5, 6]
EPSILON = 24 / 255
OPTIONS: dict[str, Any] = {"steps": 6, "stop_when_broken": True}

PATHS: list[dict[str, Any]] = [
    {"path": "full"},
    {"path": "compressed"},
    {"path": "both"},
    {"path": "compressed", "preserve_weight": 0.3},
]


@dataclass
class Counting(FakeView):
    """Notes how many pictures every loss looks at."""

    rows: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)

    def answer_nll(self, images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.rows.append(len(images))
        return super().answer_nll(images, *args, **kwargs)

    def ask(self, images: Tensor, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        self.asked.append(len(images))
        return super().ask(images, *args, **kwargs)


def broken(view: FakeView, batch: Batch, images: Tensor, aim: Aim) -> list[bool]:
    """By the slow way: all answers, one after another."""
    found = []
    for row, right in enumerate(batch.answers):
        image, question = images[row : row + 1], (batch.questions[row],)
        full = view.ask(image, question, path="full")[0] == right
        compressed = view.ask(image, question, path="compressed")[0] == right
        found.append(
            {
                "full": not full,
                "compressed": not compressed,
                "both": not full and not compressed,
                "compression_only": full and not compressed,
            }[aim.end]
        )
    return found


@pytest.mark.parametrize("options", PATHS)
def test_equals_a_plain_loop_that_stops(options: Any) -> None:
    """PGD in its shortest form, one sample at a time, up to the first image that breaks it."""
    view, aim = FakeView(), Aim(**options)
    batch, alpha = answered(6), 4 / 255
    budget = Budget(EPSILON, alpha=alpha, steps=6, restarts=2)
    attack = PGD(**OPTIONS, **options, alpha=alpha, restarts=2)
    found = attack(view, batch, EPSILON, SEEDS)

    def ended(loss: AnswerLoss, one: Batch, image: Tensor) -> bool:
        assert loss.hold is not None
        return float(loss.hold) < -CONFIDENCE and broken(view, one, image, aim)[0]

    for i in range(6):
        one, bank = pick(batch, i), SeedBank([SEEDS[i]])
        best, lowest, stopped = one.images, torch.inf, False
        for restart in range(2):
            x = random_point(one.images, budget, bank.child(f"restart {restart}"), None)
            asked = torch.inf
            for _ in range(7):
                loss = AnswerLoss(view, one, aim, watched=True)
                seen = quantise(one.images, x, budget).detach().requires_grad_()
                value = loss(seen, 0)
                worth = float(value.detach())
                stopped = worth < asked and ended(loss, one, seen.detach())
                if float(loss.hold) < -CONFIDENCE:  # type: ignore[arg-type]
                    asked = min(asked, worth)
                if stopped or worth < lowest:
                    best, lowest = seen.detach(), worth
                if stopped:
                    break
                (gradient,) = torch.autograd.grad(value.sum(), seen)
                x = one.images + (x - alpha * gradient.sign() - one.images).clamp(-EPSILON, EPSILON)
                x = x.clamp(0, 1)
            if stopped:
                break
        torch.testing.assert_close(found.images[i : i + 1], best)


def runs(kind: Any, objective: Any, batch: Batch, restarts: int = 1, steps: int = 8) -> Any:
    budget = Budget(EPSILON, steps=steps, restarts=restarts)
    if kind is PGD:
        return descend(objective, batch, budget, SeedBank(SEEDS[: len(batch.ids)]))
    return autostep(objective, batch, budget, SeedBank(SEEDS[: len(batch.ids)]))


class Recording:
    """A loss that keeps every image it has judged."""

    def __init__(self, loss: AnswerLoss) -> None:
        self.loss, self.seen, self.holds = loss, list[Tensor](), list[float]()

    def __call__(self, images: Tensor, step: int) -> Tensor:
        found = self.loss(images, step)
        self.seen.append(images.detach().clone())
        self.holds.append(float(self.loss.hold))  # type: ignore[arg-type]
        return found


@pytest.mark.parametrize("kind", [PGD, APGD])
@pytest.mark.parametrize("options", PATHS)
def test_it_is_the_first_broken_iterate_of_the_run_without(kind: Any, options: Any) -> None:
    """Up to there nothing may differ, whoever left before."""
    view, aim, batch = FakeView(), Aim(**options), answered(6)
    found = runs(kind, EarlyExit.on(AnswerLoss(view, batch, aim, watched=True)), batch)
    assert found.done.any()
    for row in range(6):
        one = pick(batch, row)
        recording = Recording(AnswerLoss(view, one, aim, watched=True))
        budget, bank = Budget(EPSILON, steps=8), SeedBank([SEEDS[row]])
        (descend if kind is PGD else autostep)(recording, one, budget, bank)
        lost = [broken(view, one, image, aim)[0] for image in recording.seen]
        if not found.done[row]:
            continue
        length = int(found.loss[:, row].isfinite().sum())
        torch.testing.assert_close(found.images[row : row + 1], recording.seen[length - 1])
        assert lost[length - 1]
        # Before, it was right, or so firmly right by its loss that it was not asked.
        if options != {"path": "compressed", "preserve_weight": 0.3}:
            assert not any(lost[: length - 1])


class Whole:
    """The same end without packing: all samples run in every step, those that left as they were."""

    def __init__(self, whole: EarlyExit, batch: Batch, rows: Sequence[int] | None = None) -> None:
        self.whole, self.batch = whole, batch
        self.rows = list(range(len(batch.ids))) if rows is None else list(rows)

    def _spread(self, values: Tensor, rest: Tensor) -> Tensor:
        return rest.clone().index_copy(0, torch.tensor(self.rows), values)

    def __call__(self, images: Tensor, step: int) -> Tensor:
        return self.whole(self._spread(images, self.batch.images), step)[self.rows]

    def done(self, images: Tensor, loss: Tensor, may: Tensor) -> Tensor:
        count = len(self.batch.ids)
        every = self._spread(may, torch.zeros(count, dtype=torch.bool))
        losses = self._spread(loss, torch.zeros(count))
        found = self.whole.done(self._spread(images, self.batch.images), losses, every)
        return found[self.rows]

    def of(self, rows: Sequence[int]) -> Whole:
        return Whole(self.whole, self.batch, [self.rows[row] for row in rows])


@pytest.mark.parametrize("kind", [PGD, APGD])
@pytest.mark.parametrize("options", [*PATHS, {"path": "compressed", "loss": "margin"}])
@pytest.mark.parametrize("seed", range(3))
def test_packed_is_what_unpacked_is(kind: Any, options: Any, seed: int) -> None:
    view, batch = FakeView(seed=1 + seed), mixed(seed)
    aim = Aim(**options)
    one, two = (EarlyExit.on(AnswerLoss(view, batch, aim, watched=True)) for _ in range(2))
    packed = runs(kind, one, batch, restarts=2)
    unpacked = runs(kind, Whole(two, batch), batch, restarts=2)
    torch.testing.assert_close(packed.images, unpacked.images)
    assert packed.done.tolist() == unpacked.done.tolist()
    torch.testing.assert_close(packed.loss, unpacked.loss, equal_nan=True)
    torch.testing.assert_close(packed.gradient, unpacked.gradient, equal_nan=True)


def mixed(seed: int) -> Batch:
    """Two options, three, and open questions; answers of different length."""
    batch = answered(6, view=FakeView(seed=1 + seed), seed=seed)
    others = (("no", "yes"), ("a", "no"), (), ("three", "green", "a"), (), ("yes", "1234"))
    options = tuple(
        (*dict.fromkeys((answer, *rest)),) if rest else ()
        for answer, rest in zip(batch.answers, others, strict=True)
    )
    return replace(batch, options=options)


@pytest.mark.parametrize("kind", [PGD, APGD])
def test_fewer_pictures_are_run_as_samples_leave_and_effort_counts_them(kind: Any) -> None:
    view, batch = Counting(), answered(6)
    options = {**OPTIONS, "steps": 12, "path": "compressed"}
    found = kind(**options)(view, batch, EPSILON, SEEDS)
    assert view.rows == sorted(view.rows, reverse=True)
    assert view.rows[0] == 6
    assert view.rows[-1] < 6
    tokens = 6  # in one pass the answers' tokens are counted
    assert found.forwards == -(-(sum(view.rows) + tokens) // 6)
    assert found.queries == -(-sum(view.asked) // 6)
    plain = Counting()
    without = kind(**{**options, "stop_when_broken": False})(plain, batch, EPSILON, SEEDS)
    assert sum(view.rows) < 0.8 * sum(plain.rows)
    assert found.backwards < without.backwards
    assert without.queries == 0


@pytest.mark.parametrize("kind", [PGD, APGD])
@pytest.mark.parametrize("options", PATHS)
def test_at_least_as_many_are_broken(kind: Any, options: Any) -> None:
    view, batch, aim = FakeView(), answered(6), Aim(**options)
    with_, without = (
        kind(steps=12, stop_when_broken=stop, **options)(view, batch, EPSILON, SEEDS)
        for stop in (True, False)
    )
    lost = broken(view, batch, with_.images, aim)
    assert sum(lost) >= sum(broken(view, batch, without.images, aim))
    assert any(lost)


@pytest.mark.parametrize("kind", [PGD, APGD])
def test_a_sample_alone_is_the_sample_in_company(kind: Any) -> None:
    view, batch = FakeView(), answered(6)
    attack = kind(**OPTIONS, path="compressed", restarts=2)
    together = attack(view, batch, EPSILON, SEEDS)
    for row in range(6):
        alone = attack(view, pick(batch, row), EPSILON, [SEEDS[row]])
        torch.testing.assert_close(alone.images[0], together.images[row])
        assert alone.loss[0] == pytest.approx(together.loss[row], rel=1e-4)


@pytest.mark.parametrize("kind", [PGD, APGD])
def test_all_broken_at_the_start_take_one_step_of_one_run(kind: Any) -> None:
    view = Counting()
    batch = replace(answered(6), answers=("never",) * 6)
    found = kind(**{**OPTIONS, "steps": 40}, restarts=5)(view, batch, EPSILON, SEEDS)
    assert view.rows == [6]
    assert view.asked == [6]
    assert (found.forwards, found.backwards, found.queries) == (2, 1, 1)
    assert [len(trace) for trace in found.loss] == [1] * 6
    assert found.checks == ((),) * 6, "a sample that is broken shows no sign of a failed attack"


@pytest.mark.parametrize("kind", [PGD, APGD])
def test_where_none_is_broken_nothing_changes(kind: Any) -> None:
    batch = answered(6)
    judged = replace(batch, judges=(lambda text: True,) * 6)
    view = Counting()
    found = kind(**OPTIONS, path="compressed", restarts=2)(view, judged, EPSILON, SEEDS)
    plain = kind(steps=6, path="compressed", restarts=2)(FakeView(), batch, EPSILON, SEEDS)
    assert torch.equal(found.images, plain.images)
    assert found.loss == plain.loss
    assert view.rows == [6] * 14
    # It asked again only where the loss had fallen since, and no more than was declared.
    assert found.queries <= kind(**OPTIONS, path="compressed", restarts=2).budget(EPSILON).queries


def test_what_holds_for_sure_is_not_asked() -> None:
    view, batch = Counting(), answered(6)
    pairs = tuple((answer, "x" * (len(answer) + 1)) for answer in batch.answers)
    batch = replace(batch, options=pairs)
    attack = APGD(steps=0, loss="margin", stop_when_broken=True, random_start=False)
    attack(view, batch, EPSILON, SEEDS)
    assert view.asked == [], "the right option is the likeliest of all words"
    wrong = replace(batch, answers=tuple(other for _, other in pairs))
    attack(view, wrong, EPSILON, SEEDS)
    assert view.asked == [6]


def test_targets_leave_out_what_is_broken() -> None:
    options = (("no", "yes", "a", "1234"),) * 6
    batch = replace(answered(6), options=options)
    batch = replace(batch, answers=("no", "yes", "no", "yes", "a", "1234"))
    view, aim = FakeView(), Aim(loss="margin")
    options_ = {"steps": 8, "targets": 3, "loss": "dlr"}
    found = APGD(**options_, stop_when_broken=True)(view, batch, EPSILON, SEEDS)  # type: ignore[arg-type]
    without = APGD(**options_)(view, batch, EPSILON, SEEDS)  # type: ignore[arg-type]
    assert found.forwards < without.forwards
    lost = broken(view, batch, found.images, aim)
    assert sum(lost) >= sum(broken(view, batch, without.images, aim))


@dataclass
class Suspicious:
    """Flags light pictures, and notes how many it looks at."""

    rows: list[int] = field(default_factory=list)

    def __call__(self, images: Tensor, questions: tuple[str, ...], draw: int) -> Tensor:
        assert len(images) == len(questions)
        self.rows.append(len(images))
        return images.flatten(1).mean(1)


def test_a_detector_is_evaded_before_a_sample_may_leave() -> None:
    view, batch = FakeView(), answered(6)
    clean = batch.images.flatten(1).mean(1)
    limit = float(clean.median())
    inner = PGD(**{**OPTIONS, "steps": 12}, path="compressed")
    seen = Suspicious()
    made = Evade(inner=inner, suspicion=seen, limit=limit, scale=0.02, margin=0.001, rounds=3)
    found = made(view, batch, EPSILON, SEEDS)
    plain = Suspicious()
    again = replace(made, inner=replace(inner, stop_when_broken=False), suspicion=plain)
    without = again(view, batch, EPSILON, SEEDS)

    def won(images: Tensor) -> int:
        lost = torch.tensor(broken(view, batch, images, Aim(path="compressed")))
        return int((lost & (images.flatten(1).mean(1) <= limit)).sum())

    assert won(found.images) >= won(without.images) > 0
    assert sum(seen.rows) < sum(plain.rows)
    assert found.forwards < without.forwards
    assert made.budget(EPSILON).queries == 3 * inner.budget(EPSILON).queries


def test_both_paths_are_broken_only_together() -> None:
    view, batch = FakeView(), make_batch(6)
    images = (batch.images + 0.2 * torch.randn(batch.images.shape)).clamp(0, 1)
    found = Judge(view, "both").broken(replace(batch, images=images)).tolist()
    assert found == broken(view, batch, images, Aim(path="both"))
    near = Judge(view, "both").nearness(batch)
    alone = [Judge(view, goal).nearness(batch) for goal in ("full", "compressed")]  # type: ignore[arg-type]
    assert torch.equal(near, torch.minimum(*alone))
    right = [Judge(view, goal).open(batch) for goal in ("full", "compressed")]  # type: ignore[arg-type]
    assert torch.equal(Judge(view, "both").open(batch), right[0] & right[1])


def test_a_target_is_refused() -> None:
    with pytest.raises(AttackError, match="stop_when_broken with target 'option'"):
        PGD(target="option", stop_when_broken=True)


@pytest.mark.parametrize("kind", [PGD, APGD])
def test_a_defence_that_draws_is_refused(kind: Any) -> None:
    view: Any = FakeView()
    view.random = True
    with pytest.raises(AttackError, match="against a defence that draws at random"):
        kind(**OPTIONS)(view, answered(2), EPSILON, SEEDS[:2])
    kind(steps=1)(view, answered(2), EPSILON, SEEDS[:2])


TEXT = """\
name: early
targets: [{type: scenes}]
dataset: {type: scenes, samples: 10}
compressions: [{type: fastv, retention: 0.25}]
attacks: [{type: pgd, path: compressed, steps: 5}]
epsilons: [16/255]
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Scenario]:
    def loader(*overrides: str) -> Scenario:
        path = tmp_path / "early.yaml"
        path.write_text(TEXT)
        return load_scenario(path, overrides)

    return loader


def test_ids_are_those_of_before_it_existed(load: Callable[..., Scenario]) -> None:
    plain, off, on = (
        load(),
        load("attacks.0.stop_when_broken=false"),
        load("attacks.0.stop_when_broken=true"),
    )
    assert plain.attacks[0].options["stop_when_broken"] is False
    assert "stop_when_broken" not in plain.attacks[0].spec
    assert on.attacks[0].spec["stop_when_broken"] is True
    ids = [[group.id for group in make_plan(one).groups] for one in (plain, off, on)]
    assert ids[0] == ids[1]
    assert ids[0] != ids[2]
    assert plain.hash == off.hash != on.hash
    # Of the plan of this scenario before the option came.
    assert ids[0][0] == "d93d6dd19c79"


def test_a_plan_says_where_it_does_not_apply(load: Callable[..., Scenario]) -> None:
    from redteam.adaptive import omitted
    from redteam.capabilities import mismatches

    attack = "attacks=[{type: pgd, path: compressed, steps: 5, adaptive: true%s}]"
    stopping = attack % ", stop_when_broken: true"
    fixed = "defenses=[translation_consensus, {type: random_floor, rho: 0.2}]"
    (told,) = omitted(load(stopping, fixed))
    assert "is not run against random_floor" in told
    assert "the defence draws" in told
    assert not omitted(load(attack % "", fixed))
    alone = "defenses=[{type: random_floor, rho: 0.2}]"
    (problem,) = mismatches(load(stopping, alone))
    assert "cannot adapt" in problem.message


def test_the_view_says_whether_its_defence_draws() -> None:
    assert draws_at_random(RandomFloor(rho=0.2))
    assert not draws_at_random(TranslationConsensus())
    assert PGD(stop_when_broken=True).stops_early
    assert not PGD().stops_early
