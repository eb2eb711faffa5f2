"""The catalogue: every line leads somewhere, and options are read right without importing."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest

from redteam import catalog
from redteam.annotations import describe
from redteam.catalog import KINDS, Entry, Kind, entries, find, load
from redteam.errors import CatalogError
from redteam.signature import REQUIRED, signature
from redteam.validation import options_model

EVERYTHING = [
    pytest.param(entry, id=f"{kind} {name}")
    for kind in KINDS
    for name, entry in entries(kind).items()
]


@pytest.mark.parametrize("entry", EVERYTHING)
def test_the_source_says_what_the_class_says(entry: Entry) -> None:
    cls = load(entry)
    read = signature(entry)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls, include_extras=True)
    assert list(read.options) == list(fields)
    for name, option in read.options.items():
        assert option.annotation == hints[name], name
        assert option.default == fields[name].default, name
        assert option.help, f"{name} is not described in the docstring"
    assert read.summary
    assert read.facts["name"] == cls.name == entry.name
    if entry.kind == "attacks":
        assert read.facts["knowledge"] == cls.knowledge.value


@pytest.mark.parametrize("entry", EVERYTHING)
def test_defaults_are_within_their_own_bounds(entry: Entry) -> None:
    given: dict[str, object] = {"type": entry.name}
    examples = {"model": "x", "path": "x", "layer": 2, "stages": ("fastv",), "stack": ("sid",)}
    for option in signature(entry).options.values():
        if option.default is REQUIRED:
            given[option.name] = examples[option.name]
    model = options_model(entry)
    values = model.model_validate(given).model_dump()
    assert model.model_validate({k: v for k, v in values.items() if k != "name"} | given)


def test_an_unknown_name_lists_what_exists() -> None:
    with pytest.raises(CatalogError, match=r"noise, pgd, .*; did you mean 'noise'"):
        find("attacks", "nois")


def test_annotations_in_words() -> None:
    options = signature(find("compressors", "fastv")).options
    assert describe(options["layer"].annotation) == "an integer ≥ 1"
    assert describe(options["retention"].annotation) == "a number > 0 and ≤ 1, or null"
    assert describe(options["positions"].annotation) == "'keep' or 'reindex'"
    assert describe(tuple[float, ...]) == "a list of a number"


SOURCES = {
    "alias": ("Norm = int\n", "    norm: Norm = 3\n", "'Norm': an annotation may use int"),
    "call": ("", "    norm: open('x') = 3\n", "an annotation may use"),
    "default": ("", "    steps: int = 3 + len('x')\n", "a default must be a literal"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_what_cannot_be_read_is_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import attacks

    head, body, message = SOURCES[case]
    (tmp_path / "odd.py").write_text(
        f"from dataclasses import dataclass\n{head}@dataclass(frozen=True)\nclass Odd:\n{body}"
    )
    monkeypatch.setattr(attacks, "__path__", [*attacks.__path__, str(tmp_path)])
    with pytest.raises(CatalogError, match=r"odd\.py:\d+: Odd: .*") as caught:
        signature(Entry("attacks", case, "attacks.odd:Odd"))
    signature.cache_clear()
    assert message in str(caught.value)


@dataclasses.dataclass
class FakePoint:
    name: str
    value: str
    dist: None = None


@pytest.mark.parametrize("kind", KINDS)
def test_two_packages_may_not_claim_one_name(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(iter(catalog.BUILTIN[kind]))
    monkeypatch.setattr(catalog, "entry_points", lambda group: [FakePoint(name, "other:Thing")])
    with pytest.raises(CatalogError, match="is claimed by other:Thing"):
        entries(kind)


def test_a_plugin_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [FakePoint("ghost", "no_such_module:Ghost")]
    monkeypatch.setattr(catalog, "entry_points", lambda group: points)
    with pytest.raises(CatalogError, match=r"attack 'ghost'.*no_such_module:Ghost"):
        signature(find("attacks", "ghost"))
