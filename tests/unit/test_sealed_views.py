"""No attribute of what an attack is handed leads to what its threat model denies it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from attacks import Attack, Budget, SeedBank, Suite
from attacks.members import MEMBERS, Member
from attacks.metering import Meter, MeteredView
from targets.base import Batch, Knowledge, Withheld
from targets.compression.fastv import FastV
from targets.errors import KnowledgeError
from targets.lvlm import LVLM
from targets.passes import Passes
from targets.scenes import build
from targets.views import OtherModels, View
from tests.fakes import FakeView, make_batch

FASTV = FastV(layer=2, retention=0.25)
SEEDS = [1, 2, 3, 4]
LEADS = ("__self__", "__func__", "__closure__", "__wrapped__", "__dict__", "cell_contents", "_call",
         "_view", "_meter", "func", "args", "keywords", "grad_fn")  # fmt: skip
"""Names under which Python and torch show what is behind something, beside its own attributes."""


@pytest.fixture(scope="module")
def target() -> LVLM:
    shape = build.Shape(width=32, mlp=32, heads=2, vision_layers=2, text_layers=3)
    return LVLM(build.build_model(shape, 0).float(), build.build_processor())


def reachable(start: object) -> Iterator[object]:
    """Everything that attributes, items, and cells of closures lead to."""
    seen: dict[int, object] = {}
    waiting = [start]
    while waiting:
        thing = waiting.pop()
        if id(thing) not in seen and not isinstance(thing, type | ModuleType | str | int | float):
            seen[id(thing)] = thing
            yield thing
            waiting += parts(thing)


def parts(thing: object) -> Iterator[object]:
    if isinstance(thing, nn.Module | LVLM):
        return  # found; what is inside does not matter
    if isinstance(thing, Mapping):
        yield from thing.values()
    elif isinstance(thing, tuple | list | set | frozenset) and not isinstance(thing, Withheld):
        yield from thing
    slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    own = [name for name in dir(thing) if not name.startswith("__")] if opaque(thing) else []
    for name in (*LEADS, *slots, *own):
        try:
            found = getattr(thing, name)
        except Exception:  # noqa: S112 - denied, which is what is wanted
            continue
        yield found


def opaque(thing: object) -> bool:
    """Ours, so that every name it shows is tried."""
    return type(thing).__module__.split(".")[0] in ("attacks", "targets")


def models(start: object) -> list[object]:
    return [one for one in reachable(start) if isinstance(one, LVLM | Passes | nn.Module | Meter)]


def test_the_search_finds_what_is_there(target: LVLM) -> None:
    """The test of the test: a closure and a bound method do lead to the model."""

    def call() -> Any:
        return target.answer

    assert target in models(call)
    assert target in models({"one": [target.view]})


@pytest.mark.parametrize("knowledge", [one for one in Knowledge if one is not Knowledge.SURROGATE])
def test_no_attribute_of_a_view_leads_to_the_model(target: LVLM, knowledge: Knowledge) -> None:
    view = target.view(knowledge, FASTV)
    assert models(view) == []
    assert models(MeteredView(view, knowledge, Meter())) == []


def test_no_attribute_of_surrogates_leads_to_a_model(target: LVLM) -> None:
    view = OtherModels([target.surrogate("other")])
    assert models(view) == []
    assert models(MeteredView(view, Knowledge.SURROGATE, Meter())) == []


def test_a_narrowed_view_does_not_lead_back_to_the_wide_one(target: LVLM) -> None:
    wide = target.view(Knowledge.WHITE_BOX, FASTV)
    narrow: Any = MeteredView(
        MeteredView(wide, Knowledge.WHITE_BOX, Meter()), Knowledge.NONE, Meter()
    )
    others = [one for one in reachable(narrow) if isinstance(one, View | MeteredView)]
    assert others == [narrow]


def test_a_call_cannot_be_exchanged(target: LVLM) -> None:
    view: Any = MeteredView(target.view(Knowledge.ENCODER, None), Knowledge.ENCODER, Meter())
    for name in ("_call", "__self__", "__wrapped__"):
        with pytest.raises(KnowledgeError, match="not granted"):
            getattr(view.encode, name)
        with pytest.raises(KnowledgeError, match="cannot be set"):
            setattr(view.encode, name, None)


@dataclass(frozen=True, kw_only=True)
class Sly(Attack):
    """Declares little and runs whatever it is given.

    *Differs from the paper in …*: it must not work.
    """

    name: ClassVar[str] = "sly"
    knowledge: ClassVar[Knowledge] = Knowledge.WHITE_BOX
    least: Knowledge = Knowledge.ENCODER
    trick: Callable[[Any, Batch], object] = lambda view, batch: None

    @property
    def needs(self) -> Knowledge:
        return self.least

    def propose(self, view: Any, batch: Batch, budget: Budget, rng: SeedBank) -> Tensor:
        self.trick(view, batch)
        return batch.images


TRICKS: dict[str, Callable[[Any, Batch], object]] = {
    "the view behind": lambda view, batch: view._view.answer_nll(
        batch.images, ("a",) * 4, ("b",) * 4
    ),
    "uncounted": lambda view, batch: view.encode.__wrapped__(batch.images),
    "the closure": lambda view, batch: view.encode.__closure__[0].cell_contents,
    "the meter": lambda view, batch: setattr(view._meter, "forwards", 0),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_a_member_of_a_suite_gets_no_further_than_it_declares(
    trick: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The suite itself is a white box, and what it hands on is made from its own view."""

    class Ready(Member):
        def make(self, steps: int) -> Attack:
            return Sly(trick=TRICKS[trick])

    monkeypatch.setattr("attacks.members.MEMBERS", {**MEMBERS, "sly": Ready("test:test")})
    view, batch = FakeView(), make_batch(4)
    batch = replace(batch, answers=view.ask(batch.images, batch.questions))
    with pytest.raises(KnowledgeError, match="not granted"):
        Suite(members=("sly",), goal="compressed")(view, batch, 8 / 255, SEEDS)


LOOKS: dict[str, Callable[[Batch], object]] = {
    "questions": lambda batch: batch.questions[0],
    "answers": lambda batch: list(batch.answers),
    "options": lambda batch: ("yes", "no") in (batch.options or ()),
    "judges": lambda batch: batch.right(["yes"] * 4),
}
UNTOLD = {
    Knowledge.NONE: set(LOOKS),
    Knowledge.ENCODER: set(LOOKS),
    Knowledge.COMPRESSED: {"answers", "options", "judges"},
    Knowledge.QUERY: set(),
    Knowledge.SCORES: set(),
    Knowledge.WHITE_BOX: set(),
}


@pytest.mark.parametrize("knowledge", UNTOLD)
@pytest.mark.parametrize("what", LOOKS)
@pytest.mark.parametrize("some", [False, True])
def test_what_the_threat_model_does_not_tell_cannot_be_looked_at(
    knowledge: Knowledge, what: str, some: bool
) -> None:
    full = make_batch(4)
    full = replace(full, options=(("yes", "no"),) * 4, judges=(lambda text: True,) * 4)

    def look(view: Any, batch: Batch) -> None:
        assert len(batch.questions) == len(batch.answers) == 4
        LOOKS[what](batch.rows([0, 1, 2, 3]) if some else batch)

    attack = Sly(least=knowledge, trick=look)
    if what not in UNTOLD[knowledge]:
        assert torch.equal(attack(FakeView(), full, 8 / 255, SEEDS).images, full.images)
        return
    with pytest.raises(KnowledgeError, match=f"batch.{what} is not told .* {knowledge.value!r}"):
        attack(FakeView(), full, 8 / 255, SEEDS)
