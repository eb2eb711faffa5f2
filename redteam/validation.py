"""From plain data to checked options: pydantic decides, and its findings become `Problem`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from annotated_types import Ge, Gt, Interval, Len, Lt
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from redteam.annotations import contains
from redteam.catalog import Entry, Kind, entries, find, names, of_library, one
from redteam.document import Location
from redteam.errors import CatalogError, nearest
from redteam.findings import Findings, annotation_at, epsilon_hint, shown
from redteam.signature import REQUIRED, signature

_FRACTION: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*/\s*([0-9]+(?:\.[0-9]+)?)\s*")
_STRICT: Final = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def number(value: object) -> object:
    """Turn a fraction such as ``8/255`` into a float, in lists too; leave the rest alone.

    Raises:
        ValueError: for a zero denominator.
    """
    if isinstance(value, list | tuple):
        return type(value)(number(item) for item in value)
    match = _FRACTION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    if float(match[2]) == 0:
        raise ValueError("divides by zero")
    return float(match[1]) / float(match[2])


def _file_name(value: object) -> object:
    if isinstance(value, str) and not NAME.fullmatch(value):
        raise ValueError("cannot be part of a folder name")
    return value


def _label(value: object) -> object:
    if isinstance(value, str) and not (0 < len(value.strip()) <= 60 and value.isprintable()):
        raise ValueError("is no label of 1 to 60 printable characters")
    return value


Number = Annotated[float, BeforeValidator(number)]
Epsilon = Annotated[float, Interval(ge=0, le=1), BeforeValidator(number)]
Label = Annotated[str, BeforeValidator(_label)]
Items = Annotated[list[Any], Len(1)]


DRAWS: Final = 20
"""Draws of a random defence in each call of an adaptive attack, unless asked for others."""


@dataclass(frozen=True, slots=True)
class Composed:
    """A method that is made of others of its kind.

    Attributes:
        type: its name in the catalogue.
        key: under which they are listed.
        one: of them, for messages.
        words: what they are, for messages.
    """

    type: str
    key: str
    one: str
    words: str


COMPOSED: Final[Mapping[Kind, Composed]] = {
    "compressors": Composed("pipeline", "stages", "stage", "compressors"),
    "defenses": Composed("stack", "stack", "member", "defences"),
}
"""Of each kind that has one, the method that is a list of others."""


class Gate(BaseModel):
    """A gate as it is written."""

    model_config = _STRICT

    metric: str
    max: Number | None = None
    min: Number | None = None
    where: dict[Literal["target", "compression", "attack", "defense", "epsilon"], Any] = Field(
        default_factory=dict
    )
    confidence: Annotated[float, Gt(0.5), Lt(1)] = 0.95
    allow_unverified: bool = False
    family: Label | None = None
    baseline: str | None = None
    max_increase: Annotated[Number, Ge(0)] | None = None
    max_decrease: Annotated[Number, Ge(0)] | None = None
    name: Label | None = None


BLOCK: Final = 32
"""Samples of a unit of work, unless a scenario says how many."""


class EngineOptions(BaseModel):
    """How a run is executed; results do not depend on it beyond rounding.

    `attack_precision` is the exception: what bfloat16 rounds away decides which image is made.
    """

    model_config = _STRICT

    type: Literal["local", "ray"] = "local"
    batch_size: Literal["auto"] | Annotated[int, Interval(ge=1, le=4096)] = "auto"
    """Pictures at a time; auto begins with what memory is estimated to hold, `BLOCK` at most."""
    device: str = "auto"
    attack_precision: Literal["float32", "bfloat16"] = "float32"
    """Of the passes an attack takes; answers are always given in the target's own precision."""
    workers: Literal["auto"] | Annotated[int, Interval(ge=1, le=4096)] = "auto"
    """Of Ray: processes; auto is one per GPU, or per two CPU cores."""
    address: str | None = None
    """Of Ray: an existing cluster, e.g. ``auto`` or ``ray://host:10001``; None starts one here."""

    @property
    def block(self) -> int:
        """Samples of a unit of work, and most of a batch."""
        return BLOCK if self.batch_size == "auto" else self.batch_size

    @model_validator(mode="after")
    def _only_ray(self) -> EngineOptions:
        given = [name for name in ("workers", "address") if name in self.model_fields_set]
        if self.type == "local" and given:
            raise ValueError(f"{' and '.join(given)} need type: ray")
        return self


class AnswerOptions(BaseModel):
    """How the target answers; greedily in any case."""

    model_config = _STRICT

    max_new_tokens: Annotated[int, Interval(ge=1, le=4096)] = 16


class ChecksOptions(BaseModel):
    """Self-checks that cost something."""

    model_config = _STRICT

    repeat: Annotated[int, Interval(ge=0, le=64)] = 2
    stability: Annotated[int, Interval(ge=0, le=64)] = 2
    points: Annotated[int, Interval(ge=2, le=1000)] = 100
    draws: Annotated[int, Interval(ge=1, le=64)] = 1


class Header(BaseModel):
    """The scenario without the insides of its methods."""

    model_config = _STRICT

    name: Annotated[str, BeforeValidator(_file_name)]
    description: str = ""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    targets: Items
    surrogates: list[Any] = Field(default_factory=list)
    dataset: dict[str, Any]
    calibration: dict[str, Any] | None = None
    compressions: Items
    attacks: Items
    epsilons: list[Epsilon] = Field(default_factory=list)
    defenses: list[Any] = Field(default_factory=list)
    gates: list[Gate] = Field(default_factory=list)
    engine: EngineOptions = EngineOptions()
    answers: AnswerOptions = AnswerOptions()
    checks: ChecksOptions = ChecksOptions()


@dataclass(frozen=True, slots=True)
class Raw:
    """A checked method that has no label yet.

    Attributes:
        kind: of method.
        type: its name in the catalogue.
        options: complete, defaults filled in.
        name: label the user gave; "" if none.
        epsilons: of its own; None to take the scenario's.
        location: in the document.
        adaptive: of an attack: whether it is run anew against each defence, which it knows.
        draws: of a random defence in each of its calls.
    """

    kind: Kind
    type: str
    options: Mapping[str, Any]
    name: str
    epsilons: tuple[float, ...] | None
    location: Location
    adaptive: bool = False
    draws: int = DRAWS


@lru_cache(maxsize=256)
def options_model(entry: Entry) -> type[BaseModel]:
    """The pydantic model of a method's options, and `type`, `name`; of attacks what is theirs too.

    That is `epsilons`, `adaptive` and `draws`.

    Raises:
        CatalogError: if the options cannot be read.
    """
    found = signature(entry)
    fields: dict[str, Any] = {"type": (str, ...), "name": (Label | None, None)}
    if entry.kind == "attacks":
        # An l2 radius has no upper end, so the range depends on an option; it is checked later.
        own = Annotated[list[Annotated[float, Ge(0), BeforeValidator(number)]], Len(1)]
        fields["epsilons"] = (own | None, None)
        fields["adaptive"] = (bool, False)
        fields["draws"] = (Annotated[int, Ge(1)] | None, None)
    for option in found.options.values():
        annotation = option.annotation
        if contains(annotation, float) and not contains(annotation, str):
            annotation = Annotated[annotation, BeforeValidator(number)]
        fields[option.name] = (annotation, ... if option.default is REQUIRED else option.default)
    return create_model(f"{entry.attribute}Options", __config__=_STRICT, **fields)


def check_method(kind: Kind, raw: object, location: Location, findings: Findings) -> Raw | None:
    """Check one entry of a scenario's list; problems go to `findings`."""
    known = entries(kind)
    if not isinstance(raw, dict):
        findings.add(
            location, f"{shown(raw)} is not allowed", allowed="a mapping with a type, or a type"
        )
        return None
    composed = COMPOSED.get(kind)
    if composed and composed.key in raw and raw.get("type", composed.type) == composed.type:
        return _composed(kind, composed, raw, location, findings)
    name, where = raw.get("type"), (*location, "type")
    try:
        entry = known.get(name) or of_library(kind, name) if isinstance(name, str) else None
        if "type" not in raw:
            findings.add(where, "is missing", allowed=", ".join(names(kind)))
        elif entry is None:
            message = f"there is no {one(kind)} {shown(name)}"
            findings.add(
                where, message, allowed=", ".join(names(kind)), hint=nearest(name, names(kind))
            )
        if entry is None or not isinstance(name, str):
            return None
        model = options_model(entry)
    except CatalogError as error:
        findings.add(where, str(error))
        return None
    raw = _without_ours(entry, raw, location, findings)
    try:
        values = model.model_validate(_tuples(raw, model)).model_dump()
    except ValidationError as error:
        findings.pydantic(error, location, lambda inner: annotation_at(model, inner))
        return None
    label, epsilons = values.pop("name"), values.pop("epsilons", None)
    adaptive, draws = values.pop("adaptive", False), values.pop("draws", None)
    del values["type"]
    if draws is not None and not adaptive:
        findings.add(
            (*location, "draws"),
            "draws are of an attack that adapts to random defences",
            hint="add adaptive: true",
        )
    own = tuple(epsilons) if epsilons else None
    found = Raw(kind, name, values, label or "", own, location, adaptive, draws or DRAWS)
    _check_budget(found, findings)
    return found


def _without_ours(
    entry: Entry, raw: Mapping[str, Any], location: Location, findings: Findings
) -> Mapping[str, Any]:
    """The options without parameters of a library's method that follow from the scenario."""
    if not entry.part:
        return raw
    from attacks.library_names import OURS

    for key in OURS.keys() & raw.keys():
        findings.add(
            (*location, key), f"{key!r} follows from the scenario", hint=OURS[key], key=True
        )
    return {key: value for key, value in raw.items() if key not in OURS}


def _composed(
    kind: Kind, what: Composed, raw: Mapping[str, Any], location: Location, findings: Findings
) -> Raw | None:
    """Methods that act together: each is checked like an entry of its own."""
    before = len(findings.problems)
    for key in raw:
        if key not in ("type", "name", what.key):
            findings.add(
                (*location, str(key)),
                f"{shown(key)} is not an option of a list of {what.one}s",
                allowed=f"name and {what.key}; options stand at each {what.one}",
            )
    members, name = raw[what.key], raw.get("name")
    if not isinstance(members, list) or not members:
        findings.add(
            (*location, what.key),
            f"{shown(members)} is not allowed",
            allowed=f"a list of {what.words}, each with a type, in the order they act",
        )
        return None
    if name is not None and (not isinstance(name, str) or not name.strip()):
        findings.add((*location, "name"), f"{shown(name)} is not allowed", allowed="a text")
    if kind == "defenses":
        members = [{"type": one} if isinstance(one, str) else one for one in members]
    parts = [
        check_method(kind, one, (*location, what.key, index), findings)
        for index, one in enumerate(members)
    ]
    for index, part in enumerate(parts):
        inside = (*location, what.key, index)
        if part is not None and part.type == what.type:
            findings.add(inside, f"{what.key} inside {what.key} {_are(what.key)} not allowed")
        if part is not None and part.type == "none":
            findings.add(inside, "none is no defence", hint="list it beside the stack")
    if len(findings.problems) > before:
        return None
    options = {what.key: tuple({"type": part.type, **part.options} for part in parts if part)}
    return Raw(kind, what.type, options, name or "", None, location)


def _are(word: str) -> str:
    return "are" if word.endswith("s") else "is"


def _tuples(raw: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """YAML has lists only; options are tuples."""
    fields = model.model_fields
    return {
        key: tuple(value)
        if isinstance(value, list) and key in fields and key != "epsilons"
        else value
        for key, value in raw.items()
    }


def _check_budget(found: Raw, findings: Findings) -> None:
    """Rules that concern several options at once."""
    options = found.options
    if found.kind == "compressors" and {"retention", "keep_tokens"} <= options.keys():
        given = [key for key in ("retention", "keep_tokens") if options[key] is not None]
        facts = signature(entries(found.kind)[found.type]).facts
        fewest = 0 if facts.get("budget_optional") else 1
        if not fewest <= len(given) <= 1:
            how = "exactly one" if fewest else "at most one"
            findings.add(
                found.location,
                f"gives {' and '.join(given) or 'neither retention nor keep_tokens'}",
                allowed=f"{how} of retention (kept ÷ all, in (0, 1]) and keep_tokens",
            )
    for index, epsilon in enumerate(found.epsilons or ()):
        if epsilon > 1 and options.get("norm") != "l2":
            where = (*found.location, "epsilons", index)
            findings.add(
                where,
                f"{epsilon:g} is not allowed",
                allowed="a number ≥ 0 and ≤ 1, in pixel units of [0, 1]",
                hint=epsilon_hint(where, epsilon),
            )


def check_paths(found: Raw, folder: Path, findings: Findings) -> None:
    """Find out now, not after minutes, that a file is missing."""
    facts = signature(find(found.kind, found.type)).facts
    for option in facts.get("paths", ()):
        value = str(found.options[option])
        if found.options[option] is None:
            continue
        try:
            if (folder / Path(value).expanduser()).exists():
                continue
        except (OSError, RuntimeError) as error:  # too long a name, no such user
            why = error.strerror if isinstance(error, OSError) else error
            findings.add((*found.location, option), f"{value[:60]!r} is no path: {why}")
            continue
        looks_local = value.startswith((".", "/", "~")) or found.kind == "datasets"
        if looks_local:
            findings.add(
                (*found.location, option),
                f"{value!r} does not exist",
                hint=f"paths are relative to the scenario's folder, {folder}",
            )
