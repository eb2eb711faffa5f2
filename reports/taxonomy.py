"""Where what redteam measures stands in public taxonomies.

The mapping is ours: the bodies named neither made nor endorsed it. Identifiers move between
editions, so ``taxonomy.json``, the one place that holds them, names the edition each was read from
and counts its own changes in ``version``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from reports.records import Cell

_DATA: Final[dict[str, Any]] = json.loads(
    Path(__file__).with_name("taxonomy.json").read_text(encoding="utf-8")
)

VERSION: Final[int] = _DATA["version"]
"""Of the table; counted up whenever an entry changes."""

NOTE: Final[str] = _DATA["note"]
"""What the mapping is worth; stands beside it wherever it is shown."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """A taxonomy.

    Attributes:
        key: short name in ``taxonomy.json``.
        name: without its edition.
        edition: that the entries were read from.
        title: name and edition in one.
        organization: whose it is.
        url: where it is published.
    """

    key: str
    name: str
    edition: str
    title: str
    organization: str
    url: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One identifier of a taxonomy.

    Attributes:
        scheme: the taxonomy and its edition.
        id: identifier in it.
        title: its name there.
        relation: how this run relates to it.
        key: of the `Scheme`.
    """

    scheme: str
    id: str
    title: str
    relation: str
    key: str = ""


SCHEMES: Final = {key: Scheme(key=key, **fields) for key, fields in _DATA["schemes"].items()}
"""The taxonomies by key, in the order in which they are shown."""


def entries(cells: Iterable[Cell]) -> list[Entry]:
    """Entries that apply to a run, by the knowledge and the type of its attacks."""
    every = list(cells)
    knowledge = {cell.knowledge for cell in every}
    attacks = {str((cell.spec.get("attack") or {}).get("type")) for cell in every}
    found = [
        Entry(SCHEMES[one["scheme"]].title, one["id"], one["title"], one["relation"], one["scheme"])
        for one in _DATA["entries"]
        if _meets(one, "knowledge", knowledge) and _meets(one, "attacks", attacks)
    ]
    order = list(SCHEMES)
    return sorted(found, key=lambda entry: (order.index(entry.key), entry.id))


def _meets(entry: dict[str, Any], key: str, found: set[str]) -> bool:
    """Whether a condition holds; an entry without it applies always."""
    return key not in entry or not found.isdisjoint(entry[key])
