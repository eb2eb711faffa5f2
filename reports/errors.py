"""Errors raised in `reports`; each message says what, where, the value, and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class ReportError(Exception):
    """A run folder could not be written, read, or turned into a report."""


class StoreError(ReportError):
    """A run folder cannot be used as asked: missing, unwritable, full, or damaged."""


class LedgerError(StoreError):
    """A line of the ledger is damaged in a way that a killed run does not explain."""


class RunLockedError(StoreError):
    """Another process is writing to the same run folder."""


class ResumeMismatch(StoreError):
    """A run folder holds another scenario than the one to be run.

    Attributes:
        differences: one line per key that differs, ``key: stored -> now``.
    """

    def __init__(self, folder: object, differences: Sequence[str]) -> None:
        self.differences = tuple(differences)
        shown = "\n".join(f"  {line}" for line in self.differences[:20])
        more = len(self.differences) - 20
        tail = f"\n  … and {more} more" if more > 0 else ""
        super().__init__(
            f"{folder} holds a run of a different scenario, so it cannot be resumed "
            f"(stored -> now):\n{shown}{tail}\n"
            "Give another --out folder, or restore the scenario it was started with."
        )
