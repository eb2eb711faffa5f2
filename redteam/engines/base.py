"""What carries out units of work, wherever that is; the driver alone writes the run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from redteam.datasets.filters import Filter
from redteam.plan import WorkUnit
from reports.records import Calibration, Trial
from reports.store import RunStore


class Vault(Protocol):
    """Where a unit leaves its images, and finds and leaves what detectors learnt."""

    def save_png(self, data: bytes) -> str:
        """Keep an image; return the SHA-256 (hex) of its bytes."""
        ...

    def calibrations(self) -> list[Calibration]:
        """What detectors were calibrated with so far."""
        ...

    def save_calibration(self, found: Calibration, state: bytes | None) -> Calibration:
        """Keep a calibration; return it with the hash of its state."""
        ...

    def state(self, name: str) -> bytes:
        """What a detector learnt, by its content hash."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """A unit that was carried out; its images are with the store.

    Attributes:
        unit: which.
        trials: all of it, errors included.
    """

    unit: WorkUnit
    trials: list[Trial]


@dataclass(frozen=True, slots=True)
class AtWork:
    """What one of several workers does now; an engine that works alone says nothing.

    Attributes:
        worker: its number, from 1.
        doing: ``unit``: the one it holds; ``waiting``: there is none for it; ``starting``: it takes
            the place of one that died; ``gone``: it died too often.
        unit: which it holds; None of any other.
        units: it has done so far.
        trials: of these units.
        host: name of its machine; "" where all are on one.
    """

    worker: int
    doing: Literal["unit", "waiting", "starting", "gone"]
    unit: WorkUnit | None = None
    units: int = 0
    trials: int = 0
    host: str = ""


class Engine(Protocol):
    """Carries out a plan."""

    device: str

    def prepare(self) -> dict[str, Any]:
        """Load what is needed; return what must not change under a run."""
        ...

    def hardware(self) -> dict[str, Any]:
        """The machine it works on, as far as results or timings depend on it."""
        ...

    def screen(self, rule: Filter) -> dict[str, str]:
        """Leave out what a data set's filter leaves out; why, by id of the sample."""
        ...

    def results(
        self, units: Sequence[WorkUnit], store: RunStore, stop: Callable[[], bool]
    ) -> Iterator[Done]:
        """Carry out units, in any order.

        Args:
            units: all that is to be done.
            store: receives the images; the trials are the caller's to append.
            stop: whether nothing new should be begun.
        """
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...
