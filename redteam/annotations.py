"""What an annotation allows, in words, and whether a number may be written as a fraction there."""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, Literal

import annotated_types


def describe(annotation: Any) -> str:  # noqa: ANN401 - any annotation
    """An annotation in words: ``an integer ≥ 1, or null``."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        bounds = _bounds(parts[1:])
        return " ".join([describe(parts[0]), *([bounds] if bounds else [])])
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(describe(part) for part in parts)
    if origin is Literal:
        return " or ".join(repr(part) if len(parts) < 3 else str(part) for part in parts)
    if origin in (tuple, list):
        inner = [part for part in parts if part is not Ellipsis]
        if inner == [Any]:
            return "a list"
        if Ellipsis in parts or origin is list:
            return f"a list of {describe(inner[0])}"
        return f"a list of {len(inner)}: {'; '.join(map(describe, inner))}"
    names = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "a text",
        types.NoneType: "null",
        None: "null",
    }
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bounds(metadata: tuple[object, ...]) -> str:
    flat: list[object] = []
    for item in metadata:
        flat += list(item) if isinstance(item, annotated_types.GroupedMetadata) else [item]
    signs = {
        annotated_types.Gt: (">", "gt"),
        annotated_types.Ge: ("≥", "ge"),
        annotated_types.Lt: ("<", "lt"),
        annotated_types.Le: ("≤", "le"),
    }
    words = [
        f"{sign} {getattr(item, attribute):g}"
        for item in flat
        for kind, (sign, attribute) in signs.items()
        if isinstance(item, kind)
    ]
    return " and ".join(words)


def contains(annotation: Any, kind: type) -> bool:  # noqa: ANN401 - any annotation
    """Whether a type occurs anywhere in an annotation."""
    return annotation is kind or any(
        contains(part, kind)
        for part in typing.get_args(annotation)
        if not isinstance(part, annotated_types.BaseMetadata)
    )
