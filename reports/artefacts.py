"""Images of a run, by content, written beside the work that makes them.

Saving hands the bytes to a few threads and goes on: a unit of work makes hundreds of images, and
waiting for the disk after each of them would cost more than a GPU needs to make them. `settle`
waits until everything handed over is on the disk, folders included; a ledger line that names an
image is only written after it.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Final

from reports.files import explained, sync_folder, verified, write_atomically

_THREADS: Final = 8
"""Writers: they wait for the disk, and for nothing else."""


class Artefacts:
    """A folder of images named by the SHA-256 of their bytes.

    Args:
        folder: of the images; made when the first is saved.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writing: dict[str, Future[None]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._lock = Lock()

    def path(self, name: str) -> Path:
        """Where the image with this content hash is stored."""
        return self._folder / name[:2] / f"{name}.png"

    def save(self, data: bytes) -> str:
        """Have an image written; return the SHA-256 (hex) of its bytes at once.

        What goes wrong is raised by the next `settle` or `read`.
        """
        name = hashlib.sha256(data).hexdigest()
        with self._lock:  # images are encoded, and so saved, in several threads
            if name not in self._writing and not self.path(name).exists():
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="images")
                self._writing[name] = self._pool.submit(write_atomically, self.path(name), data)
        return name

    def read(self, name: str) -> bytes:
        """Bytes of a stored image.

        Raises:
            StoreError: if it could not be written, is missing, or is no longer what was stored.
        """
        if name in self._writing:
            self._writing[name].result()
        return verified(self.path(name), name)

    def settle(self) -> None:
        """Wait until all images are on the disk.

        Raises:
            StoreError: if one could not be written; the others are, and it may be saved again.
        """
        writing, self._writing = self._writing, {}
        failed: BaseException | None = None
        for one in writing.values():
            failed = failed or one.exception()
        if failed is not None:
            raise failed
        for folder in sorted({self.path(name).parent for name in writing}):
            with explained("write", folder):
                sync_folder(folder)

    def close(self) -> None:
        """Let the writers end; what they have begun is finished."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._writing = {}
