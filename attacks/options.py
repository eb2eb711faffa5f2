"""Options of an attack checked against their own annotations, where they are set."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types

from attacks.errors import AttackError

_COMPARISONS: tuple[tuple[type, str, Callable[[Any, Any], bool]], ...] = (
    (annotated_types.Ge, "ge", operator.ge),
    (annotated_types.Gt, "gt", operator.gt),
    (annotated_types.Le, "le", operator.le),
    (annotated_types.Lt, "lt", operator.lt),
)


def check_options(instance: object, name: str) -> None:
    """Check every field of a method against its annotation: type, choices and bounds.

    Args:
        instance: a dataclass whose fields are its options.
        name: the method's name, for the message.

    Raises:
        AttackError: with the option, its value and what is allowed.
    """
    for option, annotation in get_type_hints(type(instance), include_extras=True).items():
        if get_origin(annotation) is ClassVar:
            continue
        value = getattr(instance, option)
        wrong = complaint(annotation, value)
        if wrong is not None:
            raise AttackError(f"attack {name}: {option} is {value!r}; allowed: {wrong}")


def complaint(annotation: object, value: object) -> str | None:
    """What is wrong with an option, in words of its annotation; None if nothing is."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        wrong = [bound for bound in _bounds(parts[1:]) if not _holds(bound, value)]
        return complaint(parts[0], value) or (str(wrong[0]) if wrong else None)
    if origin in (UnionType, Union):
        found = [complaint(part, value) for part in parts]
        return None if None in found else " or ".join(filter(None, found))
    if origin is Literal:
        return None if value in parts else ", ".join(repr(choice) for choice in parts)
    kind = origin or annotation
    if isinstance(kind, type):
        accepted = (int, float) if kind is float else kind
        fits = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
        return None if fits else {"NoneType": "None"}.get(kind.__name__, kind.__name__)
    return None


def _bounds(metadata: Iterable[object]) -> Iterator[object]:
    for bound in metadata:
        if isinstance(bound, annotated_types.GroupedMetadata):
            yield from bound
        else:
            yield bound


def _holds(bound: object, value: object) -> bool:
    if not isinstance(value, int | float):
        return True  # the wrong type is reported as such
    for kind, limit, compare in _COMPARISONS:
        if isinstance(bound, kind):
            return bool(compare(value, getattr(bound, limit)))
    return True
