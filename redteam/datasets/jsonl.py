"""Your own data: one JSON object a line, pictures beside it."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
from annotated_types import Ge
from PIL import Image, ImageOps

from redteam.datasets.base import Box, Sample
from redteam.errors import DatasetError, nearest

MAX_FILE: Final = 256 << 20
MAX_LINE: Final = 1 << 20
MAX_PICTURE: Final = 64 << 20
MAX_PIXELS: Final = 50_000_000
FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP")
_KEYS: Final = ("image", "question", "answer", "id", "image_id", "kind", "evidence")
_REQUIRED: Final = ("image", "question", "answer")


@dataclass(frozen=True, kw_only=True)
class Jsonl:
    """Questions from a JSON-lines file: image, question, answer; optional kind and evidence.

    Each line holds ``image`` (path relative to the file, inside its folder), ``question``,
    ``answer`` (a text, or a list of accepted texts, the first as the model would spell it), and
    may hold ``id``, ``image_id``, ``kind`` and ``evidence`` (boxes ``[x0, y0, x1, y1]`` in pixels).

    Args:
        path: of the file, relative to the scenario.
        samples: use only the first so many; null is all.
    """

    name: ClassVar[str] = "jsonl"
    paths: ClassVar[tuple[str, ...]] = ("path",)

    path: str
    samples: Annotated[int, Ge(1)] | None = None

    def open(self) -> Lines:
        """Read and check all lines, and the size of every picture.

        Raises:
            DatasetError: with the line at fault.
        """
        return Lines(Path(self.path), self.samples)


@dataclass(frozen=True, slots=True)
class _Line:
    """A checked line; `picture` lies inside the file's folder."""

    number: int
    id: str
    image_id: str
    picture: Path
    question: str
    answers: tuple[str, ...]
    kind: str
    evidence: tuple[Box, ...]


class Lines:
    """Samples of a JSON-lines file; pictures are read when asked for.

    Raises:
        DatasetError: if the file is missing, too large, empty, or a line is wrong.
    """

    def __init__(self, path: Path, limit: int | None = None) -> None:
        self._path = path
        self._lines: list[_Line] = []
        total, seen = hashlib.sha256(), set[str]()
        for number, raw in self._read():
            if not raw.strip():
                continue
            line = self._parse(number, raw)
            if line.id in seen:
                raise self._wrong(number, f"id {line.id!r} is used before; ids are unique")
            seen.add(line.id)
            size = self._check_picture(line)
            total.update(raw.strip() + f"\0{size}\n".encode())
            self._lines.append(line)
            if limit is not None and len(self._lines) == limit:
                break
        if not self._lines:
            raise DatasetError(f"{path} holds no line; write one JSON object a line")
        self._identity = total.hexdigest()

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of all samples, in order."""
        return tuple(line.id for line in self._lines)

    @property
    def identity(self) -> str:
        """Hash over the lines and the sizes of the pictures' files."""
        return self._identity

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Sample:
        line = self._lines[index]
        image = self._pixels(line)
        self._check_boxes(line, image.shape[0], image.shape[1])
        return Sample(
            id=line.id,
            image_id=line.image_id,
            image=image,
            question=line.question,
            answer=line.answers[0],
            accepted=line.answers[1:],
            kind=line.kind,
            evidence=line.evidence,
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def _read(self) -> Iterator[tuple[int, bytes]]:
        try:
            if self._path.stat().st_size > MAX_FILE:
                raise DatasetError(f"{self._path} is larger than {MAX_FILE >> 20} MiB; split it")
            with self._path.open("rb") as file:
                number = 0
                while raw := file.readline(MAX_LINE + 1):
                    number += 1
                    if len(raw) > MAX_LINE:
                        raise self._wrong(number, "is longer than 1 MiB")
                    yield number, raw
        except OSError as error:
            raise DatasetError(f"{self._path} cannot be read: {error.strerror}") from error

    def _parse(self, number: int, raw: bytes) -> _Line:
        try:
            data = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise self._wrong(number, f"is not JSON: {error}") from error
        if not isinstance(data, dict):
            raise self._wrong(number, 'is no JSON object; write {"image": …, "question": …}')
        for key in data:
            if key not in _KEYS:
                hint = nearest(key, _KEYS)
                known = ", ".join(_KEYS)
                raise self._wrong(
                    number, f"unknown key {key!r}; known: {known}; {hint}".rstrip("; ")
                )
        for key in _REQUIRED:
            if key not in data:
                raise self._wrong(number, f"has no {key!r}")
        picture = self._text(number, data, "image")
        return _Line(
            number=number,
            id=self._text(number, data, "id", f"{number:06d}"),
            image_id=self._text(number, data, "image_id", picture),
            picture=self._confined(number, picture),
            question=self._text(number, data, "question"),
            answers=self._answers(number, data["answer"]),
            kind=self._text(number, data, "kind", ""),
            evidence=self._boxes(number, data.get("evidence") or []),
        )

    def _text(self, number: int, data: dict[str, Any], key: str, default: str | None = None) -> str:
        value = data.get(key, default)
        if not isinstance(value, str) or (not value.strip() and default is None):
            raise self._wrong(number, f"{key!r} is {value!r}; it has to be a text")
        return value

    def _answers(self, number: int, value: object) -> tuple[str, ...]:
        answers = value if isinstance(value, list) else [value]
        if not answers or not all(isinstance(one, str) and one.strip() for one in answers):
            raise self._wrong(number, f"'answer' is {value!r}; write a text or a list of texts")
        return tuple(answers)

    def _boxes(self, number: int, value: object) -> tuple[Box, ...]:
        found: list[Box] = []
        for box in value if isinstance(value, list) else [value]:
            edges = box if isinstance(box, list) else []
            whole = len(edges) == 4 and all(type(edge) is int and edge >= 0 for edge in edges)
            if not whole or edges[0] >= edges[2] or edges[1] >= edges[3]:
                raise self._wrong(
                    number, f"'evidence' holds {box!r}; write boxes [x0, y0, x1, y1] with x0 < x1"
                )
            found.append((edges[0], edges[1], edges[2], edges[3]))
        return tuple(found)

    def _confined(self, number: int, name: str) -> Path:
        """Resolve a picture's path; links out of the folder are refused like ``..``."""
        folder = self._path.parent.resolve()
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            raise self._wrong(
                number, f"image {name!r} lies outside the folder of the file; move it inside"
            )
        return path

    def _check_picture(self, line: _Line) -> int:
        """The picture's file size, after a look at its header only."""
        try:
            size = line.picture.stat().st_size
            if size > MAX_PICTURE:
                raise self._wrong(line.number, f"image is larger than {MAX_PICTURE >> 20} MiB")
            with Image.open(line.picture, formats=FORMATS) as image:
                width, height = image.size
        except OSError as error:
            name = line.picture.name
            why = error.strerror or f"it is none of {', '.join(FORMATS)}"
            raise self._wrong(line.number, f"image {name!r} cannot be read: {why}") from error
        except Image.DecompressionBombError as error:
            raise self._wrong(line.number, f"image is refused: {error}") from error
        if width * height > MAX_PIXELS:
            raise self._wrong(
                line.number,
                f"image has {width} × {height} pixels; at most {MAX_PIXELS:,} are allowed",
            )
        return size

    def _check_boxes(self, line: _Line, height: int, width: int) -> None:
        for box in line.evidence:
            if box[2] > width or box[3] > height:
                raise self._wrong(
                    line.number, f"evidence {list(box)} reaches beyond the {width} × {height} image"
                )

    def _pixels(self, line: _Line) -> npt.NDArray[np.uint8]:
        try:
            data = line.picture.read_bytes()
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                upright = ImageOps.exif_transpose(image)
                return np.asarray(upright.convert("RGB"), dtype=np.uint8).copy()
        except (OSError, SyntaxError, ValueError) as error:
            raise self._wrong(
                line.number, f"image {line.picture.name!r} cannot be decoded: {error}"
            ) from error

    def _wrong(self, number: int, message: str) -> DatasetError:
        return DatasetError(f"{self._path}:{number}: {message}")
