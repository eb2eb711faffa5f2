"""From trials to summary.json, whose form is docs/results-format.md.

The metrics themselves are in `reports.measure`, their definitions in `reports.registry`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from reports.availability import Latency
from reports.badges import Badges
from reports.baseline import Baselines
from reports.checks import Doubt, grouped, run_checks, vetoes
from reports.deciding import Doubts, Measured, Run, decide
from reports.detection import Scores, detectors
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
    Effort,
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
    scores = Scores()
    rows, timings, effort = _collect(manifest, _noted(trials, scores))
    measured: dict[tuple[str, float], dict[str, Estimate]] = {}

    def of(cell: Cell, confidence: float) -> dict[str, Estimate]:
        if (cell.id, confidence) not in measured:
            measured[cell.id, confidence] = measure(
                rows[cell.id], seed=seed_of(manifest, cell.id), confidence=confidence
            )
        return measured[cell.id, confidence]

    progress = {cell.id: _progress(rows[cell.id], len(manifest.samples)) for cell in manifest.cells}
    doubts = _doubts(manifest.cells, rows)
    badges = Badges(manifest, rows, doubts)

    def doubt(gate: GateSpec, cell: Cell) -> str | None:
        found = vetoes(gate, doubts[cell.id])
        return badges.veto(gate, cell) if found is None else found.sentence

    def name(cell: Cell) -> str:
        return cell_label(cell, badges.of(cell))

    gates = _decided(
        manifest,
        rows,
        Baselines(manifest) if baselines is None else baselines,
        lambda cell, name, confidence: of(cell, confidence).get(name, EMPTY),
        (lambda cell: progress[cell.id], doubt, name),
    )
    whole = Progress(
        expected=sum(p.expected for p in progress.values()),
        measured=sum(p.measured for p in progress.values()),
        errors=sum(p.errors for p in progress.values()),
    )
    conclusion = conclude(gates, whole)
    summary = {
        "schema": SCHEMA_VERSION,
        "name": manifest.name,
        "scenario_hash": manifest.scenario_hash,
        "seed": manifest.seed,
        **conclusion.model_dump(mode="json"),
        "progress": {**whole.model_dump(), "missing": whole.missing},
        **_filter(manifest),
        "confidence": CONFIDENCE,
        "gates": [gate.model_dump(mode="json") for gate in gates],
        "checks": [
            check.model_dump(mode="json")
            for check in grouped([one for found in doubts.values() for one in found], name)
        ],
        "defenses": badges.as_json(),
        "cells": [
            {
                **_cell(manifest, cell, rows[cell.id], of(cell, CONFIDENCE), progress[cell.id]),
                "badge": badges.of(cell),
                **effort.get(cell.id, {}),
                **minimal_epsilon(cell, rows[cell.id]),
                "checks": [{"code": one.code, "message": one.message} for one in doubts[cell.id]],
            }
            for cell in manifest.cells
        ],
        "timings": {**timings, "defenses": badges.timings()},
    }
    watched = detectors(manifest, scores, calibrations)
    if watched is not None:
        summary["detectors"] = watched
    matrix = transfer(manifest.cells, summary["cells"])
    return summary if matrix is None else {**summary, "transfer": matrix}


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
    seconds: dict[str, Counter[str]] = {cell.id: Counter() for cell in manifest.cells}
    efforts: dict[str, dict[str, tuple[Effort, str]]] = {cell.id: {} for cell in manifest.cells}
    latency = Latency()
    for trial in trials:
        if trial.cell not in cells or trial.sample not in order:
            raise ReportError(
                f"the ledger holds a trial of cell {trial.cell!r}, sample {trial.sample!r}, which "
                "the manifest does not plan; the two files are not of the same run"
            )
        cells[trial.cell][trial.sample] = row_of(trial)
        seconds[trial.cell].update(trial.timings)
        if trial.effort is not None:
            efforts[trial.cell][trial.sample] = trial.effort, trial.made_by
        if trial.demands is not None:
            latency.add(trial.cell, trial.sample, trial.demands)
    rows = {
        cell: [found[sample] for sample in sorted(found, key=order.__getitem__)]
        for cell, found in cells.items()
    }
    spent = {cell: _effort(list(found.values())) for cell, found in efforts.items() if found}
    return rows, {**_timings(seconds), "answers": latency.summary()}, spent


def _effort(trials: Sequence[tuple[Effort, str]]) -> dict[str, Any]:
    """What making an image of a cell took, on average, and which part of a combined attack did."""
    names = ("forwards", "backwards", "queries")
    makers = Counter(maker for _, maker in trials if maker)
    return {
        "effort": {
            name: round(sum(getattr(one, name) for one, _ in trials) / len(trials), 2)
            for name in names
        },
        **({"made_by": dict(makers.most_common())} if makers else {}),
    }


def _timings(seconds: dict[str, Counter[str]]) -> dict[str, Any]:
    total: Counter[str] = Counter()
    for phases in seconds.values():
        total.update(phases)
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
