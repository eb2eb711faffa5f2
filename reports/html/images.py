"""Pictures for the report, as data URIs: stored images, and the change between two of them."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from reports.errors import StoreError
from reports.store import RunStore

EXACT = 256
"""Images up to this edge in pixels are embedded as stored; larger ones are made smaller."""
REDUCED = 448
"""Largest edge of an embedded image that was larger than `EXACT`."""
SMALL = 112
"""Largest edge of the pictures of findings that are only listed."""
_QUALITY = 88
_SMALL_QUALITY = 50
_UNREADABLE = (StoreError, UnidentifiedImageError, Image.DecompressionBombError, OSError)


@dataclass(frozen=True, slots=True)
class Picture:
    """An image in the page.

    Attributes:
        uri: a data URI.
        width: of what is embedded, in pixels.
        height: likewise.
        reduced: whether it was made smaller or lossy; the exact one is in the run folder.
    """

    uri: str
    width: int
    height: int
    reduced: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """Clean and attacked image of one trial, and their difference.

    Attributes:
        clean: the clean image.
        attacked: the attacked one.
        difference: attacked − clean around mid-grey, times `gain`; None if the sizes differ.
        gain: factor that brings the largest change to full contrast; 0 if nothing changed.
    """

    clean: Picture
    attacked: Picture
    difference: Picture | None
    gain: int


def load_pair(store: RunStore, clean: str | None, attacked: str | None) -> Pair | str:
    """Load the two images of a trial; a sentence saying why if that is not possible."""
    if clean is None or attacked is None:
        return "No image was stored for this trial."
    try:
        data = store.read_png(clean), store.read_png(attacked)
        first, second = (Image.open(io.BytesIO(one)).convert("RGB") for one in data)
    except _UNREADABLE as error:
        return f"The images cannot be shown: {error}"
    difference, gain = _difference(first, second)
    return Pair(_picture(first, data[0]), _picture(second, data[1]), difference, gain)


def load_small(store: RunStore, name: str | None) -> Picture | None:
    """A small, lossy picture of a stored image; None if there is none to show."""
    if name is None:
        return None
    try:
        image = Image.open(io.BytesIO(store.read_png(name))).convert("RGB")
    except _UNREADABLE:
        return None
    image.thumbnail((SMALL, SMALL))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=_SMALL_QUALITY, method=0)
    return Picture(_uri("webp", buffer.getvalue()), *image.size, reduced=True)


def _difference(clean: Image.Image, attacked: Image.Image) -> tuple[Picture | None, int]:
    if clean.size != attacked.size:
        return None, 0
    change = np.asarray(attacked, dtype=np.int16) - np.asarray(clean, dtype=np.int16)
    largest = int(np.abs(change).max())
    gain = 127 // largest if 0 < largest <= 127 else int(largest > 0)
    amplified = Image.fromarray((128 + gain * change).clip(0, 255).astype(np.uint8))
    return _picture(amplified, _encoded(amplified, "PNG")), gain


def _picture(image: Image.Image, exact: bytes) -> Picture:
    if max(image.size) <= EXACT:
        return Picture(_uri("png", exact), *image.size, reduced=False)
    small = image.copy()
    small.thumbnail((REDUCED, REDUCED), Image.Resampling.LANCZOS)
    return Picture(_uri("webp", _encoded(small, "WEBP")), *small.size, reduced=True)


def _encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, quality=_QUALITY)
    return buffer.getvalue()


def _uri(form: str, data: bytes) -> str:
    return f"data:image/{form};base64,{base64.b64encode(data).decode()}"
