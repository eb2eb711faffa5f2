"""Carry out a scenario: prepare, run unit by unit, record, report; stop and resume cleanly."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from redteam import provenance
from redteam.cache import ImageCache
from redteam.calibrating import open_calibration
from redteam.capabilities import cautions
from redteam.datasets.base import Samples
from redteam.datasets.filters import without
from redteam.engines.base import AtWork, Engine
from redteam.engines.local import LocalEngine
from redteam.errors import NothingSelected
from redteam.plan import Plan, WorkUnit, make_plan
from redteam.scenario import Scenario
from redteam.screening import described, filter_of, recorded
from redteam.sharding import Shard
from reports import Built, build_reports
from reports.errors import ResumeMismatch
from reports.records import Manifest, Trial
from reports.store import MANIFEST, RunStore, differences
from reports.text import plain

if TYPE_CHECKING:
    from redteam.profiling import Profile


class Watcher(Protocol):
    """Sees a run go by; `redteam.progress` shows it to people."""

    def prepared(self, folder: Path, units: list[WorkUnit], resumed: int) -> None:
        """Everything is ready; `resumed` trials are there already."""
        ...

    def finished(self, unit: WorkUnit, trials: list[Trial]) -> None:
        """A unit is on the disk."""
        ...

    def working(self, event: AtWork) -> None:
        """One of several workers does something else now; a run of one worker has none."""
        ...

    def say(self, message: str) -> None:
        """Something the user should know now."""
        ...


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that ended.

    Attributes:
        folder: the run folder.
        built: its reports and the verdict; None of a part, which nothing can be said about.
        interrupted: whether the user stopped it.
        notes: what a reader should know before trusting the table, beside those of `built`.
        shard: the part of a run that this was; None of a whole run.
        trials: recorded in the folder, errors included.
    """

    folder: Path
    built: Built | None
    interrupted: bool
    notes: tuple[str, ...] = ()
    shard: Shard | None = None
    trials: int = 0


def default_folder(scenario: Scenario, shard: Shard | None = None) -> Path:
    """``runs/<name>-<time>-<hash>``, time in UTC; of a part also ``-<i>of<n>``."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    part = "" if shard is None else f"-{shard.index}of{shard.of}"
    return Path("runs") / f"{scenario.name}-{stamp}-{scenario.hash[:8]}{part}"


def run(
    scenario: Scenario,
    folder: Path,
    watcher: Watcher,
    shard: Shard | None = None,
    profile: Profile | None = None,
    cache: ImageCache | None = None,
    *,
    retry_errors: bool = False,
) -> Finished:
    """Run a scenario into a folder; continue if the folder holds this run already.

    Nothing is written before the scenario, the data and every target have been found usable.

    Args:
        scenario: checked.
        folder: a new or empty one, or that of an earlier run of the same scenario.
        watcher: told what happens.
        shard: the part to run; None for all of it.
        profile: an active one, to be told what is loading; it is written into the folder.
        cache: of attacked images of earlier runs, for what runs on this machine; None makes all.
        retry_errors: measure trials again that ended in an error; else they stay as they are.

    Raises:
        RedteamError: if the scenario cannot be run.
        StoreError: if the folder cannot be used, or holds another run (`ResumeMismatch`).
    """
    plan = make_plan(scenario)
    samples: Samples = scenario.dataset.create().open()
    if not len(samples):
        raise NothingSelected(str(scenario.dataset.problem("the data set holds no sample")))
    calibration = open_calibration(scenario, samples)
    resumed = (folder / MANIFEST).exists()
    if resumed:
        samples = without(samples, recorded(RunStore.read(folder).manifest.provenance))
        manifest = make_manifest(plan, samples, {})
        units = _resumable(folder, manifest, plan, len(samples), shard, retry_errors)
        if not units:
            return _finished(folder, False, cautions(scenario), shard)
    with _engine(plan, samples, watcher, calibration, cache, profile) as engine:
        return _carry_out(
            plan, samples, engine, folder, watcher, shard, profile, calibration, retry_errors
        )


def _carry_out(
    plan: Plan,
    samples: Samples,
    engine: Engine,
    folder: Path,
    watcher: Watcher,
    shard: Shard | None,
    profile: Profile | None,
    calibration: Samples | None,
    retry_errors: bool,
) -> Finished:
    """Prepare an engine, run what is missing, report."""
    scenario, resumed = plan.scenario, (folder / MANIFEST).exists()
    with _phase(profile, "loading"):
        identity = engine.prepare()
    options = scenario.engine.model_dump(exclude={"address"})  # somebody's private host
    made_with = provenance.collect(engine.hardware(), identity, options)
    if calibration is not None:
        made_with["calibration"] = {"samples": list(calibration.ids)}
    if resumed:
        _say_what_differs(folder, made_with, watcher)
    else:
        samples = _screened(scenario, samples, engine, made_with)
    manifest = make_manifest(plan, samples, made_with)
    with RunStore.create_or_open(folder, manifest, scenario.text) as store:
        interrupted = _execute(plan, samples, engine, store, watcher, shard, retry_errors)
        if profile is not None:
            store.save_profile(profile.as_json())
    return _finished(folder, interrupted, cautions(scenario), shard)


def _say_what_differs(folder: Path, made_with: dict[str, Any], watcher: Watcher) -> None:
    """A run that goes on elsewhere is no longer one that could be repeated bit by bit."""
    other = provenance.made_otherwise(RunStore.read(folder).manifest.provenance, made_with)
    if other:
        watcher.say(
            f"this run was begun otherwise, now {plain(', '.join(other), 400)}: sums can be "
            "rounded in another way, and answers near a tie can differ by it"
        )


def _finished(
    folder: Path, interrupted: bool, notes: tuple[str, ...], shard: Shard | None
) -> Finished:
    """The end of a run, judged unless it is a part."""
    if shard is None:
        return Finished(folder, build_reports(folder), interrupted, notes)
    trials = len(RunStore.read(folder).done())
    return Finished(folder, None, interrupted, notes, shard, trials)


@contextmanager
def _engine(
    plan: Plan,
    samples: Samples,
    watcher: Watcher,
    calibration: Samples | None,
    cache: ImageCache | None,
    profile: Profile | None,
) -> Iterator[Engine]:
    """The engine that the scenario asks for, closed afterwards."""
    options, say = plan.scenario.engine, watcher.say
    engine: Engine
    if options.type == "ray":
        from redteam.engines.ray import RayEngine

        engine = RayEngine(plan, samples, options.device, say, cache, profile, watcher.working)
    else:
        engine = LocalEngine(plan, samples, options.device, say, calibration, cache)
    try:
        yield engine
    finally:
        engine.close()
        if cache is not None:
            cache.prune()


def _phase(profile: Profile | None, name: str) -> AbstractContextManager[None]:
    return nullcontext() if profile is None else profile.phase(name)


def _screened(
    scenario: Scenario, samples: Samples, engine: Engine, made_with: dict[str, Any]
) -> Samples:
    """The samples that the data set's filter keeps; what it leaves out goes into `made_with`."""
    rule = filter_of(scenario.dataset)
    if rule is None:
        return samples
    left_out = engine.screen(rule)
    made_with["filter"] = described(rule, len(samples), left_out)
    if len(left_out) == len(samples):
        reasons = made_with["filter"]["left_out"]
        counts = ", ".join(f"{len(ids)} {why}" for why, ids in reasons.items())
        problem = scenario.dataset.problem(f"filter {rule} leaves no sample: {counts}")
        raise NothingSelected(str(problem))
    return without(samples, left_out)


def make_manifest(plan: Plan, samples: Samples, made_with: dict[str, Any]) -> Manifest:
    """What is asked for, as the run folder keeps it."""
    scenario = plan.scenario
    return Manifest(
        name=scenario.name,
        description=scenario.description,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        scenario=scenario.resolved(),
        scenario_hash=scenario.hash,
        seed=scenario.seed,
        cells=plan.cells,
        samples=list(samples.ids),
        gates=list(scenario.gates),
        provenance=made_with,
    )


def pending(
    plan: Plan,
    ids: tuple[str, ...],
    store: RunStore,
    shard: Shard | None = None,
    retry_errors: bool = False,
) -> list[WorkUnit]:
    """Units with a trial that is missing (or failed, to be retried), of a part or the whole run."""
    done = store.done(errors=not retry_errors)
    units = list(plan.units(len(ids)))
    return [
        unit
        for unit in (units if shard is None else shard.part(units))
        if any(
            (one.cell.id, ids[index]) not in done
            for index in unit.samples
            for one in unit.group.cells
        )
    ]


def _resumable(
    folder: Path,
    manifest: Manifest,
    plan: Plan,
    count: int,
    shard: Shard | None,
    retry_errors: bool,
) -> list[WorkUnit]:
    """What is left of a run, refused before any model is loaded if it is another run."""
    store = RunStore.read(folder)
    changed = differences(store.manifest, manifest.model_copy(update={"provenance": {}}))
    if changed:
        raise ResumeMismatch(folder, changed)
    return pending(plan, tuple(manifest.samples[:count]), store, shard, retry_errors)


def _execute(
    plan: Plan,
    samples: Samples,
    engine: Engine,
    store: RunStore,
    watcher: Watcher,
    shard: Shard | None = None,
    retry_errors: bool = False,
) -> bool:
    """Run what is missing; True if the user stopped it."""
    units = pending(plan, samples.ids, store, shard, retry_errors)
    done = store.done(errors=not retry_errors)
    watcher.prepared(store.folder, units, len(done))
    with _stoppable(watcher.say) as stop:
        for one in engine.results(units, store, stop):
            # A unit that is half recorded is made again whole, because its images depend on
            # nothing else; only what is missing is appended.
            store.append(trial for trial in one.trials if (trial.cell, trial.sample) not in done)
            watcher.finished(one.unit, one.trials)
    return stop() and bool(pending(plan, samples.ids, store, shard, retry_errors))


@contextmanager
def _stoppable(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C (or SIGTERM) finish the unit; a second one stops at once."""
    asked = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        del number, frame
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        say("stopping after this unit; press Ctrl-C again to stop now")

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
