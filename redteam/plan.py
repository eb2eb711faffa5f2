"""What a scenario means: cells, attacked images shared between them, and units of work.

A *cell* is a target × compression × attack × epsilon × defence. An *image group* is all cells that
look at the same attacked images: an attack that does not know the compression is run once for all
of them. A *unit* is an image group on one block of samples; it is recorded whole or not at all.

Ids are hashes of resolved options and seeds are hashes of what they are for, so neither depends on
order, batch size, rank, or what else the scenario holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from redteam.adaptive import NONE, adapt, met
from redteam.capabilities import mismatches
from redteam.errors import ScenarioError
from redteam.facts import told
from redteam.scenario import Method, Scenario, digest
from reports.records import Cell


@dataclass(frozen=True, slots=True)
class PlannedCell:
    """A cell with the methods it is made of."""

    cell: Cell
    compression: Method
    defense: Method


@dataclass(frozen=True, slots=True)
class ImageGroup:
    """Cells that share attacked images.

    Attributes:
        id: hash of all that makes the images, the sample aside.
        target: attacked model.
        attack: what attacks it.
        epsilon: budget.
        known: the compression the attack knows or asks; None if it knows none.
        gradients: most gradients taken for one sample, on all surrogates together.
        cells: what is evaluated on the images.
        queries: most questions to the target about one sample.
        surrogates: models the attack works on instead of the target.
        defense: the defence an adaptive attack knows; None where there is none.
    """

    id: str
    target: Method
    attack: Method
    epsilon: float
    known: Method | None
    gradients: int
    cells: tuple[PlannedCell, ...]
    queries: int = 0
    surrogates: tuple[Method, ...] = ()
    defense: Method | None = None


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """One image group on one block of samples.

    Attributes:
        group: what to do.
        block: number of the block; the clean answers of a block serve all its units.
        samples: indices into the data set.
        leads: whether it is the first of its block, which pays for the clean answers.
    """

    group: ImageGroup
    block: int
    samples: range
    leads: bool

    @property
    def id(self) -> str:
        """Stable name."""
        return f"{self.group.id}-{self.block}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a scenario asks for.

    Attributes:
        scenario: it was made from.
        groups: by target, in the order of the scenario.
    """

    scenario: Scenario
    groups: tuple[ImageGroup, ...]

    @property
    def cells(self) -> list[Cell]:
        """All cells, in the order of the scenario: a table reads compression by compression."""
        scenario = self.scenario
        orders = [
            {method.label: index for index, method in enumerate(methods)}
            for methods in (
                scenario.targets,
                scenario.compressions,
                scenario.attacks,
                scenario.defenses,
            )
        ]

        def place(cell: Cell) -> tuple[float, ...]:
            names = (cell.target, cell.compression, cell.attack, cell.defense)
            first = [float(order[name]) for order, name in zip(orders, names, strict=True)]
            return (*first[:3], cell.epsilon, first[3])

        return sorted((one.cell for group in self.groups for one in group.cells), key=place)

    def units(self, count: int) -> Iterator[WorkUnit]:
        """All units on `count` samples: block by block, so that a stopped run is balanced."""
        size = self.scenario.engine.block
        for target in self.scenario.targets:
            groups = [group for group in self.groups if group.target.label == target.label]
            for block, start in enumerate(range(0, count, size)):
                samples = range(start, min(start + size, count))
                for index, group in enumerate(groups):
                    yield WorkUnit(group, block, samples, leads=index == 0)


def seed_of(root: int, what: str, sample: str) -> int:
    """A seed in [0, 2**63) that depends on these three and nothing else.

    Args:
        root: of the run.
        what: hash of what is drawn: of an image group, a compression or a defence.
        sample: id of the sample.
    """
    text = f"{root}/{what}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def make_plan(scenario: Scenario) -> Plan:
    """Lay out a scenario; constructs its methods, but loads no model.

    Raises:
        ScenarioError: if something does not fit together, or a method refuses its options.
    """
    problems = mismatches(scenario)
    if problems:
        raise ScenarioError(problems)
    models = (*scenario.targets, *scenario.surrogates)
    for method in (*scenario.compressions, *scenario.defenses, *models):
        method.create()
    groups = [
        group
        for target in scenario.targets
        for attack in scenario.attacks
        for group in _groups(scenario, target, attack)
    ]
    return Plan(scenario, tuple(merged(groups)))


def merged(groups: Sequence[ImageGroup]) -> Iterator[ImageGroup]:
    """Groups without those that would make the same images again.

    Against no defence an adaptive attack is the attack itself, so where both are listed one image
    serves both.
    """
    found: dict[str, list[ImageGroup]] = {}
    for group in groups:
        found.setdefault(group.id, []).append(group)
    for same in found.values():
        yield replace(same[0], cells=tuple(cell for group in same for cell in group.cells))


@dataclass(frozen=True, slots=True)
class _Traits:
    """What an attack says of itself at one epsilon."""

    needs: str
    knows_compression: bool
    norm: str
    gradients: int  # on each surrogate, where it works on these
    queries: int


def _traits(
    attack: Method,
    instance: Any,  # noqa: ANN401 - an attack
    epsilon: float,
    passes: int,
) -> _Traits:
    try:
        budget = instance.budget(epsilon)
    except Exception as error:
        # A method's own message about its own options.
        raise ScenarioError([attack.problem(str(error))]) from error
    return _Traits(
        needs=instance.needs.value,
        knows_compression=bool(instance.knows_compression),
        norm=budget.norm,
        gradients=instance.gradients(budget) * passes,
        queries=budget.queries,
    )


def _groups(scenario: Scenario, target: Method, attack: Method) -> Iterator[ImageGroup]:
    """The image groups of one attack: those of an adaptive one belong to one defence each."""
    if not attack.adaptive:
        yield from _groups_of(scenario, target, attack, attack.create(), scenario.defenses)
        return
    own = attack.create()
    for defense in met(scenario, attack):
        adapted = adapt(attack, defense, own)
        groups = _groups_of(scenario, target, attack, adapted.attack, [defense], adapted.passes)
        for group in groups:
            yield group if defense.type == NONE else replace(group, defense=defense)


def _groups_of(
    scenario: Scenario,
    target: Method,
    attack: Method,
    instance: Any,  # noqa: ANN401 - an attack
    defenses: Sequence[Method],
    passes: int = 1,
) -> Iterator[ImageGroup]:
    knows = attack.adaptive and defenses[0].type != NONE
    for epsilon in attack.epsilons:
        traits = _traits(attack, instance, epsilon, passes)
        shared: Sequence[Sequence[Method]] = [scenario.compressions]
        if traits.knows_compression:
            shared = [[compression] for compression in scenario.compressions]
        for compressions in shared:
            known = compressions[0] if traits.knows_compression else None
            others = surrogates_of(scenario, target, attack) if _on_others(traits) else ()
            made = {
                # What works on other models makes the same images whatever the target is.
                "target": [one.spec for one in others] or target.spec,
                "attack": attack.spec if knows else attack.plain_spec,
                "epsilon": epsilon,
                "compression": known.spec if known else None,
                **({"defense": defenses[0].spec} if knows else {}),
            }
            yield ImageGroup(
                id=digest(made)[:12],
                target=target,
                attack=attack,
                epsilon=epsilon,
                known=known,
                gradients=traits.gradients * max(1, len(others)),
                queries=traits.queries,
                surrogates=others,
                cells=tuple(
                    _cell(target, compression, attack, defense, epsilon, traits, others)
                    for compression in compressions
                    for defense in defenses
                ),
            )


def _on_others(traits: _Traits) -> bool:
    return traits.needs == "surrogate"


def surrogates_of(scenario: Scenario, target: Method, attack: Method) -> tuple[Method, ...]:
    """The models a transfer attack works on: those it names, or all but the target itself.

    Args:
        scenario: offers them.
        target: what will be attacked with the images.
        attack: its option `surrogates` holds labels; empty for all others.
    """
    named = attack.options.get("surrogates") or ()
    return tuple(
        one
        for one in scenario.surrogates
        if (one.label in named if named else one.spec != target.spec)
    )


def _cell(
    target: Method,
    compression: Method,
    attack: Method,
    defense: Method,
    epsilon: float,
    traits: _Traits,
    surrogates: Sequence[Method],
) -> PlannedCell:
    spec = {
        "target": target.spec,
        "compression": compression.spec,
        "attack": attack.spec,
        "defense": defense.spec,
        "epsilon": epsilon,
    }
    if surrogates:
        spec["surrogates"] = [{"name": one.label, **one.spec} for one in surrogates]
    cell = Cell(
        id=digest(spec)[:10],
        target=target.label,
        compression=compression.label,
        attack=attack.label,
        defense=defense.label,
        epsilon=epsilon,
        norm=traits.norm,
        knowledge=traits.needs,
        knows_compression=traits.knows_compression,
        detector=defense.detects,
        spec=spec,
        declared={
            "steps": traits.gradients * max(1, len(surrogates)),
            "queries": traits.queries,
        },
        **told(attack, defense),
    )
    return PlannedCell(cell, compression, defense)
