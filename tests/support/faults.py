"""A disk that fails, or a process that dies, at the n-th write.

Every way this project writes to a file system is counted: opening for writing, write, fsync,
truncate, mkdir, chmod, rename, unlink. The chosen one fails with an errno, or "kills": it raises
what nothing catches, and from then on nothing is written any more, as of a process that is gone.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

_CALLS = ("mkdir", "replace", "rename", "fsync", "truncate", "ftruncate", "chmod")


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` sees it."""


@dataclass
class Faults:
    """What happens at which write.

    Attributes:
        at: number of the write, from 1; 0 only counts.
        number: the errno; 0 kills.
        lasting: whether all later writes fail too, as on a disk that stays full.
        die: how a kill is done.
        log: what was written, in order.
    """

    at: int = 0
    number: int = 0
    lasting: bool = False
    die: Callable[[], None] | None = None
    log: list[str] = field(default_factory=list)
    dead: bool = False

    def strike(self, what: str) -> bool:
        """Count a write; whether it is the one."""
        if self.dead:
            raise Killed(what)
        self.log.append(what)
        return len(self.log) == self.at or (self.lasting and 0 < self.at <= len(self.log))

    def hit(self, what: str) -> None:
        """Fail as wanted."""
        if self.number:
            raise OSError(self.number, os.strerror(self.number))
        if self.die is not None:
            self.die()
        self.dead = True
        raise Killed(what)

    def tick(self, what: str) -> None:
        if self.strike(what):
            self.hit(what)


class _Raw(io.FileIO):
    """A file whose writes may be cut short: half of the bytes arrive, then the fault."""

    faults: Faults

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.faults.strike("write"):
            super().write(view[: len(view) // 2])
            self.faults.hit("write")
        return super().write(view)

    def truncate(self, size: int | None = None) -> int:
        self.faults.tick("truncate")
        return super().truncate(size)


def _opener(faults: Faults, real: Callable[..., Any]) -> Callable[..., Any]:
    def opened(
        file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, *rest: Any,
        **more: Any,
    ) -> Any:  # fmt: skip
        if not set(mode) & set("wax+"):
            return real(file, mode, buffering, encoding, *rest, **more)
        faults.tick("open")
        raw = _Raw(file, mode.replace("b", "").replace("t", ""))
        raw.faults = faults
        if buffering == 0:
            return raw
        buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "a" in mode:
            buffered.seek(0, os.SEEK_END)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding)

    return opened


def _counted(faults: Faults, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        faults.tick(name)
        return real(*arguments, **options)

    return call


@contextmanager
def injected(faults: Faults) -> Iterator[Faults]:
    """Let writes of this process fail as told."""
    real_open = os.open

    def low(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            faults.tick("open")
        return real_open(path, flags, *rest, **more)

    def unlink(*arguments: Any, **options: Any) -> None:
        if faults.dead:
            raise Killed("unlink")
        real_unlink(*arguments, **options)

    real_unlink = os.unlink
    with mock.patch.multiple(
        os,
        open=low,
        unlink=unlink,
        **{name: _counted(faults, name, getattr(os, name)) for name in _CALLS},
    ):
        opened = _opener(faults, io.open)
        with mock.patch.object(io, "open", opened), mock.patch.object(builtins, "open", opened):
            yield faults


KINDS: dict[str, dict[str, Any]] = {
    "full": {"number": errno.ENOSPC},
    "full for good": {"number": errno.ENOSPC, "lasting": True},
    "broken": {"number": errno.EIO},
    "read-only": {"number": errno.EROFS, "lasting": True},
    "killed": {},
}
