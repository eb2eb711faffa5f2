"""What a run holds about one defence, sorted by who knew what: all that `reports.honesty` reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from reports.availability import TYPES as AVAILABILITY
from reports.checks import Doubt, Paired, area, broke_compressed, empty, options_of
from reports.measure import Row
from reports.records import Cell, DefenseFacts, Manifest

NONE: Final = "none"
"""Type and usual label of the absent defence."""
LARGE: Final = 64 / 255
"""Linf budget from which an attack must break whatever it attacks: a quarter of the range, [−64,
64] of 255 levels in every value. [inferred; the Indicators of Attack Failure have no limit]"""
GRADIENTS: Final = frozenset({"white_box", "compressed", "encoder"})
"""Knowledge of attacks that take the target's gradients."""
ASKING: Final = frozenset({"query", "scores"})
"""Knowledge of attacks that ask the target and take no gradient."""

FORCING: Final = frozenset({"force_fallback"}) | AVAILABILITY
"""Attacks that want an answer to cost more, not to be wrong."""

Rows = Mapping[str, Mapping[str, Row]]
"""By id of the cell and of the sample."""
Event = Callable[[Row], bool]
Budget = tuple[str, float]
"""Norm and epsilon."""


def undefended(cell: Cell) -> bool:
    """Whether a cell is of no defence."""
    given = cell.spec.get("defense")
    kind = given.get("type") if isinstance(given, Mapping) else None
    return kind == NONE or (kind is None and cell.defense in ("", NONE))


def budget_of(cell: Cell) -> Budget:
    """Norm and epsilon of a cell, equal where two cells may be compared."""
    return cell.norm, round(cell.epsilon, 9)


def forcing(cell: Cell) -> bool:
    """Whether an attack wants an answer to cost more."""
    return options_of(cell).get("type") in FORCING


def is_large(budget: Budget) -> bool:
    """Whether an attack within it should break anything."""
    return budget[0] == "linf" and budget[1] >= LARGE - 1e-9


@dataclass(frozen=True)
class Case:
    """One defence on one target under one compression.

    Attributes:
        first: a cell of the defence at this place, for its labels and facts.
        cells: those with a budget that is not empty.
        controls: the same place without a defence.
        others: the same place under other defences.
        forcing: attacks on this defence that want its answers to cost more.
        rows: of all of them; samples that ended in an error included.
        doubts: self-checks of the run, by id of the cell.
        manifest: of the run.
    """

    first: Cell
    cells: tuple[Cell, ...]
    controls: tuple[Cell, ...]
    others: tuple[Cell, ...]
    forcing: tuple[Cell, ...]
    rows: Rows
    doubts: Mapping[str, Sequence[Doubt]]
    manifest: Manifest

    @property
    def defense(self) -> str:
        """Label of the defence."""
        return self.first.defense

    @cached_property
    def facts(self) -> DefenseFacts | None:
        """What it says of itself; None in runs from before that was recorded."""
        return self.first.guard

    @cached_property
    def kinds(self) -> frozenset[str]:
        """Where it acts, its parts included."""
        if self.facts is None:
            return frozenset()
        return frozenset({self.facts.kind, *(part.kind for part in self.facts.parts)})

    @cached_property
    def adaptive(self) -> tuple[Cell, ...]:
        """Attacks that knew the defence."""
        return tuple(
            cell
            for cell in self.cells
            if options_of(cell).get("adaptive") and cell.knowledge in GRADIENTS | ASKING
        )

    @cached_property
    def white(self) -> tuple[Cell, ...]:
        """Of these, the ones with gradients and more than one step."""
        return tuple(c for c in self.adaptive if c.knowledge in GRADIENTS and not single_step(c))

    @cached_property
    def sound(self) -> tuple[Cell, ...]:
        """Of these, the ones that had what is deployed in their graph, on every sample."""
        return tuple(cell for cell in self.white if self._went_through(cell))

    @cached_property
    def single(self) -> tuple[Cell, ...]:
        """Attacks that knew the defence and took one step."""
        return tuple(c for c in self.adaptive if c.knowledge in GRADIENTS and single_step(c))

    @cached_property
    def asking(self) -> tuple[Cell, ...]:
        """Attacks that asked the defended target and took no gradient."""
        return tuple(cell for cell in self.adaptive if cell.knowledge in ASKING)

    @cached_property
    def foreign(self) -> tuple[Cell, ...]:
        """Attacks that did not know the defence: made on the undefended model, or on others."""
        return tuple(
            cell for cell in self.cells if cell not in self.adaptive and cell.knowledge != "none"
        )

    @cached_property
    def noise(self) -> tuple[Cell, ...]:
        """Controls that know nothing, over the whole picture."""
        return tuple(c for c in self.cells if c.knowledge == "none" and not area(c))

    @cached_property
    def claimed(self) -> tuple[Budget, ...]:
        """Budgets at which attacks with gradients that knew the defence ran, the large aside."""
        found = dict.fromkeys(budget_of(cell) for cell in self.white)
        return tuple(sorted(one for one in found if not is_large(one)))

    def at(self, cells: Iterable[Cell], budget: Budget) -> list[Cell]:
        """Those of a budget."""
        return [cell for cell in cells if budget_of(cell) == budget]

    def twin(self, cell: Cell) -> Cell | None:
        """The same attack without the defence."""
        return next((one for one in self.controls if _alike(one, cell)), None)

    def measured(self, cell: Cell) -> Mapping[str, Row]:
        """Rows without errors, by sample."""
        return {name: row for name, row in self.rows[cell.id].items() if not row.error}

    def broken(self, cells: Iterable[Cell], event: Event = broke_compressed) -> dict[str, bool]:
        """Per sample, whether any of the attacks did it: the worst case over attacks."""
        found: dict[str, bool] = {}
        for cell in cells:
            for name, row in self.measured(cell).items():
                found[name] = found.get(name, False) or event(row)
        return found

    def compare(
        self, some: Iterable[Cell], others: Iterable[Cell], event: Event = broke_compressed
    ) -> Paired:
        """The worst case of two groups of attacks on the samples both have."""
        first, second = self.broken(some, event), self.broken(others, event)
        return Paired.of([(first[name], second[name]) for name in first if name in second])

    def told(self, cells: Iterable[Cell], *codes: str) -> Doubt | None:
        """The first self-check of these codes on these cells."""
        return next(
            (one for cell in cells for one in self.doubts.get(cell.id, ()) if one.code in codes),
            None,
        )

    def _went_through(self, cell: Cell) -> bool:
        pairs = {row.pipelines for row in self.measured(cell).values()}
        return bool(pairs) and all(one == other != "" for one, other in pairs)


def single_step(cell: Cell) -> bool:
    """Whether an attack takes one step only."""
    options = options_of(cell)
    return options.get("type") == "fgsm" or options.get("steps") == 1


def but_steps(cell: Cell) -> dict[str, Any]:
    """Options of an attack that are not how many steps it takes."""
    return {key: value for key, value in options_of(cell).items() if key != "steps"}


def _alike(one: Cell, other: Cell) -> bool:
    same = options_of(one) == options_of(other) if options_of(other) else one.attack == other.attack
    return same and budget_of(one) == budget_of(other)


def cases(
    manifest: Manifest, rows: Mapping[str, Sequence[Row]], doubts: Mapping[str, Sequence[Doubt]]
) -> list[Case]:
    """One for each defence, target and compression of a run, in the order of its cells.

    Args:
        manifest: of the run.
        rows: of each cell, by its id.
        doubts: self-checks of the run, by id of the cell.
    """
    by_sample = {name: {row.sample: row for row in found} for name, found in rows.items()}
    cells = [cell for cell in manifest.cells if not empty(cell)]
    places: dict[tuple[str, str, str], Cell] = {}
    for cell in manifest.cells:
        if not undefended(cell):
            places.setdefault((cell.defense, cell.target, cell.compression), cell)
    found = []
    for (defense, target, compression), first in places.items():
        at = [c for c in cells if (c.target, c.compression) == (target, compression)]
        here = [cell for cell in at if not forcing(cell)]  # wrong answers are not what it wants
        own = [cell for cell in at if cell.defense == defense]
        found.append(
            Case(
                first=first,
                cells=tuple(cell for cell in own if not forcing(cell)),
                controls=tuple(filter(undefended, here)),
                others=tuple(c for c in here if c.defense != defense and not undefended(c)),
                forcing=tuple(filter(forcing, own)),
                rows=by_sample,
                doubts=doubts,
                manifest=manifest,
            )
        )
    order = list(dict.fromkeys(place[0] for place in places))
    return sorted(found, key=lambda case: order.index(case.defense))
