"""What a worker sends home: the images of a unit, and what its detectors learnt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from reports.records import Calibration
from reports.store import RunStore


@dataclass(slots=True)
class Parcel:
    """A vault in memory; see `redteam.engines.base.Vault`.

    Attributes:
        known: calibrations that the driver has, with what was learnt.
        images: by content hash.
        learnt: calibrations made here.
    """

    known: Sequence[tuple[Calibration, bytes | None]] = ()
    images: dict[str, bytes] = field(default_factory=dict)
    learnt: list[tuple[Calibration, bytes | None]] = field(default_factory=list)

    def save_png(self, data: bytes) -> str:
        """Keep an image; return the SHA-256 (hex) of its bytes."""
        name = hashlib.sha256(data).hexdigest()
        self.images[name] = data
        return name

    def calibrations(self) -> list[Calibration]:
        """Those of the driver, and those made here."""
        return [one for one, _ in (*self.known, *self.learnt)]

    def save_calibration(self, found: Calibration, state: bytes | None) -> Calibration:
        """Keep a calibration; return it with the hash of its state."""
        if state is not None:
            found = found.model_copy(update={"state": hashlib.sha256(state).hexdigest()})
        self.learnt.append((found, state))
        return found

    def state(self, name: str) -> bytes:
        """What a detector learnt, by its content hash.

        Raises:
            KeyError: if nothing of that hash was sent along.
        """
        for one, data in (*self.known, *self.learnt):
            if one.state == name and data is not None:
                return data
        raise KeyError(f"no calibration with the state {name} was sent to this worker")

    def unpack(self, store: RunStore) -> None:
        """Put everything into the run folder."""
        for image in self.images.values():
            store.save_png(image)
        there = {(one.target, one.compression, one.detector) for one in store.calibrations()}
        for one, data in self.learnt:
            if (one.target, one.compression, one.detector) not in there:
                store.save_calibration(one, data)

    @staticmethod
    def of(store: RunStore) -> Sequence[tuple[Calibration, bytes | None]]:
        """The calibrations of a run folder, to be sent along."""
        return [
            (one, None if one.state is None else store.state(one.state))
            for one in store.calibrations()
        ]
