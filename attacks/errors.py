"""Errors of attacks; each message says what, where, the value, what is allowed, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AttackError(Exception):
    """An attack could not be run, or did something it may not do.

    Attributes:
        sample_ids: the samples at fault, empty when the whole call is. Results never depend on
            which samples share a batch, so a runner may set these aside and repeat the rest.
        step: the optimisation step (0-based) at which it happened; None outside the loop.
    """

    def __init__(
        self, message: str, *, sample_ids: tuple[str, ...] = (), step: int | None = None
    ) -> None:
        super().__init__(message)
        self.sample_ids = sample_ids
        self.step = step

    def __reduce__(self) -> tuple[object, ...]:
        """Survive the trip between processes: exceptions rebuild from positional arguments only."""
        return _rebuild, (self.args[0], self.sample_ids, self.step)


def _rebuild(message: str, sample_ids: tuple[str, ...], step: int | None) -> AttackError:
    return AttackError(message, sample_ids=sample_ids, step=step)


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest one there is, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
