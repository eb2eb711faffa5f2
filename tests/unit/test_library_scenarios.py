"""Attacks of libraries in scenarios: names, their own parameters, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from attacks import TorchAttack
from attacks.libraries import parameters
from attacks.library_names import LIBRARIES, Library
from redteam.catalog import find, load, names
from redteam.errors import CatalogError, ScenarioError, UsageError
from redteam.output import show_listing
from redteam.plan import make_plan
from redteam.scenario import Scenario, load_scenario
from redteam.signature import signature
from targets.base import Knowledge

HEAD = """\
name: libraries
targets: [{type: scenes}]
dataset: {type: scenes, samples: 4}
compressions: [{type: fastv, layer: 2, retention: 0.25}, {type: visionzip, retention: 0.25}]
epsilons: [8/255]
attacks:
"""


def read(folder: Path, *attacks: str) -> Scenario:
    path = folder / "bad.yaml"
    path.write_text(HEAD + "".join(f"  - {{{one}}}\n" for one in attacks), encoding="utf-8")
    return load_scenario(path)


def problem(folder: Path, attack: str) -> str:
    with pytest.raises(ScenarioError) as caught:
        read(folder, attack)
    return str(caught.value)


def need(library: str) -> None:
    found = LIBRARIES[library]
    pytest.importorskip(found.module, reason=f"{found.title} is not installed: {found.install}")


def test_a_scenario_gives_an_attack_its_own_parameters(tmp_path: Path) -> None:
    need("torchattacks")
    scenario = read(
        tmp_path,
        "type: torchattacks.MIFGSM, steps: 3, alpha: 2/255",
        "type: torchattacks.Pixle, x_dimensions: [0.1, 4]",
    )
    first, second = scenario.attacks
    assert first.options == {
        **{"path": "full", "norm": "linf", "alpha": 2 / 255, "steps": 3, "decay": 1.0}
    }
    assert first.create() == TorchAttack(
        attack="MIFGSM", params=(("alpha", 2 / 255), ("steps", 3), ("decay", 1.0))
    )
    assert dict(second.create().params)["x_dimensions"] == (0.1, 4)
    assert "path" not in second.options, "it asks the deployed target, so it has no choice"
    assert first.signature.facts["knowledge"] == "white_box"
    assert second.signature.facts["knowledge"] == "scores"


def test_labels_tell_two_of_one_kind_apart(tmp_path: Path) -> None:
    need("torchattacks")
    attacks = ["type: torchattacks.PGD, steps: 4", "type: torchattacks.PGD, path: compressed"]
    labels = [one.label for one in read(tmp_path, *attacks).attacks]
    assert labels == ["torchattacks.PGD full steps=4", "torchattacks.PGD compressed steps=10"]


def test_a_plan_shares_what_does_not_know_the_compressor(tmp_path: Path) -> None:
    need("torchattacks")
    attacks = [f"type: torchattacks.{one}" for one in ("MIFGSM", "Square", "GN")]
    plan = make_plan(read(tmp_path, *attacks))
    found = [(group.attack.label.split(".")[1], len(group.cells)) for group in plan.groups]
    assert found == [("MIFGSM", 2), ("Square", 1), ("Square", 1), ("GN", 2)]
    knowledge = {group.cells[0].cell.knowledge for group in plan.groups}
    assert knowledge == {Knowledge.WHITE_BOX, Knowledge.SCORES, Knowledge.NONE}
    assert [group.queries for group in plan.groups] == [0, 5000, 5000, 0]


REFUSED = {
    "key": (
        "type: torchattacks.MIFGSM, step: 3",
        "allowed: type, name, epsilons, adaptive, draws, path, norm",
    ),
    "near": ("type: torchattacks.MIFGSM, step: 3", "did you mean 'steps'?"),
    "eps": ("type: torchattacks.MIFGSM, eps: 3", "the budget is the scenario's: epsilons: [8/255]"),
    "place": ("type: torchattacks.MIFGSM, eps: 3", "bad.yaml:7:33: attacks[0].eps: 'eps' follows"),
    "value": ("type: torchattacks.MIFGSM, alpha: -1", "-1 is not allowed; allowed: a number ≥ 0"),
    "word": (
        "type: torchattacks.MIFGSM, steps: many",
        "'many' is not allowed; allowed: an int",
    ),
    "attack": ("type: torchattacks.MIFGMS", "torchattacks has no attack 'MIFGMS'; allowed: APGD"),
    "unsuitable": ("type: torchattacks.LGV", "not offered: it trains the target's weights"),
    "path": ("type: torchattacks.Square, path: full", "attacks[0].path: unknown key"),
    "library": ("type: torchattack.PGD", "there is no attack 'torchattack.PGD'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    need("torchattacks")
    attack, message = REFUSED[case]
    assert message in problem(tmp_path, attack)


def test_a_norm_of_its_own_is_asked_for_before_anything_runs(tmp_path: Path) -> None:
    need("torchattacks")
    with pytest.raises(ScenarioError, match=r"attacks\[0\]: .*works in l2 only.*write norm: l2"):
        make_plan(read(tmp_path, "type: torchattacks.PGDL2"))
    make_plan(read(tmp_path, "type: torchattacks.PGDL2, norm: l2, epsilons: [2]"))


@pytest.mark.parametrize("library", list(LIBRARIES))
def test_a_missing_library_is_named_with_the_command(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = LIBRARIES[library]
    monkeypatch.setitem(sys.modules, found.module, None)
    for cache in (parameters, signature):
        cache.cache_clear()  # type: ignore[attr-defined]
    text = problem(tmp_path, f"type: {library}.{next(iter(found.offered))}")
    assert "bad.yaml:7:12: attacks[0].type" in text
    assert found.install in text


def test_the_catalogue_names_a_library_as_one() -> None:
    assert names("attacks")[-2:] == ["torchattacks.*", "art.*"]
    entry = find("attacks", "torchattacks.PGD")
    assert entry.part == "PGD"
    assert load(entry)() == TorchAttack()
    with pytest.raises(CatalogError, match=r"art\.DPatch is not offered"):
        find("attacks", "art.DPatch")
    with pytest.raises(CatalogError, match=r"there is no compressor 'torchattacks\.PGD'"):
        find("compressors", "torchattacks.PGD")


@pytest.mark.parametrize("library", list(LIBRARIES.values()), ids=lambda one: one.name)
def test_listing_a_library(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    found = library
    show_listing("attacks", None, as_json=False)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith(f"{found.name}.*")]
    assert f"{len(found.offered)} attacks of {found.title} {found.version}" in line
    show_listing("attacks", found.name, as_json=False)
    text = capsys.readouterr().out
    assert len(text.splitlines()) == len(found.offered) + len(found.unsuitable)
    lines = {line.partition(" ")[0]: line for line in text.splitlines()}
    for name, reason in found.unsuitable.items():
        assert lines[f"{found.name}.{name}"].endswith(f"  not offered: {reason}")
    for name, needs in found.offered.items():
        assert f" {needs.value} " in lines[f"{found.name}.{name}"]


def test_listing_one_attack(capsys: pytest.CaptureFixture[str]) -> None:
    need("torchattacks")
    show_listing("attacks", "torchattacks.EADL1", as_json=False)
    text = capsys.readouterr().out
    assert "max_iterations: an integer ≥ 10; default 100" in text
    assert "number of iterations" in text
    with pytest.raises(UsageError, match=r"there is no 'foo\.bar' among attacks"):
        show_listing("attacks", "foo.bar", as_json=False)


@pytest.mark.parametrize("library", list(LIBRARIES.values()), ids=lambda one: one.name)
def test_the_page_lists_what_works_and_why_the_rest_does_not(library: Library) -> None:
    page = (Path(__file__).parents[2] / "docs" / "attacks.md").read_text(encoding="utf-8")
    section = page.split(f"### `{library.name}.*`")[1].split("\n##")[0]
    rows = [row.strip("|").split("|") for row in section.splitlines() if row.startswith("| ")]
    found = {name: first.strip(" `") for first, rest in rows[1:] for name in rest.split()}
    found.pop("attacks")
    assert found == {**library.offered, **library.unsuitable}
