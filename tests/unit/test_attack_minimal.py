"""Minimal epsilon: what bisection finds breaks, what lies below it was tried, the rest is kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from answered import answered

import attacks.members
from attacks import AttackError, Minimal, Proposal, SeedBank
from attacks.base import Attack
from attacks.goal import Judge
from attacks.members import MEMBERS, Member, make_member
from attacks.suite import CLEAN
from targets.base import Batch, Knowledge
from tests.fakes import FakeView

WHOLE = 16 / 255


def seeds(batch: Batch) -> list[int]:
    return [100 + row for row in range(len(batch.ids))]


@dataclass(frozen=True, kw_only=True)
class Shift(Attack):
    """Moves every pixel by the whole budget, or by less.

    *Differs from the paper in …*: it is a test.
    """

    name: ClassVar[str] = "shift"
    knowledge: ClassVar[Knowledge] = Knowledge.NONE
    most: int = 255

    def propose(self, view: Any, batch: Batch, budget: Any, rng: SeedBank) -> Proposal:
        return Proposal(batch.images + min(self.most, budget.levels) / 255)


@dataclass
class Brittle(FakeView):
    """Answers by the mean change from mid-grey: the compressed path breaks at a known level."""

    bars: tuple[int, ...] = ()

    def ask(
        self, images: torch.Tensor, questions: tuple[str, ...], *, path: Any = "compressed"
    ) -> tuple[str, ...]:
        self.asked = getattr(self, "asked", 0) + len(images)
        levels = (images.flatten(1).mean(1) * 255 - 100).round().int().tolist()
        bars = [int(question) for question in questions]
        hit = [
            path == "compressed" and level >= bar for level, bar in zip(levels, bars, strict=True)
        ]
        return tuple("no" if one else "yes" for one in hit)


def grey(bars: list[int]) -> Batch:
    """Pictures of level 100 that break when every pixel has moved by so many levels."""
    return Batch(
        ids=tuple(f"s{i}" for i in range(len(bars))),
        images=torch.full((len(bars), 3, 16, 16), 100 / 255),
        questions=tuple(map(str, bars)),
        answers=("yes",) * len(bars),
    )


@pytest.fixture
def shift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks.members, "MEMBERS", {**MEMBERS, "shift": Ready("x:y")})


class Ready(Member):
    def make(self, steps: int) -> Attack:
        return Shift()


@pytest.mark.usefixtures("shift")
def test_the_smallest_level_is_found() -> None:
    batch = grey(list(range(1, 17)))
    result = Minimal(attack="shift")(Brittle(), batch, WHOLE, seeds(batch))
    assert (result.linf * 255).round().int().tolist() == list(range(1, 17))
    assert set(result.made_by) == {"shift"}


@pytest.mark.usefixtures("shift")
def test_what_holds_is_censored_and_what_was_wrong_stays() -> None:
    batch = grey([17, 40, 0, 3])
    result = Minimal(attack="shift")(Brittle(), batch, WHOLE, seeds(batch))
    assert (result.linf * 255).round().int().tolist() == [16, 16, 0, 3]
    assert result.made_by == ("shift", "shift", CLEAN, "shift")


@pytest.mark.usefixtures("shift")
@pytest.mark.parametrize("resolution", [1, 2, 4, 16])
def test_the_resolution_bounds_error_and_cost(resolution: int) -> None:
    batch, view = grey(list(range(1, 17))), Brittle()
    attack = Minimal(attack="shift", resolution=resolution)
    result = attack(view, batch, WHOLE, seeds(batch))
    found = (result.linf * 255).round().int().tolist()
    for bar, level in zip(range(1, 17), found, strict=True):
        assert bar <= level < bar + resolution
    assert view.asked <= len(batch.ids) * attack.budget(WHOLE).queries


def test_a_break_tightens_the_end_to_what_was_really_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Lazy(Member):
        def make(self, steps: int) -> Attack:
            return Shift(most=5)

    monkeypatch.setattr(attacks.members, "MEMBERS", {"lazy": Lazy("x:y")})
    batch, view = grey([4]), Brittle()
    result = Minimal(attack="lazy")(view, batch, WHOLE, [1])
    assert round(float(result.linf[0]) * 255) == 4
    # clean twice, at 16 (which changes 5), at 2, 3, 4: judged twice where compressed is wrong
    assert view.asked <= 2 + 2 * 4


def test_of_a_real_attack_the_image_breaks_and_less_was_tried() -> None:
    view, batch = FakeView(), answered(12)
    attack = Minimal(attack="pgd", steps=4)
    result = attack(view, batch, WHOLE, seeds(batch))
    judge = Judge(view, "compression_only")  # type: ignore[arg-type]
    broken = judge.broken(replace(batch, images=result.images)).tolist()
    assert any(broken)
    own = SeedBank(seeds(batch)).child("search").seeds
    member = make_member("minimal", "pgd", 4)
    whole = member(view, batch, WHOLE, own)
    assert broken == judge.broken(replace(batch, images=whole.images)).tolist()
    for row, broke in enumerate(broken):
        if not broke:
            assert torch.equal(result.images[row], whole.images[row])
            continue
        level = round(float(result.linf[row]) * 255)
        if level > 1:
            below = member(view, batch.rows([row]), (level - 1) / 255, [own[row]])
            assert not judge.broken(replace(batch.rows([row]), images=below.images))[0]


def test_it_may_wrap_a_suite() -> None:
    view, batch = FakeView(), answered(6)
    result = Minimal(attack="suite", goal="compressed", steps=2)(view, batch, WHOLE, seeds(batch))
    assert set(result.made_by) <= {*MEMBERS, CLEAN}
    assert CLEAN not in result.made_by


def test_an_unknown_attack_is_refused() -> None:
    with pytest.raises(AttackError, match="attack minimal: there is no member 'nothing'"):
        Minimal(attack="nothing")


@pytest.mark.parametrize(
    ("levels", "resolution", "runs"), [(16, 1, 5), (16, 4, 3), (1, 1, 1), (3, 1, 3)]
)
def test_the_declared_budget_counts_every_run(levels: int, resolution: int, runs: int) -> None:
    budget = Minimal(attack="pgd", steps=7, resolution=resolution).budget(levels / 255)
    assert budget.steps == 7 * runs
    assert budget.queries == 2 * runs + 2


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    batch, attack = answered(5), Minimal(attack="pgd", steps=3)
    whole = attack(FakeView(), batch, WHOLE, seeds(batch))
    for row in range(5):
        one = attack(FakeView(), batch.rows([row]), WHOLE, [seeds(batch)[row]])
        assert torch.equal(one.images[0], whole.images[row])
