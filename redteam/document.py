"""YAML as plain data with the place of every node, and nothing of YAML that can hurt.

Refused are tags, anchors and aliases (so nothing can be built, shared or blown up), duplicate
keys, several documents, files above 1 MiB, and deep or huge trees. Plain scalars follow the YAML
1.2 core schema: ``no`` and ``on`` are texts, ``1e-3`` is a number, ``1:30`` is not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from redteam.errors import Problem, ScenarioError, nearest

MAX_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 20
MAX_NODES: Final = 20_000

Location = tuple[str | int, ...]
"""Path to a node: keys and list indices."""

_INTEGER: Final = re.compile(r"[-+]?[0-9]+")
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_CONSTANTS: Final[Mapping[str, bool | float | None]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file.

    Attributes:
        name: of the file, for messages.
        text: as it was written.
        data: dicts, lists, str, int, float, bool, None.
        places: ``line:column`` of every value by its location.
        keys: ``line:column`` of every mapping key by the location of its value.
    """

    name: str
    text: str
    data: Any
    places: dict[Location, str]
    keys: dict[Location, str]

    def place(self, location: Location, *, key: bool = False) -> str:
        """``file:line:column`` of a value (or of its key), or of what encloses it."""
        for end in range(len(location), -1, -1):
            where = location[:end]
            found = self.keys.get(where) if key else None
            found = found or self.places.get(where)
            if found is not None:
                return found if found.startswith("--") else f"{self.name}:{found}"
        return self.name

    def line(self, location: Location) -> int | None:
        """Line of a value, if it stands in the file."""
        found = self.places.get(location, "")
        return int(found.partition(":")[0]) if found[:1].isdigit() else None


def key_path(location: Location) -> str:
    """``attacks[1].steps``."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def read_document(path: Path, name: str | None = None) -> Document:
    """Read a file.

    Args:
        path: of the file.
        name: how messages call it; its path by default.

    Raises:
        ScenarioError: if it cannot be read or parsed, or uses what is refused.
    """
    name = name or str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _wrong(name, f"cannot be read: {error.strerror or error}") from error
    if len(raw) > MAX_BYTES:
        raise _wrong(name, "is larger than 1 MiB; a scenario is a few kilobytes")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise _wrong(f"{name}:{line}", "is not UTF-8 text; save it as UTF-8") from error
    return parse_document(text, name)


def parse_document(text: str, name: str) -> Document:
    """Parse YAML text; see `read_document`."""
    try:
        _refuse(text, name)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise _wrong(place, f"is not YAML: {what}", "check the indentation and quotes") from error
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise _wrong(name, f"is not YAML: {first}") from error
    if root is None:
        raise _wrong(name, "is empty; start with: redteam init")
    document = Document(name, text, None, {}, {})
    data = _Builder(document).build(root, ())
    return Document(name, text, data, document.places, document.keys)


def parse_value(text: str) -> Any:  # noqa: ANN401 - any plain data
    """One value as the command line gives it, by the same rules."""
    return parse_document(text, "--set").data if text.strip() else None


def _wrong(place: str, message: str, hint: str = "") -> ScenarioError:
    return ScenarioError([Problem(place, "", message, hint=hint)])


def _refuse(text: str, name: str) -> None:
    """Look at the events only, before anything is built from them."""
    depth = nodes = documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        place = f"{name}:{_mark(event)}"
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _wrong(place, "starts a second document; a scenario is one document")
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            raise _wrong(
                place,
                f"anchors and aliases (&{anchor}, *{anchor}) are not supported",
                "write the value out where it is used",
            )
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise _wrong(
                place, f"tags ({tag}) are not supported", "write a plain value without the tag"
            )
        if isinstance(event, yaml.ScalarEvent) and not _whole(event.value):
            raise _wrong(place, "holds half a character (a lone surrogate)", "write it whole")
        nodes += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH or nodes > MAX_NODES:
            raise _wrong(
                place, f"is nested deeper than {MAX_DEPTH} or holds more than {MAX_NODES:,} values"
            )


def _whole(text: str) -> bool:
    """Whether a text can be written down: a lone surrogate is half a character."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


@dataclass(frozen=True, slots=True)
class _Builder:
    """Turns nodes into plain data, noting where each stood."""

    document: Document

    def build(self, node: yaml.Node, where: Location) -> Any:  # noqa: ANN401
        self.document.places[where] = _mark(node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, where)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*where, index)) for index, item in enumerate(node.value)]
        return _scalar(node)

    def _mapping(self, node: yaml.MappingNode, where: Location) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = f"{self.document.name}:{_mark(key_node)}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise _wrong(place, "a list or mapping cannot be a key")
            key = str(key_node.value)
            location = (*where, key)
            if key in found:
                raise ScenarioError(
                    [
                        Problem(
                            place,
                            key_path(location),
                            f"duplicate key; it stands at line {self.document.keys[location]} too",
                            hint="keep one of them",
                        )
                    ]
                )
            self.document.keys[location] = _mark(key_node)
            found[key] = self.build(value_node, location)
        return found


def _mark(node: yaml.Node | yaml.Event) -> str:
    mark = node.start_mark
    return "1:1" if mark is None else f"{mark.line + 1}:{mark.column + 1}"


def _scalar(node: yaml.Node) -> str | int | float | bool | None:
    text = str(node.value)
    if getattr(node, "style", None) is not None:  # quoted or a block: a text
        return text
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text) if len(text) < 20 else text
    return float(text) if _FLOAT.fullmatch(text) else text


def override(document: Document, assignment: str) -> Document:
    """Apply one ``--set key=value`` to a document.

    A key is a dotted path; a list item is named by its index, its `name`, or its `type`.

    Raises:
        ScenarioError: if the path leads nowhere or to several places.
    """
    key, equals, text = assignment.partition("=")
    shown = f"--set {key}"
    if not equals or not key.strip():
        raise _wrong("--set", f"{assignment!r} is not key=value", "e.g. --set attacks.caa.steps=50")
    parts = key.strip().split(".")
    location: Location = ()
    node = document.data
    for part in parts[:-1]:
        step = _step(node, part, location, shown)
        if isinstance(node, dict) and step not in node:
            node[step] = {}
        node, location = node[step], (*location, step)
    last = _step(node, parts[-1], location, shown)
    location = (*location, last)
    node[last] = parse_value(text)
    document.places[location] = document.keys[location] = shown
    for place in [place for place in document.places if place[: len(location)] == location]:
        document.places[place] = shown
    return document


def _step(node: Any, part: str, location: Location, shown: str) -> Any:  # noqa: ANN401
    """The key or index that a part of a dotted path means."""
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise _wrong(shown, f"{key_path(location) or 'the scenario'} holds no {part!r}")
    if re.fullmatch("[0-9]{1,9}", part) and int(part) < len(node):
        return int(part)
    for label in ("name", "type"):
        found = [
            i for i, item in enumerate(node) if isinstance(item, dict) and item.get(label) == part
        ]
        if len(found) == 1:
            return found[0]
        if found:
            raise _wrong(
                shown,
                f"{part!r} is the {label} of {len(found)} items of {key_path(location)}",
                f"use an index: {', '.join(map(str, found))}",
            )
    names = [str(item.get("name", item.get("type"))) for item in node if isinstance(item, dict)]
    raise _wrong(
        shown,
        f"{key_path(location)} has no item {part!r}; it has {', '.join(names) or 'none'}",
        nearest(part, names),
    )
