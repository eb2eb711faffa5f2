"""The transfer matrix: surrogates × targets, each beside its noise control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_data import cell, manifest, trial

from reports import transfer
from reports.findings import collect
from reports.html import render
from reports.markdown import render_markdown
from reports.metrics import summarise
from reports.records import Cell, Trial
from reports.store import RunStore

A, B = ({"type": "scenes", "checkpoint": f"scenes-{letter}"} for letter in "ab")
SPECS = {"scenes-a": A, "scenes-b": B}


def planned(id: str, target: str, attack: str, **spec: Any) -> Cell:
    surrogates = spec.pop("on", None)
    knowledge = spec.pop("knowledge", "surrogate" if surrogates else "none")
    specs: dict[str, Any] = {"target": SPECS[target], "attack": spec}
    if surrogates:
        specs["surrogates"] = [{"name": name, **SPECS[name]} for name in surrogates]
    return cell(
        id,
        target=target,
        attack=attack,
        knowledge=knowledge,
        knows_compression=knowledge == "white_box",
        spec=specs,
        epsilon=spec.get("epsilon", 8 / 255),
    )


BORDER = {"border": 0.125, "frame": "inside"}
CELLS = [
    planned("t-a", "scenes-a", "t-caa", type="transfer_caa", **BORDER, on=["scenes-b"]),
    planned("t-b", "scenes-b", "t-caa", type="transfer_caa", **BORDER, on=["scenes-a"]),
    planned(
        "n-a", "scenes-a", "from b", type="transfer_caa", **BORDER, on=["scenes-b"],
        surrogates=["scenes-b"],
    ),
    planned(
        "n-b", "scenes-b", "from b", type="transfer_caa", **BORDER, on=["scenes-b"],
        surrogates=["scenes-b"],
    ),
    planned("c-a", "scenes-a", "border noise", type="noise", **BORDER),
    planned("c-b", "scenes-b", "border noise", type="noise", **BORDER),
    planned("u-a", "scenes-a", "weak noise", type="noise", **BORDER),
    planned("x-a", "scenes-a", "noise", type="noise", border=None, frame="inside"),
    planned("w-a", "scenes-a", "caa", type="caa", knowledge="white_box"),
]  # fmt: skip
SHARES = {"t-a": 0.5, "t-b": 0.1, "n-a": 0.4, "n-b": 0.9, "c-a": 0.1, "u-a": 0.0, "x-a": 0.6}


def trials(samples: int) -> list[Trial]:
    """A share of the samples breaks only when compressed; the rest hold."""
    return [
        trial(f"s{i}", "1110" if i < SHARES.get(one.id, 0) * samples else "1111", one.id)
        for one in CELLS
        for i in range(samples)
    ]


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    return summarise(manifest(60, cells=CELLS), trials(60))


def rows(summary: dict[str, Any]) -> dict[str, Any]:
    (table,) = summary["transfer"]["tables"]
    return {row["attack"]: row for row in table["rows"]}


def test_there_is_none_without_surrogates() -> None:
    found = summarise(manifest(1), [trial()])
    assert "transfer" not in found
    assert transfer.transfer([cell()], found["cells"]) is None


def test_rows_are_what_it_was_made_on_and_columns_targets(summary: dict[str, Any]) -> None:
    assert summary["transfer"]["targets"] == ["scenes-a", "scenes-b"]
    assert summary["transfer"]["metrics"] == ["upr", "cae", "csg", "csfr"]
    found = rows(summary)
    assert {name: (row["kind"], row["made_on"]) for name, row in found.items()} == {
        "t-caa": ("transfer", "all but the target"),
        "from b": ("transfer", "scenes-b"),
        "caa": ("white_box", "the target itself"),
    }
    assert found["t-caa"]["cells"]["scenes-b"]["surrogates"] == ["scenes-a"]
    csfr = {target: one["metrics"]["csfr"] for target, one in found["t-caa"]["cells"].items()}
    assert csfr["scenes-a"]["value"] == 0.5
    assert csfr["scenes-a"]["low"] < 0.5 < csfr["scenes-a"]["high"]
    assert csfr["scenes-b"]["value"] == 0.1


def test_a_surrogate_that_is_the_target_is_told(summary: dict[str, Any]) -> None:
    found = rows(summary)
    assert {target: one["own"] for target, one in found["from b"]["cells"].items()} == {
        "scenes-a": False,
        "scenes-b": True,
    }
    assert found["caa"]["cells"]["scenes-a"]["own"]
    assert not found["t-caa"]["cells"]["scenes-a"]["own"]


def test_the_control_is_the_strongest_noise_on_the_same_border(summary: dict[str, Any]) -> None:
    cells = rows(summary)["t-caa"]["cells"]
    assert cells["scenes-a"]["control"]["cell"] == "c-a"
    assert cells["scenes-a"]["control"]["metrics"]["csfr"]["value"] == 0.1
    assert cells["scenes-a"]["beats_control"] == {"cae": True, "csg": True, "csfr": True}
    assert cells["scenes-b"]["beats_control"]["csfr"] is False
    assert rows(summary)["caa"]["cells"]["scenes-a"]["control"] is None


def test_budgets_settings_and_frames_are_tables_of_their_own() -> None:
    added = {"border": 0.125, "frame": "added"}
    cells = [
        CELLS[0],
        planned("t-f", "scenes-a", "t-f", type="transfer_caa", **added, on=["scenes-b"]),
        planned("c-f", "scenes-a", "c-f", type="noise", **added),
        cell("t-e", **{**CELLS[0].model_dump(exclude={"id"}), "epsilon": 16 / 255}),
        cell("t-c", **{**CELLS[0].model_dump(exclude={"id"}), "compression": "visionzip"}),
    ]
    found = summarise(
        manifest(2, cells=cells), [trial(f"s{i}", cell=c.id) for i in (0, 1) for c in cells]
    )["transfer"]["tables"]
    assert [(t["frame"], t["epsilon"], t["compression"]) for t in found] == [
        ("inside", 8 / 255, "fastv"),
        ("added", 8 / 255, "fastv"),
        ("inside", 16 / 255, "fastv"),
        ("inside", 8 / 255, "visionzip"),
    ]
    assert [table["control"] for table in found] == [None, "c-f", None, None]
    assert "unknown" in transfer.sentence(found[0])
    assert "shrunken picture" in transfer.sentence(found[1])
    assert transfer.title(found[1]) == "fastv, ε 8/255, added frame, 0.125 of the shorter side"


def test_the_verdict_names_the_targets_and_says_none(summary: dict[str, Any]) -> None:
    (table,) = summary["transfer"]["tables"]
    first, second = transfer.verdicts(table)
    assert first == (
        "t-caa (made on all but the target): above its noise control, intervals apart, in CSFR on "
        "scenes-a and in CAE on scenes-a."
    )
    assert "in CSFR on scenes-a, scenes-b" in second
    lonely = {**table, "rows": [{**table["rows"][0], "cells": {}}]}
    assert "no target (no control was measured)" in transfer.verdicts(lonely)[0]


def test_pages_show_the_matrix(summary: dict[str, Any], tmp_path: Path) -> None:
    asked = manifest(60, cells=CELLS)
    with RunStore.create(tmp_path / "run", asked, "name: test\n") as store:
        store.append(trials(60))
    store = RunStore.read(tmp_path / "run")
    found = collect(store)
    text = render_markdown(asked, summary, found)
    assert "### Transfer" in text
    assert "configuration unknown" in text
    assert "0.50 \\[0.38, 0.62\\] (noise 0.10 \\[0.05, 0.20\\])" in text
    assert text.count("target among its surrogates") == 4  # once for each metric of one cell
    assert "not tried" in text
    page = render(store, summary, found)
    assert 'id="transfer"' in page
    assert page.count('class="wide warm"') == 1
    assert "all but the target" in page
    assert page.count("made on it too") == 1
    assert 'class="num w8"' in page  # 0.9 on its own surrogate
