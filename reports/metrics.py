"""From trials to summary.json, whose form is docs/results-format.md.

The metrics themselves are in `reports.measure`, their definitions in `reports.registry`.
"""

from __future__ import annotations

import gc
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from reports.availability import Latency
from reports.badges import Badges
from reports.baseline import Baselines
from reports.checks import Doubt, grouped, run_checks, vetoes
from reports.deciding import Doubts, Measured, Run, decide
from reports.detection import Scores, detectors
from reports.draws import over_draws
from reports.errors import ReportError
from reports.gate import GateDecision, Progress, cell_label, conclude
from reports.gate_bounds import bounds_of
from reports.measure import CONFIDENCE, OUTCOMES, Row, measure, row_of
from reports.paired import PairedTable, newcombe
from reports.records import (
    SCHEMA_VERSION,
    Calibration,
    Cell,
    Diagnosis,
    GateSpec,
    Manifest,
    Trial,
)
from reports.registry import METRICS, Metric
from reports.statistics import EMPTY, Estimate, mcnemar_exact
from reports.survival import minimal_epsilon
from reports.transfer import transfer

__all__ = ["METRICS", "Metric", "Row", "measure", "row_of", "summarise"]


def seed_of(manifest: Manifest, cell: str) -> int:
    """Seed of a cell's bootstrap: the run's seed and the cell, nothing else."""
    digest = hashlib.blake2b(f"bootstrap:{manifest.seed}:{cell}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def summarise(
    manifest: Manifest,
    trials: Iterable[Trial],
    calibrations: Sequence[Calibration] = (),
    baselines: Baselines | None = None,
) -> dict[str, Any]:
    """Compute summary.json; see docs/results-format.md for what it holds.

    Args:
        manifest: of the run.
        trials: in any order; of several with the same cell and sample the last counts.
        calibrations: of its detectors.
        baselines: of its gates; read from where the gates say if left out.

    Raises:
        ReportError: if a trial belongs to no cell or sample of the manifest.
    """
    with _uncollected():
        return _summarise(manifest, trials, calibrations, baselines)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the cycle collector, which a third of the time would go to.

    The records of a ledger hold no cycles, and there are hundreds of thousands of them, which it
    would walk through again and again.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _summarise(
    manifest: Manifest,
    trials: Iterable[Trial],
    calibrations: Sequence[Calibration],
    baselines: Baselines | None,
) -> dict[str, Any]:
    scores = Scores()
    rows, timings, effort = _collect(manifest, _noted(trials, scores))
    found = _Measured(manifest, rows)
    gates = found.gates(Baselines(manifest) if baselines is None else baselines)
    whole = found.whole()
    cells = [{**found.cell(cell), **effort.get(cell.id, {})} for cell in manifest.cells]
    summary = {
        "schema": SCHEMA_VERSION,
        "name": manifest.name,
        "scenario_hash": manifest.scenario_hash,
        "seed": manifest.seed,
        **conclude(gates, whole).model_dump(mode="json"),
        "progress": {**whole.model_dump(), "missing": whole.missing},
        **_filter(manifest),
        "confidence": CONFIDENCE,
        "gates": [gate.model_dump(mode="json") for gate in gates],
        "checks": found.checks(),
        "defenses": found.badges.as_json(),
        "cells": cells,
        "timings": {**timings, "defenses": found.badges.timings()},
    }
    watched, matrix = detectors(manifest, scores, calibrations), transfer(manifest.cells, cells)
    if watched is not None:
        summary["detectors"] = watched
    return summary if matrix is None else {**summary, "transfer": matrix}


class _Measured:
    """The cells of a run: metrics, doubts and badges, each computed once.

    Attributes:
        badges: of its defences.
    """

    def __init__(self, manifest: Manifest, rows: Mapping[str, Sequence[Row]]) -> None:
        self._manifest, self._rows = manifest, rows
        self._metrics: dict[tuple[str, float], dict[str, Estimate]] = {}
        self._done = {
            cell.id: _progress(rows[cell.id], len(manifest.samples)) for cell in manifest.cells
        }
        self._doubts = _doubts(manifest.cells, rows)
        self.badges = Badges(manifest, rows, self._doubts)

    def gates(self, baselines: Baselines) -> list[GateDecision]:
        """The decision of each gate."""
        return _decided(
            self._manifest,
            self._rows,
            baselines,
            lambda cell, name, confidence: self._of(cell, confidence).get(name, EMPTY),
            (lambda cell: self._done[cell.id], self._doubt, self._name),
        )

    def whole(self) -> Progress:
        """Progress of all cells together."""
        done = self._done.values()
        return Progress(
            expected=sum(p.expected for p in done),
            measured=sum(p.measured for p in done),
            errors=sum(p.errors for p in done),
        )

    def checks(self) -> list[dict[str, Any]]:
        """`checks` of the summary."""
        every = [one for found in self._doubts.values() for one in found]
        return [check.model_dump(mode="json") for check in grouped(every, self._name)]

    def cell(self, cell: Cell) -> dict[str, Any]:
        """One entry of `cells` in the summary, without what its attack took."""
        rows, metrics = self._rows[cell.id], self._of(cell, CONFIDENCE)
        doubts = self._doubts[cell.id]
        return {
            **_cell(self._manifest, cell, rows, metrics, self._done[cell.id]),
            "badge": self.badges.of(cell),
            **minimal_epsilon(cell, rows),
            **({"draws": found} if (found := over_draws(rows)) else {}),
            "checks": [{"code": one.code, "message": one.message} for one in doubts],
        }

    def _of(self, cell: Cell, confidence: float) -> dict[str, Estimate]:
        key = cell.id, confidence
        if key not in self._metrics:
            seed = seed_of(self._manifest, cell.id)
            self._metrics[key] = measure(self._rows[cell.id], seed=seed, confidence=confidence)
        return self._metrics[key]

    def _doubt(self, gate: GateSpec, cell: Cell) -> str | None:
        found = vetoes(gate, self._doubts[cell.id])
        return self.badges.veto(gate, cell) if found is None else found.sentence

    def _name(self, cell: Cell) -> str:
        return cell_label(cell, self.badges.of(cell))


def _decided(
    manifest: Manifest,
    rows: Mapping[str, Sequence[Row]],
    baselines: Baselines,
    estimate: Callable[[Cell, str, float], Estimate],
    seen: tuple[Callable[[Cell], Progress], Doubts, Callable[[Cell], str]],
) -> list[GateDecision]:
    """The gates of a run, each from the bounds of its metric or of its change."""

    def measured(gate: GateSpec, cell: Cell) -> Measured:
        mine, seed = rows[cell.id], seed_of(manifest, cell.id)
        if gate.compares:
            return baselines.change(gate, cell, mine, seed)
        interval = estimate(cell, gate.metric, gate.confidence)
        return Measured(bounds_of(mine, gate.metric, seed), interval)

    def clean_drop(cell: Cell) -> Estimate:
        return estimate(cell, "clean_drop", CONFIDENCE)

    return decide(manifest.gates, Run(manifest.cells, measured, *seen, clean_drop))


def _noted(trials: Iterable[Trial], scores: Scores) -> Iterator[Trial]:
    """The trials as they are, the scores of detectors noted on the way."""
    for trial in trials:
        scores.add(trial)
        yield trial


def _doubts(cells: Sequence[Cell], rows: Mapping[str, Sequence[Row]]) -> dict[str, list[Doubt]]:
    """Self-checks of the run by cell, every cell included."""
    found: dict[str, list[Doubt]] = {cell.id: [] for cell in cells}
    for one in run_checks(cells, rows):
        found[one.cell.id].append(one)
    return found


def _filter(manifest: Manifest) -> dict[str, Any]:
    """How many samples the data set's filter left out and why, if it has one."""
    found = manifest.provenance.get("filter")
    if found is None:
        return {}
    return {
        "filter": {
            **found,
            "left_out": {why: len(ids) for why, ids in found["left_out"].items()},
        }
    }


def _collect(
    manifest: Manifest, trials: Iterable[Trial]
) -> tuple[dict[str, list[Row]], dict[str, Any], dict[str, dict[str, Any]]]:
    order = {sample: index for index, sample in enumerate(manifest.samples)}
    cells: dict[str, dict[str, Row]] = {cell.id: {} for cell in manifest.cells}
    seconds: dict[str, dict[str, float]] = {cell.id: defaultdict(float) for cell in manifest.cells}
    efforts: dict[str, dict[str, tuple[str, _Taken]]] = {cell.id: {} for cell in manifest.cells}
    latency = Latency()
    for trial in trials:
        if trial.cell not in cells or trial.sample not in order:
            raise ReportError(
                f"the ledger holds a trial of cell {trial.cell!r}, sample {trial.sample!r}, which "
                "the manifest does not plan; the two files are not of the same run"
            )
        cells[trial.cell][trial.sample] = row_of(trial)
        spent = seconds[trial.cell]
        for phase, took in trial.timings.items():
            spent[phase] += took
        if trial.effort is not None:
            efforts[trial.cell][trial.sample] = trial.made_by, _taken(trial.effort)
        if trial.demands is not None:
            latency.add(trial.cell, trial.sample, trial.demands)
    rows = {
        cell: [found[sample] for sample in sorted(found, key=order.__getitem__)]
        for cell, found in cells.items()
    }
    effort = {cell: _effort(list(found.values())) for cell, found in efforts.items() if found}
    return rows, {**_timings(seconds), "answers": latency.summary()}, effort


_EFFORT = ("forwards", "backwards", "queries")
_taken = attrgetter(*_EFFORT)
_Taken = tuple[int, ...]


def _effort(trials: Sequence[tuple[str, _Taken]]) -> dict[str, Any]:
    """What making an image of a cell took, on average, and which part of a combined attack did.

    Args:
        trials: who made each image, and what it took, in the order of `_EFFORT`.
    """
    makers = Counter(maker for maker, _ in trials if maker)
    return {
        "effort": {
            name: round(sum(taken[index] for _, taken in trials) / len(trials), 2)
            for index, name in enumerate(_EFFORT)
        },
        **({"made_by": dict(makers.most_common())} if makers else {}),
    }


def _timings(seconds: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    total: dict[str, float] = defaultdict(float)
    for phases in seconds.values():
        for phase, spent in phases.items():
            total[phase] += spent
    return {
        "unit": "seconds, summed over trials",
        "total": {phase: round(total[phase], 3) for phase in sorted(total)},
        "cells": {
            cell: {phase: round(phases[phase], 3) for phase in sorted(phases)}
            for cell, phases in seconds.items()
        },
    }


def _progress(rows: Sequence[Row], expected: int) -> Progress:
    errors = sum(row.error for row in rows)
    return Progress(expected=expected, measured=len(rows) - errors, errors=errors)


def _cell(
    manifest: Manifest, cell: Cell, rows: Sequence[Row], found: dict[str, Estimate], done: Progress
) -> dict[str, Any]:
    failures = [row for row in rows if row.failure]
    diagnosed = Counter(row.diagnosis.value if row.diagnosis else "undiagnosed" for row in failures)
    names = (*(diagnosis.value for diagnosis in Diagnosis), "undiagnosed")
    pair = [(row.full_attacked, row.compressed_attacked) for row in rows if not row.error]
    only_full, only_compressed = pair.count((True, False)), pair.count((False, True))
    p = mcnemar_exact(only_full, only_compressed)
    return {
        "id": cell.id,
        "target": cell.target,
        "compression": cell.compression,
        "attack": cell.attack,
        "defense": cell.defense,
        "epsilon": cell.epsilon,
        "norm": cell.norm,
        "knowledge": cell.knowledge,
        "knows_compression": cell.knows_compression,
        "declared": cell.declared,
        "n": done.measured,
        "errors": done.errors,
        "missing": done.missing,
        "images": len({row.image for row in rows if not row.error}),
        "metrics": {name: estimate.as_json() for name, estimate in found.items()},
        "retention": _mean([row.retention for row in rows if row.retention is not None]),
        "outcomes": _outcomes(rows),
        "failures": len(failures),
        "diagnosis": {name: diagnosed[name] for name in names},
        "mcnemar": {
            "only_full_right": only_full,
            "only_compressed_right": only_compressed,
            "p": None if p is None else float(f"{p:.6g}"),
            "difference": newcombe(PairedTable.of(pair), CONFIDENCE).as_json(),
        },
        "by_kind": _by_kind(rows, seed_of(manifest, cell.id)),
    }


def _outcomes(rows: Sequence[Row]) -> dict[str, int]:
    """How many samples had each outcome: right (1) or wrong (0) for c, c_K, c', c'_K."""
    counts = Counter("".join("01"[right] for right in row[3:7]) for row in rows if not row.error)
    return {outcome: counts[outcome] for outcome in sorted(counts, reverse=True)}


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 6) if values else None


def _by_kind(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    kinds = sorted({row.kind for row in rows})
    if kinds in ([], [""]):
        return {}
    result: dict[str, Any] = {}
    for kind in kinds:
        mine = [row for row in rows if row.kind == kind]
        errors = sum(row.error for row in mine)
        found = measure(mine, seed=seed, names=OUTCOMES)
        result[kind] = {
            "n": len(mine) - errors,
            "errors": errors,
            "metrics": {name: estimate.as_json() for name, estimate in found.items()},
        }
    return result
