"""Self-checks of a finished run: signs that an attack failed for the wrong reason.

What is seen during one optimisation is checked per sample in `attacks.checks` and stands in the
trials; this module counts those messages and compares cells with each other. A robust-looking
number with such a sign beside it is no evidence of robustness, so a gate that passes on it is
inconclusive (`vetoes`). Every code names its remedy.

Bases: AutoAttack's checks, the Indicators of Attack Failure (Pintor et al., arXiv 2106.09947) and
the checklist of Carlini et al. (arXiv 1902.06705). Thresholds are ours and stand below.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from reports.availability import TYPES as AVAILABILITY
from reports.gate import cell_label
from reports.measure import Row, mean_value
from reports.records import Cell, GateSpec
from reports.registry import METRICS
from reports.statistics import mcnemar_exact
from reports.text import count, epsilon_text, plain

ALPHA = 0.05
"""Two-sided level of the paired tests, divided by the number of comparisons made for a cell."""
TOLERANCE = 0.01
"""A rate may fall by this much (one point) along a curve, or rise with twice the steps."""
MAX_SHARE = {
    "zero-gradient": 0.0,
    "no-progress": 0.05,
    "not-decreasing": 0.05,
    "unfinished": 0.05,
    "silent-success": 0.0,
    "reduced-precision": 0.05,
}
"""Of the samples that could be broken, the share on which a code may stand before the cell is in
doubt: none for what no sound attack does, else what a gate tolerates in errors, for the same
reason."""

REMEDY = {
    "zero-gradient": "use a straight-through or BPDA gradient, float32, or another loss",
    "no-progress": "try a margin loss (a log-likelihood saturates where the model is sure), a "
    "smaller alpha, a random start or more steps",
    "not-decreasing": "lower alpha or use a decaying schedule",
    "reduced-precision": "set engine.attack_precision to float32",
    "unfinished": "raise steps, or run the attack with twice the steps in the same scenario: if "
    "that breaks no more, this is lifted",
    "silent-success": "keep the best iterate of the path, not the last",
    "no-gain": "give it more steps, restarts or another loss; if the model really withstands it, "
    "show in the same scenario that it beats noise at a larger epsilon; with few samples take more",
    "no-control": "list noise beside the attack, at the same epsilons and in the same norm: "
    "without it nothing tells an attack that fails from a model that withstands it",
    "non-monotone": "raise steps and restarts, set alpha in proportion to epsilon, and read the "
    "figure of the smaller budget: whoever may change more may also change less",
    "stronger-black-box": "suspect masked gradients: use a straight-through or BPDA gradient, "
    "another loss, or start from the images of the black-box attack",
    "not-repeatable": "use deterministic kernels (engine.device: cpu, or torch's deterministic "
    "algorithms) and draw only from the seeds an attack is given",
}
"""What to do about each code."""


class Check(BaseModel):
    """One entry of ``checks`` in summary.json: a code on the cells of one attack."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    code: str
    cells: list[str]
    """Ids of the cells in doubt."""
    message: str
    """What was seen, in the first of them."""
    remedy: str


@dataclass(frozen=True, slots=True)
class Doubt:
    """One code on one cell, with what was seen there."""

    code: str
    cell: Cell
    message: str

    @property
    def sentence(self) -> str:
        """What was seen and what to do."""
        return f"self-check {self.code!r}: {self.message}; {REMEDY[self.code]}"


@dataclass(frozen=True, slots=True)
class _Run:
    """Cells with an attacker, their rows by sample, and who can be compared with whom."""

    cells: tuple[Cell, ...]
    rows: Mapping[str, Mapping[str, Row]]

    def beside(self, cell: Cell, *, same_budget: bool = True) -> Iterator[Cell]:
        """Other cells of the same target, compression, defence and norm."""
        for other in self.cells:
            if other.id == cell.id or _place(other) != _place(cell):
                continue
            if not same_budget or _same(other.epsilon, cell.epsilon):
                yield other

    def pairs(self, one: Cell, other: Cell) -> list[tuple[Row, Row]]:
        """Rows of the samples measured in both."""
        mine, theirs = self.rows[one.id], self.rows[other.id]
        return [
            (row, theirs[name])
            for name, row in mine.items()
            if name in theirs and not row.error and not theirs[name].error
        ]


def run_checks(cells: Sequence[Cell], rows: Mapping[str, Sequence[Row]]) -> list[Doubt]:
    """Everything that puts a cell of a run in doubt.

    Args:
        cells: of the run, in order.
        rows: of each cell, by its id.

    Returns:
        Doubts in the order of the cells.
    """
    run = _Run(
        # Noise optimises nothing, and no budget leaves nothing to optimise.
        tuple(cell for cell in cells if not empty(cell)),
        {name: {row.sample: row for row in found} for name, found in rows.items()},
    )
    attacks = [cell for cell in run.cells if cell.knowledge != "none"]
    doubts = [
        doubt
        for cell in attacks
        for look in (_counted, _no_gain, _non_monotone)
        for doubt in look(run, cell)
    ]
    doubts += _stronger_black_box(run, [cell for cell in attacks if not demanding(cell)])
    order = {cell.id: index for index, cell in enumerate(cells)}
    return sorted(doubts, key=lambda doubt: order[doubt.cell.id])


def grouped(doubts: Sequence[Doubt], name: Callable[[Cell], str] = cell_label) -> list[Check]:
    """Doubts as summary.json lists them: one entry for each code and attack.

    Args:
        doubts: of a run.
        name: names a cell for people.
    """
    found: dict[tuple[str, str], list[Doubt]] = {}
    for doubt in doubts:
        found.setdefault((doubt.code, doubt.cell.attack), []).append(doubt)
    return [
        Check(
            code=code,
            cells=[doubt.cell.id for doubt in members],
            message=_told(members, name),
            remedy=REMEDY[code],
        )
        for (code, _), members in found.items()
    ]


def _told(members: Sequence[Doubt], name: Callable[[Cell], str]) -> str:
    first = f"{name(members[0].cell)}: {members[0].message}"
    rest = len(members) - 1
    return f"{first}; likewise in {count(rest, 'other cell')}" if rest else first


def vetoes(gate: GateSpec, doubts: Sequence[Doubt]) -> Doubt | None:
    """The first doubt that keeps a gate from passing on a cell; None if there is none.

    A metric of clean images says nothing about the attack. All codes but one mean that the attack
    may be weaker than it could be: that undermines "at most so much damage", not "at least".
    """
    if of_clean(gate):
        return None
    for doubt in doubts:
        if doubt.code == "not-repeatable" or not harmless(gate):
            return doubt
    return None


def of_clean(gate: GateSpec) -> bool:
    """Whether a gate is on clean images, which no attack has touched."""
    return gate.metric == "clean_drop" or gate.metric.endswith("_clean")


def harmless(gate: GateSpec) -> bool:
    """Whether a gate claims nothing that a stronger attack could undo."""
    better = METRICS[gate.metric].better if gate.metric in METRICS else "neither"
    least, most = gate.limits
    at_least = (better == "lower" and most is None) or (better == "higher" and least is None)
    return of_clean(gate) or at_least


def _place(cell: Cell) -> tuple[str, ...]:
    return (cell.target, cell.compression, cell.defense, cell.norm)


def _same(one: float, other: float) -> bool:
    return abs(one - other) < 1e-9


def empty(cell: Cell) -> bool:
    """Whether the budget holds no picture but the clean one."""
    return cell.epsilon < 1 / 255


def _broken(row: Row) -> bool:
    """The attack broke a path, whichever."""
    return (row.full_clean and not row.full_attacked) or (
        row.compressed_clean and not row.compressed_attacked
    )


def broke_compressed(row: Row) -> bool:
    """The attack broke the compressed path, whatever it did to the full one."""
    return row.compressed_clean and not row.compressed_attacked


def _failure(row: Row) -> bool:
    return row.failure


def demanding(cell: Cell) -> bool:
    """The attack is on availability: it wants tokens and long answers, not wrong ones."""
    return options_of(cell).get("type") in AVAILABILITY


def _growth(row: Row) -> float:
    """The largest factor by which an attack raised what an answer demands; 1 if unknown.

    An alarm that the clean image does not raise demands another answer.
    """
    if row.alarms is not None and row.alarms[1] and not row.alarms[0]:
        return 2
    names = ("tokens_growth", "length_full_growth", "length_compressed_growth")
    return max((value for name in names if (value := mean_value(row, name)) is not None), default=1)


def _reached(cell: Cell, row: Row) -> bool:
    """The attack did to a sample what it is for."""
    return _growth(row) > 1 if demanding(cell) else _broken(row)


_Event = Callable[[Row], bool]


@dataclass(frozen=True, slots=True)
class Paired:
    """An event on the same samples in two cells."""

    n: int
    first: int
    second: int
    p: float
    """Exact two-sided McNemar; 1 where the two never differ."""

    @classmethod
    def of(cls, pairs: Sequence[tuple[bool, bool]]) -> Paired:
        """Count pairs of (in the first, in the second)."""
        counts = Counter(pairs)
        only_first, only_second = counts[True, False], counts[False, True]
        p = mcnemar_exact(only_first, only_second)
        both = counts[True, True]
        return cls(len(pairs), both + only_first, both + only_second, 1.0 if p is None else p)

    def first_above(self, comparisons: int = 1) -> bool:
        """The event is more frequent in the first, beyond what chance explains."""
        return self.first > self.second and self.p <= ALPHA / comparisons


def _compare(run: _Run, one: Cell, other: Cell, event: _Event) -> Paired:
    return Paired.of([(event(mine), event(theirs)) for mine, theirs in run.pairs(one, other)])


def _counted(run: _Run, cell: Cell) -> Iterator[Doubt]:
    """Codes of single samples, among those that could be broken and were not."""
    rows = [row for row in run.rows[cell.id].values() if not row.error]
    able = [row for row in rows if row.full_clean or row.compressed_clean]
    seen = Counter(code for row in able if not _reached(cell, row) for code in set(row.codes))
    for code, most in MAX_SHARE.items():
        if seen[code] > most * len(able) and not (code == "unfinished" and _lifted(run, cell)):
            yield Doubt(
                code,
                cell,
                f"{seen[code]} of {count(len(able), 'sample')} that could be broken were not, and "
                f"carry the self-check {code!r}",
            )
    moved = sum("not-repeatable" in row.codes for row in rows)
    if moved:
        message = f"running the attack again gave another image for {count(moved, 'sample')}"
        yield Doubt("not-repeatable", cell, message)


def _lifted(run: _Run, cell: Cell) -> bool:
    """The same attack with twice the steps or more breaks no more in the same run."""
    mine = options_of(cell)
    for other in run.beside(cell):
        theirs = options_of(other)
        if "steps" not in mine or {**theirs, "steps": 0} != {**mine, "steps": 0}:
            continue
        found = _compare(run, other, cell, _broken)
        settled = found.n > 0 and found.first - found.second <= TOLERANCE * found.n
        if settled and theirs["steps"] >= 2 * mine["steps"] > 0:
            return True
    return False


def options_of(cell: Cell) -> Mapping[str, Any]:
    """The attack's resolved options, its type among them; empty if not recorded."""
    found = cell.spec.get("attack")
    return found if isinstance(found, Mapping) else {}


def _no_gain(run: _Run, cell: Cell) -> Iterator[Doubt]:
    """Noise of the same budget breaks as much, and the attack beats it at no other budget."""
    found = _against_noise(run, cell)
    if found is not None and found[1].first_above():
        return
    kin = [other for other in run.beside(cell, same_budget=False) if other.attack == cell.attack]
    for other in kin:
        elsewhere = _against_noise(run, other)
        if elsewhere is not None and elsewhere[1].first_above():
            return
    if found is None:
        yield from _without_control(run, cell)
        return
    noise, compared = found
    control, n = f"{plain(noise.attack)} of the same budget", count(compared.n, "sample")
    seen = f"it broke {compared.first} of {n} and {control} {compared.second}"
    if demanding(cell):
        seen = (
            f"of {n} it made {compared.first} demand more than {control} did and "
            f"{compared.second} less"
        )
    yield Doubt("no-gain", cell, f"{seen} (paired p = {compared.p:.2g})")


def _without_control(run: _Run, cell: Cell) -> Iterator[Doubt]:
    """No noise to compare with; where it failed or has no sample in common, errors say so."""
    controls = [one for one in run.beside(cell) if one.knowledge == "none"]
    if not any(area(one) == area(cell) for one in controls):
        yield Doubt(
            "no-control", cell, "the run has no noise of the same budget and norm beside it"
        )


def _against_noise(run: _Run, cell: Cell) -> tuple[Cell, Paired] | None:
    """The strongest control of a cell, and the cell compared with it."""
    found = [
        (other, _gain(run, cell, other))
        for other in run.beside(cell)
        if other.knowledge == "none" and area(other) == area(cell)
    ]
    return max((one for one in found if one[1].n), key=lambda one: one[1].second, default=None)


def _gain(run: _Run, cell: Cell, noise: Cell) -> Paired:
    """Samples on which an attack did more than noise, against those on which it did less."""
    if not demanding(cell):
        return _compare(run, cell, noise, _broken)
    pairs = [(_growth(mine), _growth(theirs)) for mine, theirs in run.pairs(cell, noise)]
    return Paired.of([(mine > theirs, theirs > mine) for mine, theirs in pairs])


def area(cell: Cell) -> tuple[Any, ...]:
    """Where an attack may change the picture; noise elsewhere is no control for it."""
    options = options_of(cell)
    border = options.get("border")
    return () if border is None else (border, options.get("frame", "inside"))


def _non_monotone(run: _Run, cell: Cell) -> Iterator[Doubt]:
    """The same attack does more damage at a smaller budget."""
    if demanding(cell):
        return
    smaller = [
        other
        for other in run.beside(cell, same_budget=False)
        if other.attack == cell.attack and other.epsilon < cell.epsilon - 1e-9
    ]
    events: tuple[tuple[str, _Event], ...] = (
        ("breaks a path", _broken),
        ("breaks only the compressed path", _failure),
    )
    for words, event in events:
        compared = [(other, _compare(run, other, cell, event)) for other in smaller]
        worse = [
            (other, found)
            for other, found in compared
            if found.first_above(2 * len(smaller))
            if found.first - found.second > TOLERANCE * found.n
        ]
        if worse:
            other, found = max(worse, key=lambda one: one[1].first - one[1].second)
            yield Doubt(
                "non-monotone",
                cell,
                f"it {words} in {found.first} of {count(found.n, 'sample')} at ε "
                f"{epsilon_text(other.epsilon)}, but in {found.second} at ε "
                f"{epsilon_text(cell.epsilon)}",
            )
            return


_WHITE = frozenset({"white_box", "compressed", "encoder"})
_BLACK = frozenset({"surrogate", "query", "scores"})


def _stronger_black_box(run: _Run, attacks: Sequence[Cell]) -> Iterator[Doubt]:
    """An attack without the target's gradients breaks more than all that have them together."""
    corners: dict[tuple[object, ...], list[Cell]] = {}
    for cell in attacks:
        corners.setdefault((*_place(cell), round(cell.epsilon, 9)), []).append(cell)
    for members in corners.values():
        white = [cell for cell in members if cell.knowledge in _WHITE]
        black = [cell for cell in members if cell.knowledge in _BLACK]
        union: dict[str, bool] = {}
        for cell in white:
            for name, row in run.rows[cell.id].items():
                if not row.error:
                    union[name] = union.get(name, False) or broke_compressed(row)
        for other in black:
            found = Paired.of(
                [
                    (broke_compressed(row), union[name])
                    for name, row in run.rows[other.id].items()
                    if name in union and not row.error
                ]
            )
            if found.first_above(len(black)):
                message = (
                    f"{plain(other.attack)}, which has no gradients of the target, broke the "
                    f"compressed path of {found.first} of {count(found.n, 'sample')}; all attacks "
                    f"that have them together {found.second}"
                )
                yield from (Doubt("stronger-black-box", cell, message) for cell in white)
                break
