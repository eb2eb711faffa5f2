"""Run a function on batches so that one bad sample or a full memory costs as little as possible."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import torch

from redteam.provenance import scrub
from reports.records import TrialError

Item = TypeVar("Item")
Result = TypeVar("Result")

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
    """

    def __init__(self, size: int, warn: Callable[[str], None] = lambda message: None) -> None:
        self.size = size
        self._warn = warn
        self._fitting: dict[str, int] = {}

    def fitting(self, key: str) -> int:
        """Largest batch that is tried for a kind of work."""
        return self._fitting.get(key, self.size)

    def map(
        self,
        items: Sequence[Item],
        function: Callable[[Sequence[Item]], Sequence[Result]],
        where: str,
        names: Callable[[Item], str] = str,
        key: str | None = None,
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
        """
        key = where if key is None else key
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
