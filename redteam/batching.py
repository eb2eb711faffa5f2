"""Run a function on batches so that one bad sample or a full memory costs as little as possible."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import psutil
import torch

from redteam.provenance import scrub
from reports.records import TrialError

Item = TypeVar("Item")
Result = TypeVar("Result")

SHARE: Final = 0.6
"""Of free memory that an estimate may fill: it knows nothing of fragments and of neighbours."""
_TRACEBACK: Final = 8_000
"""Characters of a traceback that are kept, from its end."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Stands in for the result of an item that could not be processed."""

    error: TrialError


def failure(error: BaseException, where: str) -> Failure:
    """Describe an exception for the record, without private paths."""
    text = "".join(traceback.format_exception(error))
    return Failure(
        TrialError(
            type=type(error).__name__,
            message=scrub(str(error))[:2_000],
            where=where,
            traceback=scrub(text)[-_TRACEBACK:],
        )
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()


class Batcher:
    """Calls functions on batches; remembers, for each kind of work, the batch size that fits.

    Args:
        size: largest batch.
        warn: told once each time a batch size is lowered.
        free: bytes that are free, for a first batch as large as an estimate allows; None begins
            with the largest.
    """

    def __init__(
        self,
        size: int,
        warn: Callable[[str], None] = lambda message: None,
        free: Callable[[], int] | None = None,
    ) -> None:
        self.size = size
        self._warn, self._free = warn, free
        self._fitting: dict[str, int] = {}

    def fitting(self, key: str) -> int:
        """Largest batch that is tried for a kind of work."""
        return self._fitting.get(key, self.size)

    def foresee(self, key: str, where: str, each: int) -> None:
        """Choose the first batch of a kind of work, unless one has been chosen.

        Args:
            key: kind of work.
            where: what is being done, for people.
            each: bytes that an item is estimated to need; 0 if nobody knows.
        """
        if self._free is None or each <= 0 or key in self._fitting:
            return
        free = self._free()
        fits = max(1, min(self.size, int(SHARE * free / each)))
        self._fitting[key] = fits
        if fits < self.size:
            self._warn(
                f"batches of {fits} for {where}: {_size(each)} each are expected, {_size(free)} of "
                "memory are free (engine.batch_size says otherwise)"
            )

    def map(
        self,
        items: Sequence[Item],
        function: Callable[[Sequence[Item]], Sequence[Result]],
        where: str,
        names: Callable[[Item], str] = str,
        key: str | None = None,
        each: int = 0,
    ) -> list[Result | Failure]:
        """One result or `Failure` for each item, in order.

        When a batch raises, its items are tried again: all but those the error names
        (`sample_ids`), or else one by one. When memory runs out the batch is halved, for all
        work of the same key: what attacks one defence may need much more than the rest of a run.

        Args:
            items: what to process.
            function: items of a batch → as many results.
            where: what is being done, for the record.
            names: how errors name an item.
            key: kind of work that needs as much memory; None is `where`.
            each: bytes that an item is estimated to need, see `foresee`.
        """
        key = where if key is None else key
        self.foresee(key, where, each)
        found: list[Result | Failure] = []
        start = 0
        while start < len(items):
            batch = items[start : start + self.fitting(key)]
            tried = self._try(batch, function)
            if not isinstance(tried, Exception):
                found += tried
            elif out_of_memory(tried) and len(batch) > 1:
                self._shrink(key, len(batch), where)
                continue
            else:
                # Anything a method raises belongs to its samples; the run goes on.
                found += self._isolated(batch, function, tried, where, names, key)
            start += len(batch)
        return found

    def _try(
        self, batch: Sequence[Item], function: Callable[[Sequence[Item]], Sequence[Result]]
    ) -> Sequence[Result] | Exception:
        """Results, or what was raised; memory is given back before anybody tries again."""
        try:
            return self._checked(batch, function)
        except Exception as error:
            if out_of_memory(error):
                _release(error)
            return error

    def _checked(
        self, batch: Sequence[Item], function: Callable[[Sequence[Item]], Sequence[Result]]
    ) -> Sequence[Result]:
        results = function(batch)
        if len(results) != len(batch):
            raise RuntimeError(f"{len(results)} results came back for {len(batch)} samples")
        return results

    def _shrink(self, key: str, batch: int, where: str) -> None:
        self._fitting[key] = less = max(1, batch // 2)
        self._warn(f"memory ran out at a batch of {batch} ({where}); going on with {less} there")

    def _isolated(
        self,
        batch: Sequence[Item],
        function: Callable[[Sequence[Item]], Sequence[Result]],
        error: Exception,
        where: str,
        names: Callable[[Item], str],
        key: str,
    ) -> list[Result | Failure]:
        if len(batch) == 1:
            return [failure(error, where)]
        blamed = set(getattr(error, "sample_ids", ()))
        innocent = [item for item in batch if names(item) not in blamed]
        if 0 < len(innocent) < len(batch):
            rest = iter(self.map(innocent, function, where, names, key))
            return [
                failure(error, where) if names(item) in blamed else next(rest) for item in batch
            ]
        found: list[Result | Failure] = []
        for item in batch:
            found += self.map([item], function, where, names, key)
        return found


def _size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device, what torch keeps in reserve included.

    On a CPU that is what the machine has, or the container if that is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + unused)
    available = int(psutil.virtual_memory().available)
    return min(available, _container_memory(available))


def _container_memory(otherwise: int) -> int:
    """Bytes that a control group (v2) leaves; `otherwise` where none limits."""
    home = Path("/sys/fs/cgroup")
    try:
        limit = int((home / "memory.max").read_text())
        used = int((home / "memory.current").read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return otherwise
    return max(0, limit - used)


def _release(error: BaseException) -> None:
    """Give back what the frames of an error hold: with it a smaller batch would not fit either."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
