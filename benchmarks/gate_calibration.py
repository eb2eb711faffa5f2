# ruff: noqa: E501 - a page is written here, and its lines are long
"""Make docs/results/gate-calibration.md: ``python benchmarks/gate_calibration.py``.

Runs without a model whose true rate lies exactly at a gate's limit are drawn, measured and decided
by the same code as real runs. There a PASS is one event too lucky and a FAIL one too unlucky: each
may happen in at most 1 − confidence of the runs. Beside it stands what a gate would do that
compares the value itself with the limit.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from reports.deciding import Measured, Run, decide
from reports.exact import lower_bound, upper_bound
from reports.gate import Progress, Verdict
from reports.gate_bounds import bounds_of, change_of
from reports.measure import MEANS, Row
from reports.records import Cell, GateSpec

LIMIT: Final = 0.1
CONFIDENCE: Final = 0.95
COMMAND: Final = "python benchmarks/gate_calibration.py"
Rows = dict[str, Row]
Drawn = tuple[dict[str, Rows], dict[str, Rows]]
"""Rows by cell and sample, of the run and of its baseline (empty without one)."""


@dataclass(frozen=True)
class Case:
    """A sort of run.

    Attributes:
        name: what is drawn.
        gates: what decides it; the truth is at their limits.
        cells: of a run.
        draw: rows of one run.
        kind: "both" counts false passes and false fails of the whole run; "fail" only false fails,
            where every cell is at its limit; "pass" only false passes, where one cell is.
    """

    name: str
    gates: tuple[GateSpec, ...]
    cells: tuple[Cell, ...]
    draw: Callable[[Generator], Drawn]
    kind: str = "both"


@dataclass
class Rates:
    """How often a case was decided wrongly.

    Attributes:
        case: its name.
        kind: of the case.
        runs: drawn.
        passes: runs that passed.
        fails: runs that failed.
        point_passes: runs whose every value is within its limit.
        point_fails: runs of which a value is beyond it.
    """

    case: str
    kind: str
    runs: int
    passes: int = 0
    fails: int = 0
    point_passes: int = 0
    point_fails: int = 0


def cell(name: str, index: int = 0) -> Cell:
    """A cell of noise, which no self-check is about."""
    return Cell(
        id=f"{name}{index}",
        target="drawn",
        compression=name,
        attack=f"a{index}",
        defense="none",
        epsilon=8 / 255,
        knowledge="none",
        knows_compression=False,
        spec={},
    )


def rows_of(answers: NDArray[np.bool_], per_image: int = 1) -> Rows:
    """Rows of answers c, c_K, c', c'_K, ``[N, 4]``."""
    empty = (None,) * len(MEANS)
    return {
        f"s{i}": Row(
            f"i{i // per_image}",
            "",
            False,
            *map(bool, four),
            None,
            None,
            None,
            None,
            empty,
            f"s{i}",
        )
        for i, four in enumerate(answers)
    }


def failing(events: NDArray[np.bool_], rng: Generator) -> NDArray[np.bool_]:
    """Answers of which events break when compressed; one in ten was wrong anyway."""
    able = rng.random(len(events)) < 0.9
    right = np.ones_like(events)
    return np.stack([right, able, right, able & ~events], axis=1)


def clustered(rng: Generator, images: int, each: int, rate: float, how: str) -> NDArray[np.bool_]:
    """Events of questions that share images, each with the rate.

    Args:
        rng: of the draw.
        images: how many.
        each: questions of one.
        rate: of the event.
        how: "copies" (half of the images have one outcome for all), or "mild" (the rate of an image
            is Beta distributed with an intraclass correlation of 0.3).
    """
    if how == "copies":
        same = rng.random(images) < 0.5
        common = np.repeat((rng.random(images) < rate)[:, None], each, axis=1)
        alone = rng.random((images, each)) < rate
        return np.where(same[:, None], common, alone).ravel()
    scale = (1 - 0.3) / 0.3
    own = rng.beta(rate * scale, (1 - rate) * scale, images)
    return (rng.random((images, each)) < own[:, None]).ravel()


def simulate(case: Case, runs: int, seed: int) -> Rates:
    """Draw runs of a case and count what is decided of them."""
    rng, found = np.random.default_rng(seed), Rates(case.name, case.kind, runs)
    for index in range(runs):
        now, before = case.draw(rng)

        def measured(gate: GateSpec, one: Cell, now=now, before=before, seed=index) -> Measured:  # noqa: ANN001
            if gate.compares:
                return Measured(change_of(now[one.id], before[one.id], gate.metric, seed))
            return Measured(bounds_of(list(now[one.id].values()), gate.metric, seed))

        full = Progress(expected=1, measured=1, errors=0)
        made = decide(case.gates, Run(case.cells, measured, lambda _, full=full: full))
        verdicts = {one.verdict for one in made}
        within = [
            _within(gate, each.value)
            for gate, decision in zip(case.gates, made, strict=True)
            for each in decision.cells
        ]
        found.passes += verdicts == {Verdict.PASS}
        found.fails += Verdict.FAIL in verdicts
        found.point_passes += all(within)
        found.point_fails += not all(within)
    return found


def _within(gate: GateSpec, value: float | None) -> bool:
    least, most = gate.limits
    return (
        value is not None and (most is None or value <= most) and (least is None or value >= least)
    )


def gate(metric: str = "csfr", **changes: object) -> GateSpec:
    """A gate at the limit."""
    fields = {"name": metric, "metric": metric, "max": LIMIT, "confidence": CONFIDENCE}
    return GateSpec.model_validate(fields | changes)


def single(n: int, rate: float = LIMIT) -> Case:
    """One gate on one cell of independent samples."""

    def draw(rng: Generator) -> Drawn:
        return {"one0": rows_of(failing(rng.random(n) < rate, rng))}, {}

    return Case(f"CSFR ≤ {rate:g}, {n} images", (gate(max=rate),), (cell("one"),), draw)


def shared(images: int, each: int, how: str) -> Case:
    """One gate on one cell whose questions share images."""

    def draw(rng: Generator) -> Drawn:
        events = clustered(rng, images, each, LIMIT, how)
        return {"one0": rows_of(failing(events, rng), each)}, {}

    name = f"CSFR ≤ {LIMIT:g}, {images} images with {each} questions, {how}"
    return Case(name, (gate(),), (cell("one"),), draw)


def minimum(n: int) -> Case:
    """A gate on an accuracy that has to be at least something."""

    def draw(rng: Generator) -> Drawn:
        right = rng.random(n) < 1 - LIMIT
        return {"one0": rows_of(np.stack([right] * 4, axis=1))}, {}

    spec = gate("acc_compressed_attacked", max=None, min=1 - LIMIT)
    return Case(f"accuracy ≥ {1 - LIMIT:g}, {n} images", (spec,), (cell("one"),), draw)


def family(n: int, cells: int) -> Case:
    """Two gates on many cells, all at their limits: any FAIL is a false alarm."""
    named = tuple(cell("many", index) for index in range(cells))
    gates = (gate(), gate("compressed_asr"))

    def draw(rng: Generator) -> Drawn:
        return {one.id: rows_of(failing(rng.random(n) < LIMIT, rng)) for one in named}, {}

    return Case(f"2 gates × {cells} cells at the limit, {n} images", gates, named, draw, "fail")


def weakest(n: int, cells: int) -> Case:
    """Many cells of which one is at its limit: a PASS of the run passes that one wrongly."""
    named = tuple(cell("many", index) for index in range(cells))

    def draw(rng: Generator) -> Drawn:
        rates = [LIMIT] + [0.0] * (cells - 1)
        return {
            one.id: rows_of(failing(rng.random(n) < rate, rng))
            for one, rate in zip(named, rates, strict=True)
        }, {}

    return Case(
        f"{cells} cells, one of them at the limit, {n} images", (gate(),), named, draw, "pass"
    )


def ratio(n: int, each: int = 1) -> Case:
    """A gate on CSG, which is decided by a bootstrap."""

    def draw(rng: Generator) -> Drawn:
        chance = np.repeat(rng.random(n // each), each)
        full = rng.random(n) < 0.9
        compressed = np.where(full, rng.random(n) < 0.95, rng.random(n) < 0.3)
        answers = [full, compressed, full & (chance >= 0.05), compressed & (chance >= 0.05 + LIMIT)]
        return {"one0": rows_of(np.stack(answers, axis=1), each)}, {}

    name = f"CSG ≤ {LIMIT:g}, {n // each} images" + (f" with {each} questions" if each > 1 else "")
    return Case(name, (gate("csg"),), (cell("one"),), draw)


def change(n: int, before: float, newly: float, no_longer: float, each: int = 1) -> Case:
    """A gate on the rise since a baseline, which is what it may be.

    Args:
        n: samples.
        before: rate of the baseline.
        newly: share of those without the event that have it now.
        no_longer: share of those with it that no longer have it.
        each: questions of an image, which then share their fate.
    """
    rise = round(newly * (1 - before) - no_longer * before, 6)

    def draw(rng: Generator) -> Drawn:
        old, chance = rng.random(n // each) < before, rng.random(n // each)
        new = np.where(old, chance >= no_longer, chance < newly)
        runs = [
            rows_of(np.stack([np.ones(n, bool)] * 3 + [~np.repeat(one, each)], axis=1), each)
            for one in (new, old)
        ]
        return {"one0": runs[0]}, {"one0": runs[1]}

    spec = gate(max=None, max_increase=rise, baseline="base")
    name = f"rise ≤ {rise:g} from {before:g} ({newly:g} newly, {no_longer:g} no longer), "
    name += f"{n // each} images" + (f" with {each} questions" if each > 1 else "")
    return Case(name, (spec,), (cell("one"),), draw)


def cases() -> list[Case]:
    """All that the page has."""
    return [
        single(64),
        single(300),
        single(2_000),
        single(300, 0.02),
        minimum(300),
        shared(50, 4, "copies"),
        shared(50, 4, "mild"),
        shared(200, 4, "copies"),
        shared(20, 5, "copies"),
        family(100, 12),
        weakest(100, 12),
        ratio(64),
        ratio(300),
        ratio(200, 4),
        change(100, 0.1, 0.05, 0.45),
        change(300, 0.1, 0.1, 0.1),
        change(400, 0.3, 0.1, 0.05),
        change(400, 0.1, 0.1, 0.1, each=4),
    ]


def interval(events: int, runs: int) -> str:
    """A rate in percent with its Clopper–Pearson interval."""
    level = 0.5 + CONFIDENCE / 2
    low, high = lower_bound(events, runs, level), upper_bound(events, runs, level)
    return f"{100 * events / runs:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def page(found: Sequence[Rates], runs: int, seed: int) -> str:
    """The page."""
    lines = [
        "# Calibration of gates",
        "",
        f"Made by `{COMMAND} --runs {runs} --seed {seed}`; do not edit. {runs:,} runs of each line, "
        f"seed {seed}, gates at {CONFIDENCE:.0%}.",
        "",
        "The truth of every run is **exactly at the limit**: of each, at most 5.0 % may pass and at "
        "most 5.0 % may fail; the rest is inconclusive. *Point* is a gate that compares the value "
        "itself with the limit. All in percent of the runs, with the 95 % Clopper–Pearson interval. "
        "The runs are drawn and not measured on a model; they go through the code that decides "
        "real ones ([how](../gates.md)).",
        "",
        "| runs | false pass | false pass, point | false fail | false fail, point |",
        "|---|---|---|---|---|",
    ]
    for one in found:
        cells = [one.case]
        for kind, events in (
            ("pass", one.passes),
            ("pass", one.point_passes),
            ("fail", one.fails),
            ("fail", one.point_fails),
        ):
            cells.append(interval(events, one.runs) if one.kind in ("both", kind) else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_above(found), "", *_reading(), ""])


def _above(found: Sequence[Rates]) -> list[str]:
    """The rates above the nominal one, so that nobody has to look for them."""
    above = [
        f"{one.case}, {words}: {interval(events, one.runs)}"
        for one in found
        for words, kind, events in (
            ("false pass", "pass", one.passes),
            ("false fail", "fail", one.fails),
        )
        if one.kind in ("both", kind) and events > (1 - CONFIDENCE) * one.runs
    ]
    return [f"Above 5.0 %: {'; '.join(above) or 'none'}."]


def _reading() -> list[str]:
    return [
        "*copies*: half of the images have one outcome for all their questions, the others "
        "independent ones; *mild*: intraclass correlation 0.3. In the rows of CSG and of a rise with "
        "several questions all questions of an image share their fate. *2 gates × 12 cells*: every "
        "decision is at its limit and any FAIL is counted, so this is the family-wise rate that "
        "Holm's correction holds (both gates see the same events, as CSFR and attack success often do). *12 cells, one at the limit*: the others are far within, which is "
        "where a run is likeliest to pass wrongly.",
        "",
        "The exact bounds are conservative by nature (a count cannot hit 5 % exactly) and more so "
        "where few images show the rarer outcome. The bootstrap (BCa, by image) and Newcombe's "
        "interval are approximations, which is why they are checked here.",
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=4_000, help="of each line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose name holds this; writes no page")
    parser.add_argument("--page", type=Path, default=Path("docs/results/gate-calibration.md"))
    parser.add_argument(
        "--data", type=Path, default=Path("benchmarks/results/gate_calibration.json")
    )
    arguments = parser.parse_args()
    found = []
    for index, case in enumerate(cases()):
        if arguments.only not in case.name:
            continue
        started = time.perf_counter()
        one = simulate(case, arguments.runs, arguments.seed + index)
        found.append(one)
        print(f"{time.perf_counter() - started:6.0f} s  {one}", flush=True)
    if arguments.only:
        return
    data = {
        "command": f"{COMMAND} --runs {arguments.runs} --seed {arguments.seed}",
        "runs": arguments.runs,
        "seed": arguments.seed,
        "confidence": CONFIDENCE,
        "cases": [asdict(one) for one in found],
    }
    arguments.data.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    arguments.page.write_text(page(found, arguments.runs, arguments.seed), encoding="utf-8")
    print(f"written: {arguments.page}, {arguments.data}")


if __name__ == "__main__":
    main()
