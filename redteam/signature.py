"""The options of a method, read from its source without importing it, so without torch.

A method class is a frozen dataclass whose fields are its options, annotated with plain types,
``Literal``, ``tuple`` and bounds of annotated_types, with literal defaults. Its module is parsed
with `ast`, bases in our own packages are followed, and annotations are evaluated by a small
interpreter that knows these words and nothing else. Classes of other packages are imported.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import annotated_types

from redteam.catalog import Entry, load, one
from redteam.errors import CatalogError

OURS: Final = frozenset({"redteam", "attacks", "defenses", "targets"})
REQUIRED: Final = dataclasses.MISSING
"""Default of an option that has none."""
_WORDS: Final[Mapping[str, Any]] = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "None": None,
    "Literal": Literal,
    "tuple": tuple,
    "Annotated": Annotated,
    "Ge": annotated_types.Ge,
    "Gt": annotated_types.Gt,
    "Le": annotated_types.Le,
    "Lt": annotated_types.Lt,
    "Interval": annotated_types.Interval,
}


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a method.

    Attributes:
        name: as scenarios write it.
        annotation: its type with bounds.
        default: `REQUIRED` if there is none.
        help: from the ``Args`` of the class.
    """

    name: str
    annotation: Any
    default: Any
    help: str = ""


@dataclass(frozen=True, slots=True)
class Signature:
    """What can be known of a method without running it.

    Attributes:
        entry: its line in the catalogue.
        options: by name, in order of declaration.
        summary: first sentence of its docstring.
        facts: class variables with literal or enum values, enums by lower-case member name.
    """

    entry: Entry
    options: Mapping[str, Option]
    summary: str
    facts: Mapping[str, Any]


@lru_cache(maxsize=256)
def signature(entry: Entry) -> Signature:
    """Read the signature of a catalogue entry.

    Raises:
        CatalogError: if it is not a dataclass written as this module expects.
    """
    if entry.module.partition(".")[0] not in OURS:
        return _imported(entry)
    if entry.part:
        return _of_library(entry)
    found = _Class.find(entry.module, entry.attribute)
    docs = inspect.cleandoc(ast.get_docstring(found.node) or "")
    helps = argument_help(docs)
    fields = found.fields()
    options = {
        name: Option(name, annotation, default, helps.get(name, ""))
        for name, (annotation, default) in fields.items()
    }
    return Signature(entry, options, _summary(docs), found.facts())


def _of_library(entry: Entry) -> Signature:
    """The signature of a library's method: our options of all of them, and its own parameters.

    Raises:
        CatalogError: the library is not installed.
    """
    from attacks.errors import AttackError
    from attacks.libraries import load_class, parameters
    from attacks.library_names import LIBRARIES

    found = _Class.find(entry.module, entry.attribute)
    helps = argument_help(inspect.cleandoc(ast.get_docstring(found.node) or ""))
    options = {
        name: Option(name, annotation, default, helps.get(name, ""))
        for name, (annotation, default) in found.fields().items()
        if name not in ("attack", "params")
    }
    library = LIBRARIES[entry.name.partition(".")[0]]
    if library.needs(entry.part).value != "white_box":
        del options["path"]  # it asks the deployed target, or nothing
    try:
        docs = inspect.getdoc(load_class(library, entry.part)) or ""
        for one_of in parameters(library.name, entry.part).values():
            options[one_of.name] = Option(
                one_of.name, one_of.annotation, one_of.default, one_of.help
            )
    except AttackError as error:
        raise CatalogError(str(error)) from error
    facts = {**found.facts(), "name": entry.name, "knowledge": library.needs(entry.part).value}
    return Signature(entry, options, _summary(docs), facts)


def _imported(entry: Entry) -> Signature:
    """The signature of a class of another package, by importing it."""
    cls = load(entry)
    if not dataclasses.is_dataclass(cls):
        raise CatalogError(
            f"{one(entry.kind)} {entry.name!r} ({entry.value}) is not a dataclass; declare it "
            "@dataclass(frozen=True, kw_only=True) with its options as fields"
        )
    docs = inspect.cleandoc(cls.__doc__ or "")
    hints, helps = typing.get_type_hints(cls, include_extras=True), argument_help(docs)
    options = {
        field.name: Option(field.name, hints[field.name], field.default, helps.get(field.name, ""))
        for field in dataclasses.fields(cls)
    }
    facts = {
        name: value.name.lower() if isinstance(value, Enum) else value
        for name, value in inspect.getmembers(cls)
        if not name.startswith("_") and isinstance(value, Enum | str | tuple | int | float | bool)
    }
    return Signature(entry, options, _summary(docs), facts)


def _summary(docs: str) -> str:
    return " ".join(docs.partition("\n\n")[0].split())


_ARGUMENT: Final = re.compile(r"^ {4}(\w+): (.*)$")


def argument_help(docs: str) -> dict[str, str]:
    """The ``Args`` section of a Google docstring: name → text on one line."""
    _, _, section = docs.partition("\nArgs:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        match = _ARGUMENT.match(line)
        if match:
            name = match[1]
            found[name] = match[2].strip()
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found


@dataclass(frozen=True, slots=True)
class _Class:
    """A class definition in the source of one of our modules."""

    module: str
    path: Path
    node: ast.ClassDef
    imports: Mapping[str, tuple[str, str]]
    classes: Mapping[str, ast.ClassDef]

    @classmethod
    def find(cls, module: str, name: str) -> _Class:
        """Parse a module and find a class in it."""
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise CatalogError(f"module {module} of {module}:{name} does not exist")
        path = Path(spec.origin)
        tree = _parsed(path)
        imports = {
            (alias.asname or alias.name): (node.module or "", alias.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.level == 0
            for alias in node.names
        }
        classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        if name not in classes:
            raise CatalogError(f"module {module} ({path.name}) defines no class {name}")
        return cls(module, path, classes[name], imports, classes)

    def bases(self) -> list[_Class]:
        """Bases that are classes of ours, in order."""
        found = []
        for base in self.node.bases:
            name = base.id if isinstance(base, ast.Name) else ""
            if name in self.classes:
                found.append(_Class.find(self.module, name))
            elif name in self.imports:
                module, original = self.imports[name]
                if module.partition(".")[0] in OURS:
                    found.append(_Class.find(module, original))
        return found

    def is_dataclass(self) -> bool:
        """Whether it has the decorator; only then do its annotations make fields."""
        for decorator in self.node.decorator_list:
            target = decorator.func if isinstance(decorator, ast.Call) else decorator
            if getattr(target, "id", getattr(target, "attr", "")) == "dataclass":
                return True
        return False

    def fields(self) -> dict[str, tuple[Any, Any]]:
        """Name → (annotation, default), inherited ones first, as dataclasses order them."""
        found: dict[str, tuple[Any, Any]] = {}
        for base in reversed(self.bases()):
            found |= base.fields()
        if not self.is_dataclass():
            return found
        for node in self.node.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                if _is_class_variable(node.annotation):
                    continue
                default = REQUIRED if node.value is None else self._literal(node.value)
                found[node.target.id] = (self._annotation(node.annotation), default)
        return found

    def facts(self) -> dict[str, Any]:
        """Class variables with values that can be read."""
        found: dict[str, Any] = {}
        for base in reversed(self.bases()):
            found |= base.facts()
        for node in self.node.body:
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and _is_class_variable(node.annotation)
                and node.value is not None
            ):
                if isinstance(node.value, ast.Attribute):
                    found[node.target.id] = node.value.attr.lower()
                else:
                    found[node.target.id] = self._literal(node.value)
        return found

    def _literal(self, node: ast.expr) -> Any:  # noqa: ANN401
        try:
            return ast.literal_eval(node)
        except ValueError as error:
            raise self._refused(node, "a default must be a literal") from error

    def _annotation(self, node: ast.expr) -> Any:  # noqa: ANN401
        """Evaluate an annotation that uses the allowed words only."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name) if name in _WORDS:
                return _WORDS[name]
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)):
                return -value  # type: ignore[operator]  # a literal number
            case ast.Tuple(elts=elements):
                return tuple(self._annotation(element) for element in elements)
            case ast.BinOp(op=ast.BitOr(), left=left, right=right):
                return typing.Union[self._annotation(left), self._annotation(right)]  # noqa: UP007
            case ast.Subscript(value=word, slice=inner):
                return self._annotation(word)[self._annotation(inner)]
            case ast.Call(func=word, args=args, keywords=keywords):
                named = {str(k.arg): self._annotation(k.value) for k in keywords}
                return self._annotation(word)(*map(self._annotation, args), **named)
        raise self._refused(
            node,
            f"an annotation may use {', '.join(_WORDS)} only; write it out, without aliases",
        )

    def _refused(self, node: ast.expr, why: str) -> CatalogError:
        return CatalogError(
            f"{self.path.name}:{node.lineno}: {self.node.name}: {ast.unparse(node)!r}: {why}"
        )


@lru_cache(maxsize=128)
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


def _is_class_variable(annotation: ast.expr) -> bool:
    return ast.unparse(annotation).startswith(("ClassVar", "typing.ClassVar"))
