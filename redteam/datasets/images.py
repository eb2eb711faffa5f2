"""Pictures of others: found, measured and decoded without trusting them.

A picture is a file inside the data set's folder, or bytes in a cell of a table. Before a pixel is
decoded, its kind, the size of its file and the size its header claims are checked, so that a
decompression bomb costs nothing.
"""

from __future__ import annotations

import hashlib
import io
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

MAX_FILE: Final = 64 << 20
MAX_PIXELS: Final = 50_000_000
FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP")


class PictureError(ValueError):
    """What is wrong with a picture, without saying which row it belongs to."""


class Picture(Protocol):
    """Where a picture is; nothing is read before it is asked for."""

    @property
    def key(self) -> str:
        """Equal for the same picture, so that it is looked at once."""
        ...

    def measure(self) -> tuple[int, int]:
        """Width and height, from the header only.

        Raises:
            PictureError: if it is missing, too large, or no picture.
        """
        ...

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            PictureError: if they cannot be had.
        """
        ...

    def digest(self) -> str:
        """SHA-256 of the encoded bytes, in hex."""
        ...


@dataclass(frozen=True, slots=True)
class FilePicture:
    """A picture in a file.

    Attributes:
        path: where links lead to.
        name: as the data set writes it.
    """

    path: Path
    name: str

    @property
    def key(self) -> str:
        """Its path."""
        return str(self.path)

    def measure(self) -> tuple[int, int]:
        """See `Picture`."""
        self._check()
        with _opening(self.name), Image.open(self.path, formats=FORMATS) as image:
            size = image.size
        return _within(size)

    def read(self) -> bytes:
        """See `Picture`."""
        self._check()
        with _opening(self.name):
            return self.path.read_bytes()

    def digest(self) -> str:
        """See `Picture`."""
        return hashlib.sha256(self.read()).hexdigest()

    def _check(self) -> None:
        """Only a plain file may be opened: a pipe would wait for ever, a device never end."""
        with _opening(self.name):
            found = self.path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise PictureError(f"image {self.name!r} cannot be read: it is not a plain file")
        if found.st_size > MAX_FILE:
            raise PictureError(f"image {self.name!r} is larger than {MAX_FILE >> 20} MiB")


@dataclass(slots=True)
class CellPicture:
    """A picture whose bytes are in a table.

    Attributes:
        key: of the cell.
        fetch: reads the cell: bytes, or another picture where the cell holds a path.
    """

    key: str
    fetch: Callable[[], bytes | Picture]
    _digest: str = field(default="", init=False)

    def measure(self) -> tuple[int, int]:
        """See `Picture`; the bytes are hashed on the way, as reading them is what costs."""
        data = self.read()
        with _opening(""), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            size = image.size
        return _within(size)

    def read(self) -> bytes:
        """See `Picture`."""
        found = self.fetch()
        data = found if isinstance(found, bytes) else found.read()
        if not data:
            raise PictureError("image is empty")
        if len(data) > MAX_FILE:
            raise PictureError(f"image is larger than {MAX_FILE >> 20} MiB")
        if not self._digest:
            self._digest = hashlib.sha256(data).hexdigest()
        return data

    def digest(self) -> str:
        """See `Picture`."""
        if not self._digest:
            self.read()
        return self._digest


def decode(picture: Picture) -> npt.NDArray[np.uint8]:
    """The pixels, upright: uint8 ``[H, W, 3]``.

    Raises:
        PictureError: if the picture is damaged or larger than allowed.
    """
    data = picture.read()
    name = getattr(picture, "name", "")
    label = f"image {name!r}" if name else "image"
    try:
        with _quiet(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _within(image.size)
            upright = ImageOps.exif_transpose(image)
            return np.asarray(upright.convert("RGB"), dtype=np.uint8).copy()
    except PictureError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PictureError(f"{label} cannot be decoded: {error}") from error


def locate(name: str, folder: Path, root: Path | None) -> FilePicture:
    """The file a data set names; links out of its folder are refused like ``..``.

    Args:
        name: path as written.
        folder: it is relative to.
        root: it has to lie in; None allows any place.

    Raises:
        PictureError: if it lies outside.
    """
    try:
        path = (folder.resolve() / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise PictureError(f"image {name!r} is no path: {error}") from error
    if root is not None and not path.is_relative_to(root.resolve()):
        raise PictureError(
            f"image {name!r} lies outside the folder of the file; move it inside, or set "
            "outside: true if you trust the file"
        )
    return FilePicture(path, name)


def _within(size: tuple[int, int]) -> tuple[int, int]:
    width, height = size
    if width * height > MAX_PIXELS:
        raise PictureError(
            f"image has {width} × {height} pixels; at most {MAX_PIXELS:,} are allowed"
        )
    return size


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of large pictures; our own limit is stricter and refuses them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


@contextmanager
def _opening(name: str) -> Iterator[None]:
    """Say in one way what is wrong when a picture is opened."""
    label = f"image {name!r}" if name else "image"
    try:
        with _quiet():
            yield
    except Image.DecompressionBombError as error:
        raise PictureError(f"image is refused: {error}") from error
    except OSError as error:
        why = error.strerror or f"it is none of {', '.join(FORMATS)}"
        raise PictureError(f"{label} cannot be read: {why}") from error
    except (SyntaxError, ValueError) as error:
        if isinstance(error, PictureError):
            raise
        raise PictureError(f"{label} cannot be read: {error}") from error
