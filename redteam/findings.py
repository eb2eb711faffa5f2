"""Collects what is wrong with a scenario; pydantic's findings become `Problem` here."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from redteam.annotations import describe
from redteam.document import Document, Location, key_path
from redteam.errors import Problem, nearest


class Findings:
    """Collects problems while a document is checked."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.problems: list[Problem] = []

    def add(
        self,
        location: Location,
        message: str,
        *,
        allowed: str = "",
        hint: str = "",
        key: bool = False,
    ) -> None:
        """Note a problem at a value, or at its key."""
        place = self.document.place(location, key=key)
        self.problems.append(Problem(place, key_path(location), message, allowed, hint))

    def in_order(self) -> list[Problem]:
        """All problems, those on the command line first, then by line of the file."""
        return sorted(self.problems, key=_position)

    def pydantic(
        self, error: ValidationError, base: Location, annotation: Callable[[Location], Any]
    ) -> None:
        """Note everything pydantic found in a value at `base`."""
        seen: set[Location] = set()
        for detail in error.errors():
            inner = _trim(detail, annotation)
            if inner not in seen:  # members of a union are reported one by one
                seen.add(inner)
                self._one(detail, base, inner, annotation)

    def _one(
        self,
        detail: ErrorDetails,
        base: Location,
        inner: Location,
        annotation: Callable[[Location], Any],
    ) -> None:
        location, kind = (*base, *inner), detail["type"]
        if kind == "extra_forbidden" or (kind == "literal_error" and detail["loc"][-1] == "[key]"):
            known = _keys(annotation(inner[:-1]))
            self.add(
                location,
                "unknown key",
                allowed=", ".join(known),
                hint=nearest(inner[-1], known),
                key=True,
            )
            return
        wanted = annotation(inner)
        if kind == "missing":
            self.add(location, "is missing", allowed=describe(wanted))
            return
        value = detail["input"]
        reason = str(detail.get("ctx", {}).get("error", "is not allowed"))
        if kind == "too_short":
            self.add(location, "is empty; name at least one")
            return
        words = typing.get_args(wanted) if typing.get_origin(wanted) is Literal else ()
        hint = nearest(value, words) if words else epsilon_hint(location, value)
        allowed = _ALLOWED.get(str(inner[-1]) if inner else "", describe(wanted))
        self.add(location, f"{shown(value)} {reason}", allowed=allowed, hint=hint)


def _position(problem: Problem) -> tuple[int, ...]:
    numbers = problem.place.split(":")[1:]
    return tuple(int(part) for part in numbers if part.isdigit())


_ALLOWED: Final = {"name": "letters, digits, and . _ - after the first character; at most 64"}


def shown(value: object) -> str:
    """A value for a message, cut short, as YAML calls it."""
    words = {True: "true", False: "false", None: "null"}
    if value is None or isinstance(value, bool):
        return words[value]
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def epsilon_hint(location: Location, value: object) -> str:
    """What someone who wrote a budget in grey levels meant, or ""."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if "epsilons" in location and numeric and 1 < value <= 255:  # type: ignore[operator]
        return f"did you mean {value:g}/255?"
    return ""


def _trim(detail: ErrorDetails, annotation: Callable[[Location], Any]) -> Location:
    """The location of an error in the data, without pydantic's names of union members."""
    loc: list[str | int] = []
    for part in detail["loc"]:
        if part == "[key]":
            break
        loc.append(part)
        if annotation(tuple(loc)) is None and detail["type"] != "extra_forbidden":
            loc.pop()
            break
    return tuple(loc)


def annotation_at(annotation: Any, location: Location) -> Any:  # noqa: ANN401 - any annotation
    """The annotation of a part of a value; None where there is none."""
    for part in location:
        annotation = _inside(annotation, part)
        if annotation is None:
            return None
    return annotation


def _inside(annotation: Any, part: str | int) -> Any:  # noqa: ANN401 - any annotation
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _inside(args[0], part)
    if origin in (typing.Union, types.UnionType):
        return next((found for found in (_inside(arg, part) for arg in args) if found), None)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(str(part))
        if field is None:
            return None
        return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    if origin in (list, tuple) and isinstance(part, int):
        return args[0] if origin is list or Ellipsis in args else args[min(part, len(args) - 1)]
    if origin is dict and isinstance(part, str):
        return args[1]
    return None


def _keys(annotation: Any) -> list[str]:  # noqa: ANN401 - any annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return list(annotation.model_fields)
    if typing.get_origin(annotation) is dict:
        return [str(word) for word in typing.get_args(typing.get_args(annotation)[0])]
    return []
