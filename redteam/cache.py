"""Attacked images of earlier runs, by the hash of everything that made them.

A run that adds a compressor or a defence to an earlier one looks at many of the same images. The
key holds what an image depends on: the source code of redteam, versions of the packages that
compute, device and threads, the weights, the attack with its options, budget and seed, and the
sample. Methods of other packages are never cached, because their code is not in the key.

An image from the cache was not made again, so what making it took is that of the earlier run; its
trial says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from redteam.errors import UsageError

VARIABLE: Final = "REDTEAM_CACHE"
"""Folder of the cache, or ``off``."""
LIMIT_VARIABLE: Final = "REDTEAM_CACHE_LIMIT"
"""Size above which the images used longest ago are deleted, e.g. ``20GB``."""
LIMIT: Final = 5 * 1024**3
NOTE: Final = "note: the image is from the cache; what making it took is that of an earlier run"
_UNITS: Final = {"B": 1, "KB": 1024, "MB": 1024**2, "GB": 1024**3, "TB": 1024**4}
_SUFFIX: Final = ".image"
_DIGEST: Final = 32
_CODE: Final = ("attacks", "defenses", "redteam", "targets")


@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept of one attacked image.

    Attributes:
        facts: plain JSON data of how it was made.
        attacked: PNG of it.
        base: PNG of what its budget was measured from.
    """

    facts: Mapping[str, Any]
    attacked: bytes
    base: bytes


@dataclass(frozen=True, slots=True)
class Contents:
    """What the cache holds: where, how much, and how much it may."""

    folder: Path
    images: int
    size: int
    limit: int


class ImageCache:
    """A folder of attacked images.

    Args:
        folder: made when the first image is kept.
        limit: bytes; `prune` deletes what is above it.
    """

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder, limit

    @classmethod
    def of_environment(cls) -> ImageCache | None:
        """The user's cache; None if it is switched off.

        Raises:
            UsageError: if its limit is no size.
        """
        place = os.environ.get(VARIABLE, "")
        if place.lower() in ("off", "0", "no"):
            return None
        limit = size_of(os.environ.get(LIMIT_VARIABLE) or f"{LIMIT}B")
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cls(Path(place) if place else home / "redteam" / "images", limit)

    def get(self, key: str) -> Entry | None:
        """The image of a key; None if there is none, or it is damaged."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)  # what is used stays longest
        except OSError:
            return None
        return _unpacked(data)

    def put(self, key: str, entry: Entry) -> None:
        """Keep an image; a cache that cannot be written is no reason to stop a run."""
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not waited for on the disk: what a power cut tears, its checksum tells.
            handle, name = tempfile.mkstemp(prefix=".", dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(_packed(entry))
            Path(name).replace(path)
        except OSError:
            return

    def contents(self) -> Contents:
        """What it holds."""
        sizes = [size for _, size, _ in self._files()]
        return Contents(self.folder, len(sizes), sum(sizes), self.limit)

    def prune(self, limit: int | None = None) -> int:
        """Delete what was used longest ago until it is within its limit; how many were deleted."""
        limit = self.limit if limit is None else limit
        files = sorted(self._files())
        total, deleted = sum(size for _, size, _ in files), 0
        for _, size, path in files:
            if total <= limit:
                break
            path.unlink(missing_ok=True)
            total, deleted = total - size, deleted + 1
        return deleted

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{_SUFFIX}"

    def _files(self) -> Iterable[tuple[float, int, Path]]:
        for path in self.folder.glob(f"??/*{_SUFFIX}"):
            try:
                found = path.stat()
            except OSError:  # another process pruned it
                continue
            yield found.st_mtime, found.st_size, path


def key_of(made: Mapping[str, Any]) -> str:
    """The key of an image.

    Args:
        made: plain JSON data of everything that made it, code and versions aside.
    """
    whole = {"form": 1, "code": code(), "versions": _versions(), "made": made}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", errors="replace")).hexdigest()


@lru_cache(maxsize=1)
def code() -> str:
    """Hash of the source code that makes images, of every file of it."""
    root, digest = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for package in _CODE:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    from redteam.provenance import version_of, versions

    found = {name: one for name, one in versions().items() if name not in ("redteam", "pydantic")}
    for name in ("torchattacks", "adversarial-robustness-toolbox", "scipy"):
        found[name] = version_of(name)
    return found


def size_of(text: str) -> int:
    """Bytes of ``20GB``.

    Raises:
        UsageError: if it is no size.
    """
    value = text.strip().upper()
    unit = next((one for one in ("KB", "MB", "GB", "TB", "B") if value.endswith(one)), "")
    try:
        number = float(value.removesuffix(unit))
    except ValueError:
        number = -1.0
    if not unit or not 0 <= number < 1e6 * _UNITS["TB"]:
        raise UsageError(f"{text!r} is no size; give a number with B, KB, MB, GB or TB, e.g. 20GB")
    return int(number * _UNITS[unit])


def _packed(entry: Entry) -> bytes:
    facts = {**entry.facts, "_attacked": len(entry.attacked), "_base": len(entry.base)}
    head = json.dumps(facts, separators=(",", ":")).encode("utf-8", errors="replace")
    body = len(head).to_bytes(4, "big") + head + entry.attacked + entry.base
    return hashlib.sha256(body).digest() + body


def _unpacked(data: bytes) -> Entry | None:
    digest, body = data[:_DIGEST], data[_DIGEST:]
    if hashlib.sha256(body).digest() != digest:
        return None
    length = int.from_bytes(body[:4], "big")
    facts = json.loads(body[4 : 4 + length])
    pictures = body[4 + length :]
    attacked, base = facts.pop("_attacked"), facts.pop("_base")
    return Entry(facts, pictures[:attacked], pictures[attacked : attacked + base])
