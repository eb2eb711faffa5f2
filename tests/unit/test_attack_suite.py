"""The suite: cheap to dear, early exit, the worst case of each sample, nothing reached beyond."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from answered import answered

import attacks.members
from attacks import AttackError, Proposal, SeedBank, Suite
from attacks.base import Attack
from attacks.goal import GOALS, Goal, Judge
from attacks.members import MEMBERS, Member, gradients, make_member, members_for
from attacks.suite import CLEAN, padded
from targets.base import Batch, Knowledge
from targets.errors import KnowledgeError
from tests.fakes import FakeView, make_batch

EPSILON = 24 / 255
NAMES = ("noise", "fgsm", "caa", "pgd")


def seeds(batch: Batch) -> list[int]:
    return [100 + row for row in range(len(batch.ids))]


@dataclass(frozen=True, kw_only=True)
class Nosy(Attack):
    """Asks for answers though it declares nothing.

    *Differs from the paper in …*: it must not work.
    """

    name: ClassVar[str] = "nosy"
    knowledge: ClassVar[Knowledge] = Knowledge.NONE

    def propose(self, view: Any, batch: Batch, budget: Any, rng: SeedBank) -> Proposal:
        return Proposal(view.answer_nll(batch.images, batch.questions, batch.answers))


@dataclass(frozen=True, kw_only=True)
class Picky(Attack):
    """Fails on one sample, or on all.

    *Differs from the paper in …*: it is a test.
    """

    name: ClassVar[str] = "picky"
    knowledge: ClassVar[Knowledge] = Knowledge.NONE
    hates: str = "s1"

    def propose(self, view: Any, batch: Batch, budget: Any, rng: SeedBank) -> Proposal:
        if self.hates == "all":
            raise AttackError("nothing suits me")
        if self.hates in batch.ids:
            raise AttackError(f"not with {self.hates}", sample_ids=(self.hates,))
        return Proposal(batch.images + 9 / 255)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Member]:
    """The table of members, which a test may add to."""
    own = dict(MEMBERS)
    monkeypatch.setattr(attacks.members, "MEMBERS", own)
    return own


def add(table: dict[str, Member], name: str, attack: Attack) -> None:
    class Ready(Member):
        def make(self, steps: int) -> Attack:
            return attack

    table[name] = Ready("test:test")


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_can_be_made_and_attacks(name: str) -> None:
    member, batch = make_member("suite", name, 3), answered(3)
    result = member(FakeView(member.needs), batch, EPSILON, seeds(batch))
    assert float(result.linf.max()) <= EPSILON
    assert result.backwards <= gradients(member, EPSILON), "more than it declares"
    if hasattr(member, "steps"):
        assert member.steps == 3


def test_a_goal_has_its_members_from_cheap_to_dear() -> None:
    for goal in GOALS:
        names = members_for(goal)
        assert names == tuple(name for name in MEMBERS if name in names)
        assert names[0] == "noise"
        assert tuple(Suite(goal=goal)._attacks()) == names
    assert "pgd_full" in members_for("full")
    assert "caa" in members_for("compression_only")
    assert "pgd_full" not in members_for("compression_only")


def test_the_page_names_every_member() -> None:
    page = (Path(__file__).parents[2] / "docs" / "attacks.md").read_text(encoding="utf-8")
    section = page.partition("### `suite`")[2].partition("### `minimal`")[0]
    assert [name for name in MEMBERS if f"`{name}`" not in section] == []


def test_an_unknown_member_is_refused_with_what_there_is() -> None:
    with pytest.raises(AttackError, match=r"no member 'pdg'; allowed: .*pgd"):
        Suite(members=("pdg",))
    with pytest.raises(AttackError, match="did you mean 'apgd_sparing'"):
        Suite(members=("apgd_sparin",))
    with pytest.raises(AttackError, match="repeat"):
        Suite(members=("pgd", "pgd"))


@pytest.mark.parametrize("goal", GOALS)
def test_worst_case_is_the_minimum_over_members_of_each_sample(goal: Goal) -> None:
    """Mean over samples of the minimum over members: each member run alone, on all samples."""
    view, batch = FakeView(), answered(16)
    suite = Suite(members=NAMES, steps=4, goal=goal)
    result = suite(view, batch, EPSILON, seeds(batch))
    judge = Judge(view, goal)  # type: ignore[arg-type]
    alone = torch.zeros(len(batch.ids), dtype=torch.bool)
    first = [""] * len(batch.ids)
    for name in NAMES:
        member = make_member("suite", name, 4)
        own = SeedBank(seeds(batch)).child(name).seeds
        made = member(view, batch, EPSILON, own)
        broken = judge.broken(replace(batch, images=made.images))
        for row in (broken & ~alone).nonzero()[:, 0].tolist():
            first[row] = name
            assert torch.equal(result.images[row], made.images[row])
        alone |= broken
    assert int(alone.sum()) > 0, "nothing broke, so nothing was tested"
    assert torch.equal(judge.broken(replace(batch, images=result.images)), alone)
    for name, maker, broke in zip(first, result.made_by, alone.tolist(), strict=True):
        assert maker == name if broke else maker in NAMES


def test_who_is_broken_is_left_alone() -> None:
    view, batch = FakeView(), answered(8)
    suite = Suite(members=("noise", "pgd"), steps=3, goal="compressed")
    broken = Judge(view, "compressed").broken(  # type: ignore[arg-type]
        replace(
            batch,
            images=make_member("suite", "noise", 3)(
                view, batch, EPSILON, SeedBank(seeds(batch)).child("noise").seeds
            ).images,
        )
    )
    assert broken.any()
    assert not broken.all()
    result = suite(view, batch, EPSILON, seeds(batch))
    paid = -(-3 * int((~broken).sum()) // len(broken))
    assert result.backwards == paid, "gradients of the samples that noise left, shared by all"
    makers = [maker for maker, one in zip(result.made_by, broken.tolist(), strict=True) if one]
    assert set(makers) == {"noise"}


def test_what_is_wrong_already_stays_as_it_is() -> None:
    batch = replace(answered(4), answers=("never said",) * 4)
    result = Suite(members=("noise", "pgd"), steps=2)(FakeView(), batch, EPSILON, seeds(batch))
    assert torch.equal(result.images, batch.images)
    assert result.made_by == (CLEAN,) * 4
    assert result.loss == [[]] * 4
    assert result.backwards == 0
    assert 0 < result.queries <= 2


def test_the_nearest_image_is_kept_where_none_breaks() -> None:
    view, batch = FakeView(), answered(12)
    suite = Suite(members=NAMES, steps=3)
    result = suite(view, batch, 2 / 255, seeds(batch))
    judge = Judge(view, "compression_only")  # type: ignore[arg-type]
    held = (~judge.broken(replace(batch, images=result.images))).nonzero()[:, 0].tolist()
    assert held, "all broke, so nothing was tested"
    near = judge.nearness(replace(batch, images=result.images))
    for name in NAMES:
        own = SeedBank(seeds(batch)).child(name).seeds
        made = make_member("suite", name, 3)(view, batch, 2 / 255, own)
        other = judge.nearness(replace(batch, images=made.images))
        assert all(other[row] <= near[row] for row in held)


def test_nearness_is_what_it_says() -> None:
    view, batch = FakeView(), answered(5)
    said = {
        path: view.answer_nll(batch.images, batch.questions, batch.answers, path=path).double()
        for path in ("full", "compressed")
    }
    wanted = {
        "compression_only": said["compressed"] - said["full"],
        "compressed": said["compressed"],
        "full": said["full"],
    }
    for goal in GOALS:
        found = Judge(view, goal).nearness(batch)  # type: ignore[arg-type]
        assert torch.allclose(found, wanted[goal])


def test_each_member_sees_no_more_than_it_declares(table: dict[str, Member]) -> None:
    add(table, "nosy", Nosy())
    batch = answered(3)
    with pytest.raises(KnowledgeError, match="answer_nll needs knowledge 'white_box'"):
        Suite(members=("nosy",))(FakeView(), batch, EPSILON, seeds(batch))


def test_a_member_that_cannot_run_is_left_out_and_said(table: dict[str, Member]) -> None:
    add(table, "picky", Picky(hates="all"))
    batch = answered(4)
    result = Suite(members=("picky", "noise"))(FakeView(), batch, EPSILON, seeds(batch))
    assert result.notes == ("picky was left out: nothing suits me",)
    assert set(result.made_by) == {"noise"}


def test_a_member_that_fails_on_one_sample_runs_on_the_others(table: dict[str, Member]) -> None:
    batch = answered(4)
    add(table, "picky", Picky(hates=batch.ids[1]))
    result = Suite(members=("picky",))(FakeView(), batch, EPSILON, seeds(batch))
    assert result.made_by == ("picky", CLEAN, "picky", "picky")
    assert "failed on some samples" in result.notes[0]
    assert float(result.linf[1]) == 0


def test_the_declared_budget_is_the_sum_of_the_members() -> None:
    budget = Suite(members=("noise", "fgsm", "pgd", "caa"), steps=7).budget(EPSILON)
    assert budget.steps == 0 + 1 + 7 + 7
    assert budget.queries == 2 * 5


def test_what_is_used_is_within_what_is_declared() -> None:
    batch = answered(6)
    suite = Suite(members=NAMES, steps=3)
    result, declared = suite(FakeView(), batch, 4 / 255, seeds(batch)), suite.budget(4 / 255)
    assert 0 < result.backwards <= declared.steps
    assert 0 < result.queries <= declared.queries


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    batch, suite = answered(6), Suite(members=NAMES, steps=3)
    whole = suite(FakeView(), batch, EPSILON, seeds(batch))
    for row in range(6):
        one = suite(FakeView(), batch.rows([row]), EPSILON, [seeds(batch)[row]])
        assert torch.equal(one.images[0], whole.images[row])
        assert one.made_by[0] == whole.made_by[row]


def test_traces_and_checks_are_those_of_the_member() -> None:
    batch = replace(answered(3), questions=("dead 1", "dead 2", "dead 3"))
    view = FakeView()
    texts = view.ask(batch.images, batch.questions, path="full")
    both = [
        row
        for row, text in enumerate(view.ask(batch.images, batch.questions))
        if text == texts[row]
    ]
    batch = replace(batch, answers=texts).rows(both)
    assert both
    result = Suite(members=("pgd",), steps=4)(view, batch, 1 / 255, seeds(batch))
    for row, maker in enumerate(result.made_by):
        assert maker == "pgd"
        assert len(result.loss[row]) == 5
        assert any(check.startswith("zero-gradient") for check in result.checks[row])


def test_padding_keeps_traces() -> None:
    assert padded([[], []]) is None
    found = padded([[3.0, 2.0, 1.0], [], [5.0]])
    assert found is not None
    assert found.shape == (3, 3)
    assert found[:, 0].tolist() == [3, 2, 1]
    assert found[1:, 2].isnan().all()


def test_no_epsilon_no_change() -> None:
    batch = make_batch(3)
    result = Suite()(FakeView(), batch, 0.0, [1, 2, 3])
    assert torch.equal(result.images, batch.images)
