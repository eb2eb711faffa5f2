"""A worker of the Ray engine: carries out units in a process of its own, and writes no run folder.

It holds a local engine and sends back what that leaves. Nothing happens before `Worker.prepare`: so
whatever goes wrong there reaches the driver as the error it is, not as a worker that died.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redteam.engines.parcel import Parcel
from redteam.plan import make_plan
from reports.records import Calibration, Trial

if TYPE_CHECKING:
    from redteam.cache import ImageCache
    from redteam.datasets.base import Samples
    from redteam.datasets.filters import Filter
    from redteam.profiling import Clocks
    from redteam.scenario import Scenario

Known = Sequence[tuple[Calibration, bytes | None]]
"""Calibrations that the driver has, with what was learnt."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker is started with.

    Attributes:
        scenario: of the run.
        device: ``auto``, ``cpu`` or ``cuda``; Ray shows an actor its own GPU only.
        threads: of torch; None leaves them as they are.
        folder: relative paths of the scenario start there, where this machine has it.
        machine: that the driver runs on, see `machine`.
        cache: the driver's; used by workers on its machine, the others make every image.
        profiled: whether to keep clocks.
    """

    scenario: Scenario
    device: str
    threads: int | None
    folder: str
    machine: str
    cache: ImageCache | None = None
    profiled: bool = False


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Which process a worker is.

    Attributes:
        host: name of its machine.
        machine: see `machine`.
        process: its id there.
        software: hash of our source code and versions of what computes, by name.
    """

    host: str
    machine: str
    process: int
    software: dict[str, str]


@dataclass(slots=True)
class Sent:
    """What comes back of a unit, or of a calibration.

    Attributes:
        trials: none of a calibration.
        parcel: images and calibrations.
        notes: what the user should know.
        clocks: since the last one was sent; None without a profile.
    """

    trials: list[Trial]
    parcel: Parcel
    notes: list[str]
    clocks: Clocks | None


def machine() -> str:
    """What tells this machine from others: its name, and its boot where the system says that."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{platform.node()}/{boot}"


def software() -> dict[str, str]:
    """Hash of our source code, and versions of the packages that results depend on."""
    from redteam.cache import code
    from redteam.provenance import versions

    return {"redteam's source code": code()[:16], **versions()}


class Worker:
    """An actor of Ray; call `prepare` first."""

    def whereabouts(self) -> Whereabouts:
        """Which process this is, and what is installed there."""
        return Whereabouts(platform.node(), machine(), os.getpid(), software())

    def prepare(self, setup: Setup) -> dict[str, Any]:
        """Load everything; see `redteam.engines.local.LocalEngine.prepare`."""
        import torch

        from redteam.calibrating import open_calibration
        from redteam.profiling import Profile

        with contextlib.suppress(OSError):
            os.chdir(setup.folder)
        if setup.threads is not None:
            torch.set_num_threads(setup.threads)
        self._profile = Profile() if setup.profiled else None
        if self._profile is not None:
            self._profile.__enter__()  # until the process ends
        self._setup = setup
        self._plan = make_plan(setup.scenario)
        self._samples: Samples = setup.scenario.dataset.create().open()
        self._calibration = open_calibration(setup.scenario, self._samples)
        self._notes: list[str] = []
        self._open(self._samples)
        return self._engine.prepare()

    def hardware(self) -> dict[str, Any]:
        """The machine it runs on."""
        return self._engine.hardware()

    def screen(self, rule: Filter) -> dict[str, str]:
        """Why samples are left out, by id."""
        return self._engine.screen(rule)

    def keep(self, ids: Sequence[str]) -> None:
        """Use the samples that the driver uses; numbers in units count these."""
        from redteam.datasets.filters import without

        kept = set(ids)
        others = {name: "left out by the driver" for name in self._samples.ids if name not in kept}
        if others:
            self._samples = without(self._samples, others)
            self._open(self._samples)
        self._clocks()  # what it took to get here is not part of any unit

    def join(self, setup: Setup, ids: Sequence[str]) -> dict[str, Any]:
        """Take the place of a worker that died: `prepare` and `keep` in one."""
        identity = self.prepare(setup)
        self.keep(ids)
        return identity

    def calibrate(self, known: Known) -> Sent:
        """Calibrate every detector of the scenario."""
        parcel = Parcel(known)
        with self._clocked():
            self._engine.calibrate(parcel)
        return self._sent([], parcel)

    def execute(self, unit: str, known: Known) -> Sent:
        """Carry out a unit, by its id."""
        parcel = Parcel(known)
        with self._clocked():
            trials = self._engine.execute(self._units[unit], parcel)
        return self._sent(trials, parcel)

    def _sent(self, trials: list[Trial], parcel: Parcel) -> Sent:
        notes, self._notes[:] = list(self._notes), []
        parcel.known = ()  # the driver has them
        return Sent(trials, parcel, notes, self._clocks())

    @contextlib.contextmanager
    def _clocked(self) -> Iterator[None]:
        """Count to the harness what no clock inside stands around."""
        from redteam.profiling import HARNESS

        with contextlib.nullcontext() if self._profile is None else self._profile.phase(HARNESS):
            yield

    def _clocks(self) -> Clocks | None:
        return None if self._profile is None else self._profile.take()

    def _open(self, samples: Samples) -> None:
        from redteam.engines.local import LocalEngine

        setup = self._setup
        self._engine = LocalEngine(
            self._plan,
            samples,
            setup.device,
            self._notes.append,
            self._calibration,
            cache=setup.cache if machine() == setup.machine else None,
        )
        self._units = {unit.id: unit for unit in self._plan.units(len(samples))}
