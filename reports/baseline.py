"""A baseline: an earlier run on the same samples, which a gate compares a run with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reports.bounds import Bounds, Difference
from reports.deciding import Measured
from reports.errors import ReportError, StoreError
from reports.gate import Progress
from reports.gate_bounds import change_of
from reports.gate_words import no_bounds
from reports.matching import Matching, match, unlike
from reports.measure import Row, row_of
from reports.records import Cell, GateSpec, Manifest
from reports.statistics import EMPTY, Estimate
from reports.store import RunStore
from reports.text import plain

NO_BASELINE = (
    "no baseline run is named: write `baseline: RUN` at the gate, or give --baseline RUN to "
    "redteam gate or redteam report"
)


@dataclass(frozen=True, slots=True)
class Baseline:
    """A run read from its folder.

    Attributes:
        folder: as it was named.
        manifest: of the run.
        rows: of each cell by its id, by sample, errors included.
        asked: question, truth and image of each sample.
    """

    folder: str
    manifest: Manifest
    rows: Mapping[str, Mapping[str, Row]]
    asked: Mapping[str, tuple[str, str, str]]

    @classmethod
    def read(cls, folder: Path, name: str = "") -> Baseline:
        """Read a run folder.

        Args:
            folder: of the run.
            name: how to call it; its path by default.

        Raises:
            StoreError: if it is no run folder, or is damaged.
        """
        store = RunStore.read(folder)
        rows: dict[str, dict[str, Row]] = {cell.id: {} for cell in store.manifest.cells}
        asked: dict[str, tuple[str, str, str]] = {}
        for trial in store.trials():
            if trial.cell not in rows:
                raise StoreError(
                    f"{folder}: the ledger holds a trial of cell {trial.cell!r}, which its "
                    "manifest does not plan; the two files are not of the same run"
                )
            rows[trial.cell][trial.sample] = row_of(trial)
            asked[trial.sample] = trial.question, trial.truth, trial.image
        return cls(name or str(folder), store.manifest, rows, asked)

    def progress(self, cell: Cell) -> Progress:
        """How much of a cell was measured."""
        rows = self.rows[cell.id].values()
        errors = sum(row.error for row in rows)
        return Progress(
            expected=len(self.manifest.samples), measured=len(rows) - errors, errors=errors
        )

    @property
    def told(self) -> dict[str, str]:
        """What a decision says of it."""
        return {
            "folder": self.folder,
            "name": self.manifest.name,
            "scenario_hash": self.manifest.scenario_hash,
            "created": self.manifest.created,
        }


def refuse_unlike(before: Manifest, now: Manifest, folder: str) -> None:
    """Stop where two runs cannot be compared.

    Raises:
        ReportError: if they are on different data or samples, saying what differs.
    """
    reasons = unlike(before, now)
    if reasons:
        raise ReportError(
            f"{folder} cannot be compared with this run: {'; '.join(reasons)}. Only runs on the "
            "same samples can: run both with the same dataset, --limit and filter"
        )


class Baselines:
    """The baselines of a run's gates, each read once.

    Args:
        manifest: of the run that is compared.
        given: a baseline that takes the place of all the gates name; None to use theirs.
        folder: of the run, which cannot be its own baseline; None if unknown.

    Raises:
        ReportError: if the one given cannot be read, is on other data, or is the run itself.
    """

    def __init__(
        self, manifest: Manifest, given: Path | None = None, folder: Path | None = None
    ) -> None:
        self._manifest, self._folder = manifest, folder
        self._read: dict[str, Baseline | str] = {}
        self._matchings: dict[str, Matching] = {}
        self._given: Baseline | None = None
        if given is not None:
            self._given = self._checked(given, str(given))

    def of(self, gate: GateSpec) -> Baseline | str:
        """The baseline of a gate, or why it has none."""
        if self._given is not None:
            return self._given
        if not gate.baseline:
            return NO_BASELINE
        if gate.baseline not in self._read:
            self._read[gate.baseline] = self._open(gate)
        return self._read[gate.baseline]

    def _open(self, gate: GateSpec) -> Baseline | str:
        places = [Path(one) for one in (gate.baseline_folder, gate.baseline) if one]
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None:
            return f"the baseline {plain(gate.baseline)} is not there; give --baseline RUN"
        try:
            return self._checked(folder, gate.baseline)
        except ReportError as error:
            return plain(str(error))

    def _checked(self, folder: Path, name: str) -> Baseline:
        if self._folder is not None and folder.resolve() == self._folder.resolve():
            raise ReportError(
                f"{name} is the run itself, which is never worse than itself; name an earlier run"
            )
        found = Baseline.read(folder, name)
        refuse_unlike(found.manifest, self._manifest, name)
        return found

    def change(self, gate: GateSpec, cell: Cell, rows: Sequence[Row], seed: int) -> Measured:
        """How much a metric has changed in a cell.

        Args:
            gate: on the change of a metric.
            cell: of the run.
            rows: of the cell, errors included.
            seed: of a bootstrap.
        """
        baseline = self.of(gate)
        if isinstance(baseline, str):
            return Measured(objection=baseline, cause="baseline")
        if baseline.folder not in self._matchings:
            self._matchings[baseline.folder] = match(baseline.manifest.cells, self._manifest.cells)
        matching = self._matchings[baseline.folder]
        partner = matching.before(cell)
        why = matching.reason(cell) if partner is None else baseline.progress(partner).objection()
        if partner is None or why:
            why = why if partner is None else f"in the baseline {why}"
            return Measured(objection=why or "", cause="baseline", baseline=baseline.told)
        before = baseline.rows[partner.id]
        now = {row.sample: row for row in rows}
        moved = [name for name in now if name in before and now[name].image != before[name].image]
        if moved:
            why = f"sample {plain(moved[0])!r} shows another image in the baseline"
            return Measured(objection=why, cause="baseline", baseline=baseline.told)
        bounds = change_of(now, before, gate.metric, seed)
        return Measured(
            bounds=bounds,
            interval=interval_of(bounds, gate.confidence),
            objection="" if bounds is not None and bounds.n else no_bounds(gate, bounds),
            change=counts_of(bounds),
            baseline=baseline.told,
        )


def interval_of(bounds: Bounds | None, confidence: float) -> Estimate:
    """Two-sided interval of what has one-sided bounds."""
    if bounds is None or bounds.value is None:
        return EMPTY
    one_sided = 0.5 + confidence / 2
    return Estimate(bounds.value, bounds.lower(one_sided), bounds.upper(one_sided), bounds.n)


def counts_of(bounds: Bounds | None) -> dict[str, int]:
    """Samples behind a difference of rates; empty of other metrics."""
    if not isinstance(bounds, Difference):
        return {}
    table = bounds.table
    return {
        "before": round(table.both + table.only_second),
        "now": round(table.both + table.only_first),
        "newly": round(table.only_first),
        "no_longer": round(table.only_second),
    }
