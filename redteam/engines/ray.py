"""The Ray engine: one actor per GPU, or per share of the CPUs, on one machine or a cluster.

Ray moves things about, restarts what dies and balances; this module decides what is done. Workers
only return trials and images: the driver alone writes, so what a run folder promises holds whatever
happens to a worker. Units are the same as with the local engine, and so are their seeds.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from redteam.batching import failure
from redteam.datasets.base import Samples
from redteam.datasets.filters import Filter, without
from redteam.engines.base import Done
from redteam.engines.dispatch import Dispatch
from redteam.engines.parcel import Parcel
from redteam.errors import PlanError, RedteamError
from redteam.plan import Plan, WorkUnit, make_plan, seed_of
from redteam.scenario import Scenario
from redteam.trials import unmeasured
from reports.records import Calibration, Trial
from reports.store import RunStore
from reports.text import count

ATTEMPTS: Final = 3
"""Workers that may die over a unit before its trials are recorded as errors."""
CORES: Final = 2
"""CPU cores of a worker where there is no GPU and `workers` is auto."""
_PATIENCE: Final = 0.5
"""Seconds between two looks at whether the user wants to stop."""


class WorkerDied(Exception):
    """A worker's process ended: out of memory, a crash in native code, or its machine went away."""


@dataclass(slots=True)
class _Sent:
    """What comes back of a unit."""

    trials: list[Trial]
    parcel: Parcel
    notes: list[str]


class Worker:
    """Carries out units in a process of its own; an actor of Ray.

    Args:
        scenario: of the run.
        device: ``auto``, ``cpu`` or ``cuda``; Ray shows an actor its own GPU only.
        threads: of torch; None leaves them as they are.
        folder: relative paths of the scenario start there, where this machine has it.
    """

    def __init__(self, scenario: Scenario, device: str, threads: int | None, folder: str) -> None:
        import torch

        from redteam.calibrating import open_calibration
        from redteam.engines.local import LocalEngine

        with contextlib.suppress(OSError):
            os.chdir(folder)
        if threads is not None:
            torch.set_num_threads(threads)
        self._plan = make_plan(scenario)
        self._samples: Samples = scenario.dataset.create().open()
        self._calibration = open_calibration(scenario, self._samples)
        self._notes: list[str] = []
        self._make = LocalEngine
        self._device = device
        self._open(self._samples)

    def prepare(self) -> dict[str, Any]:
        """See `redteam.engines.local.LocalEngine.prepare`."""
        return self._engine.prepare()

    def hardware(self) -> dict[str, Any]:
        """The machine it runs on."""
        return {**self._engine.hardware(), "process": os.getpid()}

    def screen(self, rule: Filter) -> dict[str, str]:
        """Why samples are left out, by id."""
        return self._engine.screen(rule)

    def keep(self, ids: Sequence[str]) -> None:
        """Use the samples that the driver uses; numbers in units count these."""
        kept = set(ids)
        others = {name: "left out by the driver" for name in self._samples.ids if name not in kept}
        if others:
            self._samples = without(self._samples, others)
            self._open(self._samples)

    def calibrate(self, known: Sequence[tuple[Calibration, bytes | None]]) -> Parcel:
        """Calibrate every detector of the scenario."""
        parcel = Parcel(known)
        self._engine.calibrate(parcel)
        return parcel

    def execute(self, unit: str, known: Sequence[tuple[Calibration, bytes | None]]) -> _Sent:
        """Carry out a unit, by its id."""
        parcel = Parcel(known)
        trials = self._engine.execute(self._units[unit], parcel)
        notes, self._notes[:] = list(self._notes), []
        parcel.known = ()  # the driver has them
        return _Sent(trials, parcel, notes)

    def _open(self, samples: Samples) -> None:
        self._engine = self._make(
            self._plan, samples, self._device, self._notes.append, self._calibration
        )
        self._units = {unit.id: unit for unit in self._plan.units(len(samples))}


@dataclass(slots=True)
class _Pool:
    """The workers, by number."""

    make: Callable[[], Any]
    actors: dict[int, Any] = field(default_factory=dict)
    units: Counter[int] = field(default_factory=Counter)
    trials: Counter[int] = field(default_factory=Counter)
    replaced: int = 0


class RayEngine:
    """Runs units on Ray's workers.

    Args:
        plan: what to run; its engine options say where.
        samples: the opened data set.
        device: ``auto``, ``cpu``, ``cuda``.
        warn: told what the user should know, once each.

    Raises:
        PlanError: if Ray is not installed, cannot be reached, or has nothing to work on.
    """

    def __init__(
        self,
        plan: Plan,
        samples: Samples,
        device: str,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        self._ray = _import_ray()
        self._plan, self._warn = plan, warn
        self._ids = samples.ids
        self._identity: dict[str, Any] = {}
        self._started = self._connect()
        gpus = int(self._ray.cluster_resources().get("GPU", 0))
        self._on_gpu = device.startswith("cuda") or (device == "auto" and gpus > 0)
        self.device = "cuda" if self._on_gpu else "cpu"
        cores = int(self._ray.cluster_resources().get("CPU", 1))
        wanted = plan.scenario.engine.workers
        most = gpus if self._on_gpu else max(1, cores // CORES)
        self._count = most if wanted == "auto" else int(wanted)
        available = gpus if self._on_gpu else cores
        if not 1 <= self._count <= available:
            what = "GPU" if self._on_gpu else "CPU core"
            self.close()
            raise PlanError(
                f"engine.workers: {wanted} asks for {count(self._count, 'worker')}, and Ray offers "
                f"{count(available, what)}; give at most {available}, or auto"
            )
        self._threads = None if self._on_gpu else max(1, cores // self._count)
        self._pool = _Pool(self._make)

    def prepare(self) -> dict[str, Any]:
        """Start the workers and load every target in each; all must have loaded the same.

        Raises:
            PlanError: if a target cannot be loaded, or two workers loaded different weights.
        """
        self._pool.actors = {number: self._make() for number in range(1, self._count + 1)}
        found = self._everywhere("prepare")
        self._identity = dict(found[0])
        for number, other in enumerate(found[1:], start=2):
            if other != self._identity:
                raise PlanError(
                    f"worker {number} loaded other weights or data than worker 1; give every "
                    "machine the same files, or fix `revision`"
                )
        return self._identity

    def hardware(self) -> dict[str, Any]:
        """The machine of the first worker, and how many workers there are of each kind."""
        found = self._everywhere("hardware")
        for one in found:
            one.pop("process")
        kinds = Counter(str(one.get("gpu", one["platform"])) for one in found)
        return {**found[0], "workers": dict(kinds)}

    def screen(self, rule: Filter) -> dict[str, str]:
        """Leave out what a data set's filter leaves out; one worker asks."""
        found: dict[str, str] = self._get(self._pool.actors[1].screen.remote(rule))
        self._ids = tuple(name for name in self._ids if name not in found)
        return found

    def results(
        self, units: Sequence[WorkUnit], store: RunStore, stop: Callable[[], bool]
    ) -> Iterator[Done]:
        """Carry out units on all workers; see `redteam.engines.base.Engine`."""
        self._everywhere("keep", self._ids)
        self._get(self._pool.actors[1].calibrate.remote(Parcel.of(store))).unpack(store)
        known = self._ray.put(Parcel.of(store))
        dispatch, deaths = Dispatch(units), Counter[str]()
        running: dict[Any, tuple[int, WorkUnit]] = {}

        def begin(number: int) -> None:
            unit = None if stop() else dispatch.next(number)
            if unit is not None:
                running[self._pool.actors[number].execute.remote(unit.id, known)] = (number, unit)

        for number in self._pool.actors:
            begin(number)
        while running:
            ready, _ = self._ray.wait(list(running), num_returns=1, timeout=_PATIENCE)
            for reference in ready:
                number, unit = running.pop(reference)
                done = self._outcome(reference, number, unit, store, deaths)
                if done is None:
                    dispatch.give_back(unit)
                else:
                    self._pool.units[number] += 1
                    self._pool.trials[number] += len(done.trials)
                    yield done
                begin(number)
        self._say_who_did_what()

    def close(self) -> None:
        """Let the workers go, and the local Ray that was started for them."""
        if self._started:
            self._ray.shutdown()

    def _outcome(
        self,
        reference: Any,  # noqa: ANN401 - an object reference of Ray
        number: int,
        unit: WorkUnit,
        store: RunStore,
        deaths: Counter[str],
    ) -> Done | None:
        """What came of a unit; None if it has to be done again."""
        try:
            sent = self._ray.get(reference)
        except (self._ray.exceptions.RayActorError, self._ray.exceptions.ObjectLostError) as error:
            deaths[unit.id] += 1
            again = deaths[unit.id] < ATTEMPTS
            self._warn(
                f"worker {number} died over {unit.group.attack.label} (unit {unit.id}), "
                f"time {deaths[unit.id]} of {ATTEMPTS}; it is replaced"
                + ("" if again else ", and the trials of the unit are recorded as errors")
            )
            self._replace(number)
            return None if again else Done(unit, self._lost(unit, error))
        except self._ray.exceptions.RayTaskError as error:
            cause = error.as_instanceof_cause()
            raise cause from None if isinstance(cause, RedteamError) else error
        sent.parcel.unpack(store)
        for note in dict.fromkeys(sent.notes):
            self._warn(f"worker {number}: {note}")
        return Done(unit, sent.trials)

    def _lost(self, unit: WorkUnit, error: BaseException) -> list[Trial]:
        """Error trials of a unit that no worker survives."""
        wrong = failure(
            WorkerDied(f"{ATTEMPTS} workers died over this unit, the last: {error}"), "ray worker"
        )
        names = [self._ids[index] for index in unit.samples]
        root = self._plan.scenario.seed
        return [
            unmeasured(planned.cell, name, None, seed_of(root, unit.group.id, name), wrong)
            for planned in unit.group.cells
            for name in names
        ]

    def _replace(self, number: int) -> None:
        self._pool.replaced += 1
        actor = self._pool.actors[number] = self._make()
        if self._get(actor.prepare.remote()) != self._identity:
            raise PlanError(
                f"worker {number} was replaced and loaded other weights or data than the others"
            )
        self._get(actor.keep.remote(self._ids))

    def _make(self) -> Any:  # noqa: ANN401 - an actor of Ray
        resources: dict[str, Any] = {"num_cpus": self._threads or 1, "max_restarts": 0}
        if self._on_gpu:
            resources["num_gpus"] = 1
        actor = self._ray.remote(Worker).options(**resources)
        return actor.remote(self._plan.scenario, self.device, self._threads, str(Path.cwd()))

    def _everywhere(self, method: str, *arguments: Any) -> list[Any]:  # noqa: ANN401
        """Call a method of every worker and wait for all."""
        asked = [getattr(one, method).remote(*arguments) for one in self._pool.actors.values()]
        return [self._get(one) for one in asked]

    def _get(self, reference: Any) -> Any:  # noqa: ANN401 - of any method
        """A result; what a worker raised about the user's scenario is raised as it was."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.as_instanceof_cause()
            raise cause from None if isinstance(cause, RedteamError) else error
        except self._ray.exceptions.RayActorError as error:
            raise PlanError(f"a worker of Ray died while it was preparing: {error}") from error

    def _say_who_did_what(self) -> None:
        shares = "; ".join(
            f"worker {number}: {count(self._pool.units[number], 'unit')}, "
            f"{count(self._pool.trials[number], 'trial')}"
            for number in self._pool.actors
        )
        replaced = f"; {count(self._pool.replaced, 'worker')} replaced"
        self._warn(shares + (replaced if self._pool.replaced else ""))

    def _connect(self) -> bool:
        """Join a cluster or start one on this machine; whether it is ours to end."""
        if self._ray.is_initialized():
            return False
        address = self._plan.scenario.engine.address
        here = {"PYTHONPATH": os.pathsep.join(place for place in sys.path if place)}
        try:
            self._ray.init(
                address=address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                # A worker on this machine sees what this process sees, plugins included; on other
                # machines redteam has to be installed.
                runtime_env=None if address else {"env_vars": here},
            )
        except Exception as error:
            where = f"the cluster at {address!r}" if address else "a local Ray"
            raise PlanError(
                f"engine: {where} could not be reached: {type(error).__name__}: {error}; check "
                "`ray status`, or use {type: local}"
            ) from error
        return True


def _import_ray() -> Any:  # noqa: ANN401 - a module
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing of a run leaves the machine
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise PlanError(
            "engine: {type: ray} needs Ray, which is not installed; run pip install "
            "'redteam[ray]', or use {type: local}"
        ) from error
    return ray
