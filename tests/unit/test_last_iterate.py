"""An attack that keeps its last iterate is found out; our own loops keep the best (IoAF, no. 3)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import pytest
import torch
from annotated_types import Ge

from attacks import APGD, CAA, FGSM, PGD, Attack, Budget, MarginSplit, Proposal, SeedBank, Square
from attacks.suite import Suite
from targets.base import Batch, Knowledge, WhiteBoxView
from tests.fakes import FakeView, make_batch

SEEDS = [1, 2, 3, 4]


@dataclass(frozen=True, kw_only=True)
class Wanderer(Attack):
    """Goes down for two steps and back up again."""

    name: ClassVar[str] = "wanderer"
    knowledge: ClassVar[Knowledge] = Knowledge.WHITE_BOX

    steps: Annotated[int, Ge(0)] = 4
    keep: Literal["last", "best", "said"] = "last"

    def propose(self, view: WhiteBoxView, batch: Batch, budget: Budget, rng: SeedBank) -> Proposal:
        points = [batch.images + budget.epsilon * x for x in (0.0, 0.5, 1.0, 0.5, 0.25)]
        loss = torch.tensor([[5.0], [3.0], [1.0], [3.0], [4.0]]).expand(5, len(batch.ids))
        if self.keep == "last":
            return Proposal(points[-1], loss=loss)
        kept = loss[2] if self.keep == "said" else None
        return Proposal(points[2], loss=loss, kept=kept)


def codes(attack: Attack) -> set[str]:
    made = attack(FakeView(), make_batch(4), 8 / 255, SEEDS)
    return {check.partition(":")[0] for found in made.checks for check in found}


def test_the_last_iterate_is_not_the_best() -> None:
    made = Wanderer()(FakeView(), make_batch(4), 8 / 255, SEEDS)
    assert [(one.kept, one.best) for one in made.own] == [(4.0, 1.0)] * 4
    assert "silent-success" in codes(Wanderer())


def test_whoever_keeps_the_best_has_to_say_so() -> None:
    assert "silent-success" in codes(Wanderer(keep="best"))
    assert "silent-success" not in codes(Wanderer(keep="said"))


@pytest.mark.parametrize(
    "attack",
    [
        PGD(path="compressed", steps=6, alpha=0.2, restarts=2),
        APGD(path="compressed", steps=6),
        APGD(path="compressed", loss="margin", targets=2, steps=4),
        FGSM(path="compressed"),
        CAA(steps=6, preserve_every=2),
        MarginSplit(steps=6),
        Square(queries=12),
        Suite(members=("pgd", "margin_split"), steps=4),
    ],
    ids=lambda one: one.name,
)
def test_ours_keep_the_best_and_say_so(attack: Attack) -> None:
    made = attack(FakeView(), make_batch(4), 16 / 255, SEEDS)
    assert "silent-success" not in codes(attack)
    for one in made.own:
        assert one.kept == one.best


def believed(attack: Attack, *, closed: bool = False) -> list[tuple[float | None, bool | None]]:
    batch = make_batch(4)
    if closed:
        batch = replace(batch, options=(("yes", "no"),) * 4)
    made = attack(FakeView(), batch, 64 / 255, SEEDS)
    return [(one.kept, one.believed) for one in made.own]


def test_a_margin_below_zero_is_a_break() -> None:
    for loss, told in believed(APGD(path="compressed", loss="margin", steps=6), closed=True):
        assert loss is not None
        assert told is (loss < 0)
    for loss, told in believed(MarginSplit(steps=6)):
        assert loss is not None
        assert told is (loss < -0.01)


@pytest.mark.parametrize(
    "attack",
    [PGD(path="compressed", steps=2), CAA(steps=2), APGD(path="full", loss="margin", steps=2)],
    ids=["likelihood", "ranking", "another path"],
)
def test_a_loss_without_a_known_zero_tells_nothing(attack: Attack) -> None:
    assert {told for _, told in believed(attack, closed=True)} == {None}


def test_an_open_question_has_no_margin() -> None:
    found = believed(APGD(path="compressed", loss="margin", steps=2))
    assert {told for _, told in found} == {None}


@pytest.mark.parametrize(("goal", "tells"), [("compressed", True), ("full", False)])
def test_whoever_asks_knows(goal: str, tells: bool) -> None:
    attack = Suite(members=("pgd",), steps=4, goal=goal)  # type: ignore[arg-type]
    assert any(told is not None for _, told in believed(attack)) is tells
