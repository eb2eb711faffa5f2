"""The world of the scenes LVLM: small cluttered pictures with exact ground truth.

A scene is a 96 × 96 picture on a 12 × 12 grid of 8-pixel patches: a textured, noisy background,
faint clutter, one to four objects (shape × colour) and often a sign with two characters. Because
the scene is drawn, it is known exactly which pixels answer a question; they are its *evidence*.

Everything is a function of (split, index): the same call gives the same bytes on every machine
with the same numpy, whatever was drawn before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

Split = Literal["train", "validation", "test"]
Kind = Literal["exists", "colour", "shape", "count", "read"]
Box = tuple[int, int, int, int]
"""Pixels x0, y0, x1, y1; the last two exclusive."""

SIZE: Final = 96
PATCH: Final = 8
GRID: Final = SIZE // PATCH
SPLITS: Final[tuple[Split, ...]] = ("train", "validation", "test")
KINDS: Final[tuple[Kind, ...]] = ("exists", "colour", "shape", "count", "read")
SHAPES: Final = ("circle", "square", "triangle", "cross", "star", "ring")
COLOURS: Final = {
    "red": (0.86, 0.12, 0.12),
    "green": (0.12, 0.68, 0.18),
    "blue": (0.15, 0.25, 0.90),
    "yellow": (0.93, 0.85, 0.12),
    "magenta": (0.85, 0.15, 0.80),
    "cyan": (0.12, 0.80, 0.85),
}
NUMBERS: Final = ("one", "two", "three", "four")
GLYPHS: Final = {
    "a": "01110 10001 10001 11111 10001 10001 10001",
    "c": "01111 10000 10000 10000 10000 10000 01111",
    "h": "10001 10001 10001 11111 10001 10001 10001",
    "l": "10000 10000 10000 10000 10000 10000 11111",
    "n": "10001 11001 11001 10101 10011 10011 10001",
    "t": "11111 00100 00100 00100 00100 00100 00100",
    "x": "10001 10001 01010 00100 01010 10001 10001",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "7": "11111 00001 00010 00010 00100 00100 00100",
}
"""Own 5 × 7 bitmaps: a font file would make the data depend on the machine's fonts."""

CHARACTERS: Final = tuple(GLYPHS)
_CROP: Final = 24


@dataclass(frozen=True, slots=True)
class Object:
    """One drawn object and where it is, centre and radius in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def box(self) -> Box:
        """The pixels the object may touch, clipped to the picture."""
        low = (int(self.x - self.radius), int(self.y - self.radius))
        high = (int(np.ceil(self.x + self.radius)), int(np.ceil(self.y + self.radius)))
        return (max(low[0], 0), max(low[1], 0), min(high[0], SIZE), min(high[1], SIZE))


@dataclass(frozen=True, slots=True)
class Sign:
    """A plate of two patches with one character in each; column and row of the left patch."""

    text: str
    column: int
    row: int

    @property
    def box(self) -> Box:
        """The pixels of the plate."""
        x, y = self.column * PATCH, self.row * PATCH
        return (x, y, x + 2 * PATCH, y + PATCH)


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its only right answer, and the boxes one has to see to answer it."""

    kind: Kind
    text: str
    answer: str
    evidence: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture (uint8 ``[96, 96, 3]``) with its ground truth."""

    id: str
    image: npt.NDArray[np.uint8]
    objects: tuple[Object, ...]
    sign: Sign | None
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class SceneSample:
    """One question about one scene, as datasets hand it out."""

    id: str
    image_id: str
    image: npt.NDArray[np.uint8]
    question: str
    answer: str
    kind: Kind
    evidence: tuple[Box, ...]


def samples(
    split: Split, count: int, *, start: int = 0, questions_per_image: int = 1
) -> list[SceneSample]:
    """Draw `count` questions of a split, from scene number `start` on.

    Kinds take turns, so a count that is a multiple of five is balanced but for scenes without a
    sign or without an unambiguous object, which fall back to another kind.

    Args:
        split: which of the three disjoint streams of scenes.
        count: number of questions, at least 0.
        start: index of the first scene.
        questions_per_image: at most this many questions about one scene.
    """
    out: list[SceneSample] = []
    index = start
    while len(out) < count:
        one = scene(split, index)
        turn = index % len(KINDS)
        order = sorted(one.questions, key=lambda q: (KINDS.index(q.kind) - turn) % len(KINDS))
        for q in order[: min(questions_per_image, count - len(out))]:
            out.append(
                SceneSample(
                    f"{one.id}-{q.kind}", one.id, one.image, q.text, q.answer, q.kind, q.evidence
                )
            )
        index += 1
    return out


def scene(split: Split, index: int) -> Scene:
    """Draw scene number `index` of a split.

    Raises:
        ValueError: for an unknown split or a negative index.
    """
    if split not in SPLITS or index < 0:
        raise ValueError(
            f"scene({split!r}, {index}): split must be one of {', '.join(SPLITS)} and index >= 0"
        )
    digest = hashlib.blake2b(f"redteam scenes {split} {index}".encode(), digest_size=16).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
    objects, sign = _place(rng)
    image = _draw(rng, objects, sign)
    return Scene(f"{split}-{index:06d}", image, objects, sign, tuple(_ask(rng, objects, sign)))


def patch_labels(one: Scene) -> npt.NDArray[np.int64]:
    """Dense ground truth of every patch: ``[GRID * GRID, 3]`` of shape, colour, character.

    0 means background; shapes, colours and characters count from 1; a left character c is c + 1,
    a right one ``c + 1 + len(CHARACTERS)``. A patch belongs to the object whose centre is nearest.
    """
    labels = np.zeros((GRID, GRID, 3), dtype=np.int64)
    for thing in one.objects:
        column, row = round(thing.x / PATCH), round(thing.y / PATCH)
        block = labels[row - 1 : row + 1, column - 1 : column + 1]
        block[..., 0] = SHAPES.index(thing.shape) + 1
        block[..., 1] = list(COLOURS).index(thing.colour) + 1
    if one.sign is not None:
        left, right = (CHARACTERS.index(c) + 1 for c in one.sign.text)
        labels[one.sign.row, one.sign.column, 2] = left
        labels[one.sign.row, one.sign.column + 1, 2] = right + len(CHARACTERS)
    return labels.reshape(GRID * GRID, 3)


def tokens_of(boxes: tuple[Box, ...], *, share: float = 0.1) -> npt.NDArray[np.bool_]:
    """Patches of which boxes cover at least `share` of the area: bool ``[GRID * GRID]``."""
    cover = np.zeros((SIZE, SIZE), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        cover[y0:y1, x0:x1] = True
    area = cover.reshape(GRID, PATCH, GRID, PATCH).mean(axis=(1, 3))
    return np.asarray(area >= share).reshape(-1)


# ---------------------------------------------------------------------------- what is in a scene


def _place(rng: np.random.Generator) -> tuple[tuple[Object, ...], Sign | None]:
    """Choose objects on grid corners (each covers 2 × 2 patches) and a sign, none overlapping."""
    free = np.ones((GRID, GRID), dtype=bool)
    sign = None
    if rng.random() < 0.6:
        column, row = int(rng.integers(0, GRID - 1)), int(rng.integers(0, GRID))
        text = "".join(rng.choice(list(CHARACTERS), size=2))
        sign = Sign(text, column, row)
        free[row, column : column + 2] = False
    pairs = rng.permutation(len(SHAPES) * len(COLOURS))
    wanted = int(rng.integers(1, len(NUMBERS) + 1))
    objects: list[Object] = []
    for pair in pairs[:wanted]:
        shape, colour = SHAPES[pair // len(COLOURS)], list(COLOURS)[pair % len(COLOURS)]
        corner = _free_corner(rng, free)
        if corner is None:
            break
        column, row = corner
        x, y = np.array([column, row]) * PATCH + rng.uniform(-1.2, 1.2, size=2)
        objects.append(Object(shape, colour, float(x), float(y), float(rng.uniform(6.5, 8.2))))
        free[max(row - 2, 0) : row + 2, max(column - 2, 0) : column + 2] = False
    return tuple(objects), sign


def _free_corner(rng: np.random.Generator, free: npt.NDArray[np.bool_]) -> tuple[int, int] | None:
    """A random grid corner (column, row) whose four patches are free, or None."""
    four = free[:-1, :-1] & free[1:, :-1] & free[:-1, 1:] & free[1:, 1:]
    rows, columns = np.nonzero(four)
    if len(rows) == 0:
        return None
    pick = int(rng.integers(len(rows)))
    return int(columns[pick]) + 1, int(rows[pick]) + 1


def _ask(
    rng: np.random.Generator, objects: tuple[Object, ...], sign: Sign | None
) -> Iterator[Question]:
    """At most one question of each kind; kinds that would be ambiguous are left out."""
    yield _ask_exists(rng, objects)
    for kind, own, other in (("colour", "shape", "colour"), ("shape", "colour", "shape")):
        values = [getattr(o, own) for o in objects]
        unique = [o for o in objects if values.count(getattr(o, own)) == 1]
        if unique:
            o = unique[int(rng.integers(len(unique)))]
            text = (
                f"what {other} is the {o.shape} ?"
                if own == "shape"
                else f"what shape is {o.colour} ?"
            )
            yield Question(kind, text, getattr(o, other), (o.box,))  # type: ignore[arg-type]
    boxes = tuple(o.box for o in objects)
    yield Question("count", "how many shapes are there ?", NUMBERS[len(objects) - 1], boxes)
    if sign is not None:
        yield Question("read", "what does the sign say ?", " ".join(sign.text), (sign.box,))


def _ask_exists(rng: np.random.Generator, objects: tuple[Object, ...]) -> Question:
    """POPE's question: half yes; of the no half are adversarial, both parts present but apart."""
    present = {(o.shape, o.colour) for o in objects}
    if rng.random() < 0.5:
        o = objects[int(rng.integers(len(objects)))]
        return Question("exists", f"is there a {o.colour} {o.shape} ?", "yes", (o.box,))
    shapes, colours = {o.shape for o in objects}, {o.colour for o in objects}
    absent = [(s, c) for s in SHAPES for c in COLOURS if (s, c) not in present]
    near = [(s, c) for s, c in absent if s in shapes and c in colours]
    pool = near if near and rng.random() < 0.5 else absent
    shape, colour = pool[int(rng.integers(len(pool)))]
    boxes = tuple(o.box for o in objects if o.shape == shape or o.colour == colour)
    return Question("exists", f"is there a {colour} {shape} ?", "no", boxes)


# ---------------------------------------------------------------------------------- how it looks


def _draw(
    rng: np.random.Generator, objects: tuple[Object, ...], sign: Sign | None
) -> npt.NDArray[np.uint8]:
    """Paint background, clutter, objects, sign and pixel noise; uint8 ``[96, 96, 3]``."""
    canvas = _background(rng)
    for _ in range(int(rng.integers(3, 9))):
        _clutter(rng, canvas)
    for thing in objects:
        _paint_object(rng, canvas, thing)
    if sign is not None:
        _paint_sign(rng, canvas, sign)
    canvas += rng.normal(0.0, 0.02, size=canvas.shape)
    return np.asarray(np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def _background(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """A grey-brown base with low-frequency texture, float ``[96, 96, 3]``."""
    base = rng.uniform(0.3, 0.7) + rng.uniform(-0.05, 0.05, size=3)
    coarse = rng.normal(0.0, 0.06, size=(7, 7, 3))
    grid = np.linspace(0, 6, SIZE, endpoint=False)
    low = grid.astype(int)
    t = (grid - low)[:, None]
    rows = coarse[low] * (1 - t)[:, :, None] + coarse[low + 1 - (low == 6)] * t[:, :, None]
    cols = rows[:, low] * (1 - t)[None] + rows[:, low + 1 - (low == 6)] * t[None]
    return np.asarray(base + cols)


def _clutter(rng: np.random.Generator, canvas: npt.NDArray[np.float64]) -> None:
    """A faint line or dot in place: there to be ignored."""
    tint = rng.uniform(-0.12, 0.12) + rng.uniform(-0.04, 0.04, size=3)
    x, y = rng.uniform(0, SIZE, size=2)
    if rng.random() < 0.5:
        angle, length = rng.uniform(0, np.pi), rng.uniform(10, 40)
        steps = np.linspace(0, length, int(length))
        xs = (x + steps * np.cos(angle)).astype(int)
        ys = (y + steps * np.sin(angle)).astype(int)
        inside = (xs >= 0) & (xs < SIZE) & (ys >= 0) & (ys < SIZE)
        canvas[ys[inside], xs[inside]] += tint
    else:
        r = int(rng.integers(1, 4))
        canvas[max(int(y) - r, 0) : int(y) + r, max(int(x) - r, 0) : int(x) + r] += tint


def _star(u: npt.NDArray[np.float64], v: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + sector / 2) % sector - sector / 2) / (sector / 2)
    # The radius of a five-pointed star's outline, linear in the angle from tip to notch.
    return np.asarray(np.hypot(u, v) - (1.05 - 0.65 * angle))


_SHAPE_FIELDS: Final[dict[str, Callable[..., npt.NDArray[np.float64]]]] = {
    "circle": lambda u, v: np.hypot(u, v) - 0.95,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.82,
    "triangle": lambda u, v: np.maximum(0.88 * np.abs(u) - 0.47 * v - 0.47, v - 0.75),
    "cross": lambda u, v: np.minimum(
        np.maximum(np.abs(u) - 0.32, np.abs(v) - 0.98),
        np.maximum(np.abs(v) - 0.32, np.abs(u) - 0.98),
    ),
    "star": _star,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.7) - 0.24,
}
"""Signed fields in units of the radius, negative inside; u to the right, v downwards."""


def _paint_object(rng: np.random.Generator, canvas: npt.NDArray[np.float64], thing: Object) -> None:
    """Paint one object in place, edges smoothed over a pixel."""
    x0, y0 = round(thing.x) - _CROP // 2, round(thing.y) - _CROP // 2
    xs = np.arange(max(x0, 0), min(x0 + _CROP, SIZE))
    ys = np.arange(max(y0, 0), min(y0 + _CROP, SIZE))
    u = (xs[None] + 0.5 - thing.x) / thing.radius
    v = (ys[:, None] + 0.5 - thing.y) / thing.radius
    field = _SHAPE_FIELDS[thing.shape](u + 0 * v, v + 0 * u)
    alpha = np.clip(0.5 - field * thing.radius, 0, 1)[..., None]
    colour = np.asarray(COLOURS[thing.colour]) + rng.uniform(-0.07, 0.07, size=3)
    view = canvas[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    view *= 1 - alpha
    view += alpha * colour


def _paint_sign(rng: np.random.Generator, canvas: npt.NDArray[np.float64], sign: Sign) -> None:
    """Paint the plate and its two characters in place."""
    x0, y0, x1, y1 = sign.box
    canvas[y0:y1, x0:x1] = rng.uniform(0.86, 0.98)
    ink = rng.uniform(0.02, 0.15)
    for i, character in enumerate(sign.text):
        rows = GLYPHS[character].split()
        bitmap = np.array([[int(bit) for bit in row] for row in rows], dtype=bool)
        left = x0 + i * PATCH + 1
        canvas[y0 + 1 : y0 + 8, left : left + 5][bitmap] = ink
