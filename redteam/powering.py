"""How many samples gates need, as tables: for a limit, for a change, for a scenario."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from redteam.errors import UsageError
from reports.measure import PROPORTIONS
from reports.power import ChangeGate, RateGate
from reports.text import count, number

if TYPE_CHECKING:
    from redteam.scenario import Method, Scenario
    from reports.records import GateSpec

_SHARES: Final = (0.0, 0.25, 0.5, 0.75, 1.5, 2.0, 3.0)
"""True rates of a table, as multiples of the limit."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is planned for.

    Attributes:
        confidence: of the gate, in (0.5, 1).
        power: chance of the decision, in (0, 1).
        decisions: of the gate's family.
        design_effect: samples of shared images that one independent sample is worth, ≥ 1.
    """

    confidence: float
    power: float
    decisions: int = 1
    design_effect: float = 1.0

    def __post_init__(self) -> None:
        for option, value, low in (
            ("--confidence", self.confidence, 0.5),
            ("--power", self.power, 0.0),
        ):
            if not low < value < 1:
                raise UsageError(f"{option}: {value:g} is not allowed; above {low:g} and below 1")


@dataclass(frozen=True, slots=True)
class Row:
    """One line: what is true, what the gate should say of it, and the samples that takes."""

    true: str
    decision: str
    samples: int | None


@dataclass(frozen=True, slots=True)
class PowerTable:
    """The samples one gate needs.

    Attributes:
        title: the gate.
        rows: by true rate; empty where there is no exact answer.
        notes: what to know of it, one sentence each.
    """

    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def for_rate(
    limit: float, rates: str | None, wanted: Wanted, *, minimum: bool, title: str = ""
) -> PowerTable:
    """Samples for a gate on a rate.

    Args:
        limit: in (0, 1).
        rates: true ones, separated by commas; a spread around the limit if None.
        wanted: see `Wanted`.
        minimum: whether the rate has to be at least the limit.
        title: of the table.

    Raises:
        UsageError: naming the option that is wrong.
    """
    if not 0 < limit < 1:
        raise UsageError(f"--limit: {limit:g} is not allowed; a rate above 0 and below 1")
    gate = RateGate(1 - limit if minimum else limit, wanted.confidence, wanted.decisions)
    rows = []
    for rate in _rates(limit, rates, minimum=minimum):
        event = 1 - rate if minimum else rate
        n = gate.samples(event, wanted.power)
        rows.append(
            Row(f"{rate:g}", "pass" if event < gate.limit else "fail", _clustered(n, wanted))
        )
    sign = "≥" if minimum else "≤"
    return PowerTable(title or f"rate {sign} {limit:g}", tuple(rows), _notes(wanted))


def _rates(limit: float, rates: str | None, *, minimum: bool) -> list[float]:
    if rates is None:
        room = 1 - limit if minimum else limit
        spread = [round(room * share, 6) for share in _SHARES if room * share < 1]
        return [round(1 - one, 6) for one in spread] if minimum else spread
    found = []
    for part in filter(None, (piece.strip() for piece in rates.split(","))):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1:
            raise UsageError(f"--rate: {part!r} is not allowed; numbers from 0 to 1, by commas")
        found.append(value)
    return found


def _clustered(n: int | None, wanted: Wanted) -> int | None:
    return None if n is None else math.ceil(n * wanted.design_effect)


def _notes(wanted: Wanted) -> tuple[str, ...]:
    notes = [
        "samples are those in the metric's denominator, of CSFR those right on the clean image "
        "with and without compression"
    ]
    if wanted.decisions > 1:
        notes.append(
            f"a fail is judged as one of {wanted.decisions} decisions (the first step of Holm); a "
            "pass needs no correction"
        )
    if wanted.design_effect > 1:
        notes.append(
            f"multiplied by the design effect {wanted.design_effect:g}: questions share images"
        )
    else:
        notes.append("independent samples; where questions share an image see --design-effect")
    return tuple(notes)


def for_change(
    max_increase: float, before: float, newly: float, no_longer: float, wanted: Wanted
) -> PowerTable:
    """Samples for a gate on the rise of a rate since a baseline, by chance wanted.

    Args:
        max_increase: limit of the rise, in [0, 1).
        before: true rate of the baseline, in [0, 1].
        newly: true share of samples with the event now and not before.
        no_longer: true share with the event before and not now.
        wanted: see `Wanted`.

    Raises:
        UsageError: if these contradict each other.
    """
    rows = []
    try:
        gate = ChangeGate(max_increase, wanted.confidence)
        for share in (0.0, 0.5, 1.0):
            one, other = share * newly, share * no_longer
            n = gate.samples(before, one, other, wanted.power)
            rows.append(Row(f"{one:g} newly, {other:g} no longer", "pass", _clustered(n, wanted)))
    except ValueError as error:
        raise UsageError(f"redteam power: {error}") from error
    title = f"rate rises by ≤ {max_increase:g}, from {before:g}"
    notes = (
        "shares of all samples that have the event newly, or no longer; the fewer change at all, "
        "the fewer samples are needed",
        *_notes(wanted)[1:],
    )
    return PowerTable(title, tuple(rows), notes)


def for_scenario(name: str, wanted: Wanted) -> list[PowerTable]:
    """Samples for every gate of a scenario, with what its own number of samples can decide.

    Raises:
        UsageError: if it has no gates.
    """
    from redteam.scenario import load_scenario

    scenario = load_scenario(name)
    if not scenario.gates:
        raise UsageError(f"{name} states no gates, so there is nothing to plan")
    sizes: dict[str, int] = {}
    for gate in scenario.gates:
        sizes[gate.family] = sizes.get(gate.family, 0) + _cells(gate, scenario)
    samples = scenario.dataset.options.get("samples")
    return [
        _for_gate(gate, sizes[gate.family], samples if isinstance(samples, int) else None, wanted)
        for gate in scenario.gates
    ]


def _cells(gate: GateSpec, scenario: Scenario) -> int:
    """Cells a gate covers, about: what an attack leaves out when it adapts is counted too."""

    def matching(key: str, methods: Iterable[Method]) -> Sequence[Method]:
        return [one for one in methods if gate.where.get(key, one.label) == one.label]

    epsilon = gate.where.get("epsilon")

    def kept(one: float) -> bool:
        return epsilon is None or abs(one - float(epsilon)) < 1e-9

    return (
        len(matching("target", scenario.targets))
        * len(matching("compression", scenario.compressions))
        * len(matching("defense", scenario.defenses))
        * sum(sum(map(kept, one.epsilons)) for one in matching("attack", scenario.attacks))
    )


def _for_gate(gate: GateSpec, size: int, samples: int | None, wanted: Wanted) -> PowerTable:
    mine = Wanted(gate.confidence, wanted.power, max(1, size), wanted.design_effect)
    title = f"{gate.name}: {gate.metric}, {count(size, 'decision')} in its family"
    limit = gate.min if gate.max is None else gate.max
    if gate.compares and gate.max_increase is not None:
        found = for_change(gate.max_increase, 0.1, 0.02, 0.02, mine)
        return PowerTable(title, found.rows, (found.title, *found.notes))
    if gate.metric not in PROPORTIONS or limit is None or gate.compares or not 0 < limit < 1:
        note = "this metric is no rate, so there is no exact answer; a rate is a guide"
        return PowerTable(title, (), (note,))
    minimum = gate.max is None
    found = for_rate(limit, None, mine, minimum=minimum)
    notes = found.notes if samples is None else (_with(samples, limit, mine, minimum), *found.notes)
    return PowerTable(f"{title}, {'≥' if minimum else '≤'} {limit:g}", found.rows, notes)


def _with(samples: int, limit: float, wanted: Wanted, minimum: bool) -> str:
    """What the scenario's own samples can decide."""
    n = max(1, math.floor(samples / wanted.design_effect))
    gate = RateGate(1 - limit if minimum else limit, wanted.confidence, wanted.decisions)
    most, fewest = gate.passes_up_to(n), gate.fails_from(n)
    what = "wrong" if minimum else "events"
    passes = f"passes with at most {most:,} {what}" if most >= 0 else "cannot pass"
    fails = f"fails from {fewest:,}" if fewest <= n else "cannot fail"
    return (
        f"with the scenario's {samples:,} samples, if all are in the denominator, it {passes} "
        f"({number(max(most, 0) / n)}) and {fails} ({number(min(fewest, n) / n)})"
    )
