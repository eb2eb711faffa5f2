"""The Ray engine: one actor per GPU, or per share of the CPUs, on one machine or a cluster.

Ray moves things about and says what died; this module decides what is done. Workers only return
trials and images: the driver alone writes, so what a run folder promises holds whatever happens to
a worker. Units are the same as with the local engine, and so are their seeds.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from redteam.batching import failure
from redteam.cache import NOTE, ImageCache
from redteam.datasets.base import Samples
from redteam.datasets.filters import Filter
from redteam.engines.base import AtWork, Done
from redteam.engines.dispatch import Dispatch
from redteam.engines.parcel import Parcel
from redteam.engines.ray_worker import Sent, Setup, Whereabouts, Worker, machine, software
from redteam.errors import EngineError, PlanError, RedteamError
from redteam.plan import Plan, WorkUnit, seed_of
from redteam.trials import unmeasured
from reports.records import Trial
from reports.store import RunStore
from reports.text import count, plain

if TYPE_CHECKING:
    from redteam.profiling import Crew, Profile

ATTEMPTS: Final = 3
"""Workers that may die over a unit before its trials are recorded as errors."""
CORES: Final = 2
"""CPU cores of a worker where there is no GPU and `workers` is auto."""
_PATIENCE: Final = 0.5
"""Seconds between two looks at whether the user wants to stop."""
_SLOW: Final = 60.0
"""Seconds without any worker before the user is told what is waited for."""
_GIVE_UP: Final = 600.0
"""Seconds without any worker before a run that has begun is given up."""
_ELSEWHERE: Final = (
    "on a cluster redteam, plugins and data must be installed alike on every machine"
)


class WorkerDied(Exception):
    """A worker's process ended: out of memory, a crash in native code, or its machine went away."""


@dataclass(slots=True)
class _Pool:
    """The workers, by number."""

    actors: dict[int, Any] = field(default_factory=dict)
    places: dict[int, Whereabouts] = field(default_factory=dict)
    units: Counter[int] = field(default_factory=Counter)
    trials: Counter[int] = field(default_factory=Counter)
    recalled: int = 0
    replaced: int = 0

    def host(self, number: int) -> str:
        """Machine of a worker; "" where all are on one."""
        hosts = {place.machine: place.host for place in self.places.values()}
        return self.places[number].host if len(hosts) > 1 and number in self.places else ""


class RayEngine:
    """Runs units on Ray's workers.

    Args:
        plan: what to run; its engine options say where.
        samples: the opened data set.
        device: ``auto``, ``cpu``, ``cuda``.
        warn: told what the user should know, once each.
        cache: of attacked images, for workers on this machine; None makes all of them.
        profile: receives the clocks of the workers; None without.
        at_work: told what each worker does, whenever that changes.

    Raises:
        PlanError: if Ray is not installed, cannot be reached, or has nothing to work on.
    """

    def __init__(
        self,
        plan: Plan,
        samples: Samples,
        device: str,
        warn: Callable[[str], None] = lambda message: None,
        cache: ImageCache | None = None,
        profile: Profile | None = None,
        at_work: Callable[[AtWork], None] = lambda event: None,
    ) -> None:
        self._ray = _import_ray()
        self._plan, self._warn, self._at_work = plan, warn, at_work
        self._cache, self._profile = cache, profile
        self._ids = samples.ids
        self._identity: dict[str, Any] = {}
        self._said: set[str] = set()
        self._pool = _Pool()
        self._started = self._connect()
        try:
            self._measure(device)
        except PlanError:
            self.close()
            raise

    def prepare(self) -> dict[str, Any]:
        """Start the workers and load every target in each; all must have loaded the same.

        Raises:
            PlanError: if a target cannot be loaded, two workers loaded different weights, or a
                worker's machine has other software.
        """
        self._pool.actors = {number: self._make() for number in range(1, self._count + 1)}
        for number, place in enumerate(self._everywhere("whereabouts"), start=1):
            self._check_software(number, place)
            self._pool.places[number] = place
        found = self._everywhere("prepare", self._setup)
        self._identity = dict(found[0])
        for number, other in enumerate(found[1:], start=2):
            if other != self._identity:
                raise PlanError(
                    f"{self._name(number)} loaded other weights or data than worker 1; give every "
                    "machine the same files, or fix `revision`"
                )
        return self._identity

    def hardware(self) -> dict[str, Any]:
        """The machine of the first worker, and how many workers there are of each kind."""
        found = self._everywhere("hardware")
        kinds = Counter(str(one.get("gpu", one["platform"])) for one in found)
        return {**found[0], "workers": dict(kinds)}

    def screen(self, rule: Filter) -> dict[str, str]:
        """Leave out what a data set's filter leaves out; one worker asks."""
        found: dict[str, str] = self._get(1, self._pool.actors[1].screen.remote(rule))
        self._ids = tuple(name for name in self._ids if name not in found)
        return found

    def results(
        self, units: Sequence[WorkUnit], store: RunStore, stop: Callable[[], bool]
    ) -> Iterator[Done]:
        """Carry out units on all workers; see `redteam.engines.base.Engine`.

        Raises:
            EngineError: if no worker is left and none can be started.
        """
        crew = None if self._profile is None else self._profile.crew(self._count, self.device)
        self._everywhere("keep", self._ids)
        with nullcontext() if crew is None else crew.shift():
            sent = self._get(1, self._pool.actors[1].calibrate.remote(Parcel.of(store)))
            self._unpack(1, sent, store, crew)
            yield from _Shift(self, units, store, stop, crew).results()
        self._say_who_did_what()

    def close(self) -> None:
        """Let the workers go, and the local Ray that was started for them."""
        for actor in self._pool.actors.values():
            self._ray.kill(actor)
        self._pool.actors = {}
        if self._started:
            self._ray.shutdown()

    def _measure(self, device: str) -> None:
        """How many workers there are, and what each of them has."""
        nodes = [one["Resources"] for one in self._ray.nodes() if one["Alive"]]
        gpus = sum(int(one.get("GPU", 0)) for one in nodes)
        cores = [int(one.get("CPU", 0)) for one in nodes]
        self._on_gpu = device.startswith("cuda") or (device == "auto" and gpus > 0)
        self.device = "cuda" if self._on_gpu else "cpu"
        wanted = self._plan.scenario.engine.workers
        most = gpus if self._on_gpu else max(1, sum(one // CORES for one in cores))
        available = gpus if self._on_gpu else sum(cores)
        self._count = most if wanted == "auto" else int(wanted)
        if not 1 <= self._count <= available:
            what = "GPU" if self._on_gpu else "CPU core"
            raise PlanError(
                f"engine.workers: {wanted} asks for {count(self._count, 'worker')}, and Ray offers "
                f"{count(available, what)}; give at most {available}, or auto"
            )
        threads = None if self._on_gpu else threads_each(cores, self._count)
        self._setup = Setup(
            scenario=self._plan.scenario,
            device=self.device,
            threads=threads,
            folder=str(Path.cwd()),
            machine=machine(),
            cache=self._cache,
            profiled=self._profile is not None,
        )

    def _check_software(self, number: int, place: Whereabouts) -> None:
        """A worker with other software would give other results under the name of this one."""
        ours = software()
        other = {
            f"{what} {theirs} instead of {ours.get(what, 'absent')}"
            for what, theirs in place.software.items()
            if theirs != ours.get(what)
        }
        if other:
            raise PlanError(
                f"worker {number} (on {plain(place.host, 60)}) has {', '.join(sorted(other))}; "
                + _ELSEWHERE
            )

    def _unpack(self, number: int, sent: Sent, store: RunStore, crew: Crew | None) -> None:
        """Put what a worker sent where it belongs."""
        sent.parcel.unpack(store)
        if crew is not None and sent.clocks is not None:
            crew.add(sent.clocks)
        for note in dict.fromkeys(sent.notes):
            if note not in self._said:  # every worker finds out for itself
                self._said.add(note)
                self._warn(f"worker {number}: {note}")

    def _make(self) -> Any:  # noqa: ANN401 - an actor of Ray
        resources: dict[str, Any] = {"num_cpus": self._setup.threads or 1, "max_restarts": 0}
        if self._on_gpu:
            resources["num_gpus"] = 1
        return self._ray.remote(Worker).options(**resources).remote()

    def _name(self, number: int) -> str:
        host = self._pool.host(number)
        return f"worker {number} (on {plain(host, 60)})" if host else f"worker {number}"

    def _everywhere(self, method: str, *arguments: Any) -> list[Any]:  # noqa: ANN401
        """Call a method of every worker and wait for all."""
        asked = {
            number: getattr(actor, method).remote(*arguments)
            for number, actor in self._pool.actors.items()
        }
        if method == "whereabouts":
            self._wait_for_places(list(asked.values()))
        return [self._get(number, one) for number, one in asked.items()]

    def _wait_for_places(self, asked: list[Any]) -> None:
        """Say so if the cluster has no room for all workers; it may have later."""
        _, missing = self._ray.wait(asked, num_returns=len(asked), timeout=_SLOW)
        if missing:
            self._warn(
                f"waiting for {len(missing)} of {count(self._count, 'worker')} to start; the "
                f"cluster has {self._free()} free (ray status), or starts slowly"
            )

    def _free(self) -> str:
        """What nobody uses of what a worker needs."""
        free = self._ray.available_resources()
        what = "GPU" if self._on_gpu else "CPU core"
        return count(int(free.get("GPU" if self._on_gpu else "CPU", 0)), what)

    def _get(self, number: int, reference: Any) -> Any:  # noqa: ANN401 - of any method
        """A result; what a worker raised about the user's scenario is raised as it was.

        Raises:
            PlanError: if the worker lacks a module, or died.
        """
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise self._explained(number, error) from None
        except self._ray.exceptions.RayError as error:
            raise PlanError(
                f"{self._name(number)} died while it was preparing: {_reason(error)}"
            ) from error

    def _explained(self, number: int, error: Any) -> BaseException:  # noqa: ANN401 - RayTaskError
        """What a worker raised, as it was; a module it lacks is the user's to install."""
        cause: BaseException = error.cause
        if isinstance(cause, RedteamError):
            # On one machine all workers see the same, so that the number says nothing.
            host = self._pool.host(number)
            return PlanError(f"{self._name(number)}: {cause}") if host else cause
        if isinstance(cause, ImportError):
            return PlanError(f"{self._name(number)} cannot start: {cause}; {_ELSEWHERE}")
        failed: BaseException = error
        return failed

    def _say_who_did_what(self) -> None:
        pool = self._pool
        shares = "; ".join(
            f"{self._name(number)}: {count(pool.units[number], 'unit')}, "
            f"{count(pool.trials[number], 'trial')}"
            for number in range(1, self._count + 1)
        )
        replaced = f"; {count(pool.replaced, 'worker')} replaced" if pool.replaced else ""
        self._warn(shares + replaced)
        if pool.recalled:
            self._warn(
                f"{count(pool.recalled, 'attacked image')} from the cache of earlier runs (redteam "
                "cache); --no-cache makes all of them"
            )

    def _connect(self) -> bool:
        """Join a cluster or start one on this machine; whether it is ours to end."""
        if self._ray.is_initialized():
            return False
        address = self._plan.scenario.engine.address
        here = {"PYTHONPATH": os.pathsep.join(place for place in sys.path if place)}
        try:
            self._ray.init(
                address=address or "local",  # whatever RAY_ADDRESS says
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


class _Shift:
    """Units are handed out and come back, until all are done.

    A worker that dies is replaced beside the work: nobody waits for it, and where there is no room
    for another one (its machine went away) the others do its share.

    Args:
        engine: whose workers.
        units: all that is to be done.
        store: receives the images.
        stop: whether nothing new should be begun.
        crew: receives the workers' clocks.
    """

    def __init__(
        self,
        engine: RayEngine,
        units: Sequence[WorkUnit],
        store: RunStore,
        stop: Callable[[], bool],
        crew: Crew | None,
    ) -> None:
        self._engine, self._pool, self._ray = engine, engine._pool, engine._ray
        self._store, self._stop, self._crew = store, stop, crew
        self._dispatch = Dispatch(units)
        self._known = self._ray.put(Parcel.of(store))
        self._running: dict[Any, tuple[int, WorkUnit | None]] = {}  # None: it is being replaced
        self._over: Counter[str] = Counter()  # deaths by unit
        self._starts: Counter[int] = Counter()  # deaths of a worker in a row while it started
        self._told: dict[int, AtWork] = {}
        self._seen = time.monotonic()  # when a worker last had a unit
        self._asked_for_help = False

    def results(self) -> Iterator[Done]:
        """Every unit that was done, as it comes back."""
        self._hand_out()
        while self._unfinished():
            for reference in self._ready():
                number, unit = self._running.pop(reference)
                if unit is None:
                    self._joined(reference, number)
                elif (done := self._came_back(reference, number, unit)) is not None:
                    yield done
            self._hand_out()
        for number, unit in self._running.values():
            if unit is None:  # nothing is left for it to do
                self._ray.kill(self._pool.actors.pop(number))

    def _ready(self) -> list[Any]:
        """What is there now."""
        profile = self._engine._profile
        if not self._running:
            raise EngineError(
                f"no worker is left: each died {ATTEMPTS} times while it started; what was "
                "measured is safe, run again with the same --out to resume"
            )
        self._look_for_workers()
        with nullcontext() if profile is None else profile.phase("waiting"):
            ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=_PATIENCE)
        found: list[Any] = ready
        return found

    def _unfinished(self) -> bool:
        held = any(unit is not None for _, unit in self._running.values())
        return held or (len(self._dispatch) > 0 and not self._stop())

    def _hand_out(self) -> None:
        """A unit for every worker that has none."""
        busy = {number for number, _ in self._running.values()}
        for number in sorted(self._pool.actors.keys() - busy):
            unit = None if self._stop() else self._dispatch.next(number)
            self._tell(number, unit)
            if unit is not None:
                actor = self._pool.actors[number]
                self._running[actor.execute.remote(unit.id, self._known)] = (number, unit)

    def _came_back(self, reference: Any, number: int, unit: WorkUnit) -> Done | None:  # noqa: ANN401
        """What came of a unit; None if it has to be done again."""
        try:
            sent: Sent = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise self._engine._explained(number, error) from None
        except self._ray.exceptions.RayError as error:
            return self._died(number, unit, error)
        self._engine._unpack(number, sent, self._store, self._crew)
        self._pool.units[number] += 1
        self._pool.trials[number] += len(sent.trials)
        self._pool.recalled += len({one.sample for one in sent.trials if NOTE in one.checks})
        return Done(unit, sent.trials)

    def _died(self, number: int, unit: WorkUnit, error: Exception) -> Done | None:
        self._over[unit.id] += 1
        deaths = self._over[unit.id]
        again = deaths < ATTEMPTS
        self._engine._warn(
            f"{self._engine._name(number)} died over {plain(unit.group.attack.label, 60)} (unit "
            f"{unit.id}), time {deaths} of {ATTEMPTS}; it is replaced"
            + ("" if again else ", and the trials of the unit are recorded as errors")
        )
        self._replace(number)
        if not again:
            return Done(unit, self._lost(unit, error))
        self._dispatch.give_back(unit)
        return None

    def _replace(self, number: int) -> None:
        self._pool.replaced += 1
        # It may only be out of reach: two of one number must not work.
        self._ray.kill(self._pool.actors.pop(number))
        actor = self._pool.actors[number] = self._engine._make()
        joining = actor.join.remote(self._engine._setup, self._engine._ids)
        self._running[joining] = (number, None)
        self._tell(number, None, starting=True)

    def _joined(self, reference: Any, number: int) -> None:  # noqa: ANN401 - a reference of Ray
        """A worker was replaced, or the one that should have died too."""
        engine = self._engine
        try:
            identity = self._ray.get(reference)
            engine._pool.places[number] = place = self._ray.get(
                self._pool.actors[number].whereabouts.remote()
            )
        except self._ray.exceptions.RayTaskError as error:
            raise engine._explained(number, error) from None
        except self._ray.exceptions.RayError as error:
            self._starts[number] += 1
            again = self._starts[number] < ATTEMPTS
            engine._warn(
                f"worker {number} died while it started, time {self._starts[number]} of "
                f"{ATTEMPTS}: {_reason(error)}" + ("" if again else "; the others do its share")
            )
            if again:
                self._replace(number)
            else:
                del self._pool.actors[number]
                engine._at_work(self._event(number, None, "gone"))
            return
        self._starts[number] = 0
        engine._check_software(number, place)
        if identity != engine._identity:
            raise PlanError(
                f"{engine._name(number)} was replaced and loaded other weights or data than the "
                "others; give every machine the same files"
            )

    def _look_for_workers(self) -> None:
        """Say so when nobody works and nobody can be started; give up in the end."""
        if any(unit is not None for _, unit in self._running.values()):
            self._seen = time.monotonic()
            self._asked_for_help = False
            return
        silent = time.monotonic() - self._seen
        if silent > _GIVE_UP:
            raise EngineError(
                f"no worker could be started for {_GIVE_UP / 60:.0f} minutes; what was measured is "
                "safe, run again with the same --out to resume"
            )
        if silent > _SLOW and not self._asked_for_help:
            self._asked_for_help = True
            self._engine._warn(
                "no worker is left and none has been started yet; the cluster has "
                f"{self._engine._free()} free (ray status)"
            )

    def _lost(self, unit: WorkUnit, error: BaseException) -> list[Trial]:
        """Error trials of a unit that no worker survives."""
        wrong = failure(
            WorkerDied(f"{ATTEMPTS} workers died over this unit, the last: {error}"), "ray worker"
        )
        names = [self._engine._ids[index] for index in unit.samples]
        root = self._engine._plan.scenario.seed
        return [
            unmeasured(planned.cell, name, None, seed_of(root, unit.group.id, name), wrong)
            for planned in unit.group.cells
            for name in names
        ]

    def _tell(self, number: int, unit: WorkUnit | None, *, starting: bool = False) -> None:
        """Say what a worker does, if that is news."""
        doing = "starting" if starting else "waiting" if unit is None else "unit"
        event = self._event(number, unit, doing)
        if self._told.get(number) != event:
            self._told[number] = event
            self._engine._at_work(event)

    def _event(self, number: int, unit: WorkUnit | None, doing: Any) -> AtWork:  # noqa: ANN401
        pool = self._pool
        return AtWork(
            number, doing, unit, pool.units[number], pool.trials[number], pool.host(number)
        )


def threads_each(cores: Sequence[int], workers: int) -> int:
    """Most CPU cores that each of so many workers can have, none of them spread over two machines.

    Args:
        cores: of each machine.
        workers: at least 1, at most all cores.
    """
    most = max(1, sum(cores) // workers)
    fitting = (each for each in range(most, 1, -1) if sum(n // each for n in cores) >= workers)
    return next(fitting, 1)


def _reason(error: BaseException) -> str:
    """The first line of what Ray says; the rest is for developers of Ray."""
    return plain(str(error).strip().partition("\n")[0], 300)


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
