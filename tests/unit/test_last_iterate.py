"""An attack that keeps its last iterate is found out; our own loops keep the best (IoAF, no. 3)."""

from __future__ import annotations

from dataclasses import dataclass
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
