"""Writing files so that a killed process, a full disk or a second writer cannot damage a run."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from reports.errors import RunLockedError, StoreError

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space and run again to resume",
    errno.EDQUOT: "the disk quota is used up; free some space and run again to resume",
    errno.EROFS: "the file system is read-only; choose a writable --out folder",
    errno.EACCES: "permission denied; choose a writable --out folder",
    errno.EPERM: "not permitted; choose a writable --out folder",
    errno.ENOTDIR: "part of the path is a file; choose another --out folder",
    errno.EEXIST: "it exists and is not a folder; choose another --out folder",
}


_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}")
"""Names that `write_atomically` gives to files it has not finished."""


@contextmanager
def explained(action: str, path: Path) -> Iterator[None]:
    """Turn an `OSError` into a `StoreError` that says what to do."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, error.strerror or str(error))
        raise StoreError(f"cannot {action} {path}: {advice}") from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file whole or not at all: temporary name beside it, fsync, rename.

    Raises:
        StoreError: if it cannot be written.
    """
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)  # mkstemp makes private files; a report is there to be shared
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def sweep(folder: Path) -> None:
    """Remove what killed writers left of files that were not finished yet.

    Only for folders in which nobody else writes.

    Raises:
        StoreError: if the folder cannot be written.
    """
    with explained("tidy up", folder):
        for path in folder.rglob(".*"):
            if _TEMPORARY.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write bytes whole or not at all, see `replacing`.

    Raises:
        StoreError: if it cannot be written.
    """
    with replacing(path) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk: without it a power cut can lose a renamed file.

    Does nothing where folders cannot be opened (Windows).

    Raises:
        OSError: if the disk refuses.
    """
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def verified(path: Path, name: str) -> bytes:
    """Bytes of a file that is named after the SHA-256 of its content.

    Raises:
        StoreError: if it is missing or is no longer what was stored.
    """
    with explained("read", path):
        data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != name:
        raise StoreError(f"{path} was changed: its content no longer has the hash in its name")
    return data


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; what UTF-8 cannot hold (lone surrogates) becomes ``?``."""
    write_atomically(path, text.encode("utf-8", errors="replace"))


def write_json(path: Path, data: object) -> None:
    """Write JSON atomically, indented, keys in the order given, no NaN."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


class FileLock:
    """An exclusive lock that dies with its process, so a killed run never leaves one behind."""

    def __init__(self, path: Path) -> None:
        """Take the lock.

        Raises:
            RunLockedError: if another process holds it.
            StoreError: if the lock file cannot be written.
        """
        with explained("lock", path):
            self._file = path.open("a+", encoding="utf-8")
        try:
            _lock(self._file.fileno())
        except OSError as error:
            self._file.seek(0)
            owner = self._file.read(40).strip() or "unknown"
            self._file.close()
            raise RunLockedError(
                f"{path.parent} is being written by another run (process {owner}); "
                "wait for it, stop it, or give another --out folder"
            ) from error
        with explained("lock", path):
            self._file.truncate(0)
            self._file.write(f"{os.getpid()}\n")
            self._file.flush()

    def release(self) -> None:
        """Give the lock back; harmless when already given back."""
        self._file.close()


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # beyond the text, which stays readable
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
