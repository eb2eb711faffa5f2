"""Transfer attacks as a matrix: what was made on which models, and what it does to which target.

An attack with knowledge ``surrogate`` sees neither the target nor its compression, so its result is
a row of targets. Beside each stands noise in the same part of the picture at the same budget:
a perturbed border may hurt by itself. Attacks that know the target close the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from reports.marks import defense_text, worst
from reports.records import Cell
from reports.text import epsilon_text, number, plain

METRICS: Final = ("upr", "cae", "csg", "csfr")
"""Rows of the matrix: what is kept of the full path, and what is lost when compressed."""
_KNOWING: Final = frozenset({"white_box", "compressed"})
OTHERS: Final = "all but the target"

Entry = Mapping[str, Any]
"""A cell of summary.json."""


def transfer(cells: Sequence[Cell], entries: Sequence[Entry]) -> dict[str, Any] | None:
    """The key ``transfer`` of summary.json; None without an attack made on surrogates.

    Args:
        cells: of the manifest.
        entries: the same cells as in summary.json, with their metrics.
    """
    made = [cell for cell in cells if cell.knowledge == "surrogate"]
    if not made:
        return None
    by_id = {entry["id"]: entry for entry in entries}
    tables: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in made:
        tables.setdefault(_table(cell), []).append(cell)
    return {
        "targets": list(dict.fromkeys(cell.target for cell in made)),
        "metrics": list(METRICS),
        "tables": [_matrix(key, members, cells, by_id) for key, members in tables.items()],
    }


def _table(cell: Cell) -> tuple[Any, ...]:
    """Cells that can be compared: one setting, one budget, one part of the picture."""
    return (cell.compression, cell.defense, round(cell.epsilon, 9), *_area(cell))


def _area(cell: Cell) -> tuple[Any, Any]:
    """Width and kind of the border an attack is kept to; None, None for the whole picture."""
    options = _options(cell)
    border = options.get("border")
    return (border, None) if border is None else (border, options.get("frame", "inside"))


def _options(cell: Cell) -> Mapping[str, Any]:
    found = cell.spec.get("attack")
    return found if isinstance(found, Mapping) else {}


def _matrix(
    key: tuple[Any, ...], made: Sequence[Cell], cells: Sequence[Cell], by_id: Mapping[str, Entry]
) -> dict[str, Any]:
    compression, defense, epsilon, border, frame = key
    same = [
        cell
        for cell in cells
        if (cell.compression, cell.defense) == (compression, defense)
        if abs(cell.epsilon - epsilon) < 1e-6
    ]
    controls: dict[str, Cell] = {}
    for cell in same:
        if cell.knowledge == "none" and _area(cell) == (border, frame):
            strongest = controls.get(cell.target, cell)
            hurts = [_damage(by_id[one.id]) for one in (cell, strongest)]
            controls[cell.target] = cell if hurts[0] > hurts[1] else strongest
    knowing = [cell for cell in same if cell.knowledge in _KNOWING]
    rows = [
        *(_row("transfer", members, controls, by_id) for members in _by_attack(made)),
        *(_row("white_box", members, {}, by_id) for members in _by_attack(knowing)),
    ]
    return {
        "compression": compression,
        "defense": defense,
        "badge": worst(by_id[cell.id].get("badge", "") for cell in same),
        "epsilon": made[0].epsilon,
        "border": border,
        "frame": frame,
        "control": next((cell.attack for cell in controls.values()), None),
        "rows": rows,
    }


def _damage(entry: Entry) -> float:
    """By which controls of one kind are compared: accuracy lost when compressed."""
    value = entry["metrics"]["cae"]["value"]
    return 0.0 if value is None else float(value)


def _by_attack(cells: Iterable[Cell]) -> list[list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.attack, []).append(cell)
    return list(found.values())


def _row(
    kind: str, members: Sequence[Cell], controls: Mapping[str, Cell], by_id: Mapping[str, Entry]
) -> dict[str, Any]:
    named = _options(members[0]).get("surrogates") if kind == "transfer" else None
    return {
        "kind": kind,
        "attack": members[0].attack,
        "made_on": ", ".join(map(str, named)) if named else _generally(kind),
        "cells": {
            cell.target: _entry(kind, cell, controls.get(cell.target), by_id) for cell in members
        },
    }


def _generally(kind: str) -> str:
    return OTHERS if kind == "transfer" else "the target itself"


def _entry(
    kind: str, cell: Cell, control: Cell | None, by_id: Mapping[str, Entry]
) -> dict[str, Any]:
    mine = by_id[cell.id]["metrics"]
    theirs = by_id[control.id]["metrics"] if control is not None else None
    surrogates = [one for one in cell.spec.get("surrogates", ()) if isinstance(one, Mapping)]
    target = cell.spec.get("target")
    return {
        "cell": cell.id,
        "surrogates": [str(one.get("name", "")) for one in surrogates],
        # One of its surrogates is the very model it is tried on: no transfer, but an upper end.
        "own": kind == "white_box"
        or any({k: v for k, v in one.items() if k != "name"} == target for one in surrogates),
        "n": by_id[cell.id]["n"],
        "metrics": {name: mine[name] for name in METRICS},
        "control": None
        if control is None or theirs is None
        else {"cell": control.id, "metrics": {name: theirs[name] for name in METRICS}},
        "beats_control": None if theirs is None else {
            name: _above(mine[name], theirs[name]) for name in METRICS if name != "upr"
        },
    }  # fmt: skip


def _above(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool | None:
    """Whether the whole interval lies above the control's; None where there is none."""
    if mine["low"] is None or theirs["high"] is None:
        return None
    return bool(mine["low"] > theirs["high"])


def title(table: Mapping[str, Any]) -> str:
    """Setting, budget and place of a table."""
    parts = [plain(table["compression"]), f"ε {epsilon_text(table['epsilon'])}"]
    if defense_text(table):
        parts.append(defense_text(table))
    if table["border"] is not None:
        kind = "added frame" if table["frame"] == "added" else "border inside the picture"
        parts.append(f"{kind}, {number(table['border'])} of the shorter side")
    return ", ".join(parts)


def sentence(table: Mapping[str, Any]) -> str:
    """What a table is about, in words."""
    where = {
        "inside": "the outermost pixels of the picture",
        "added": "a grey frame added around the shrunken picture; the budget counts from that "
        "framed picture, and shrinking alone may cost answers",
        None: "the whole picture",
    }[table["frame"]]
    return (
        "Made on other models, without a question to the target; target and compression "
        f"configuration unknown. What moves: {where}."
    )


def verdicts(table: Mapping[str, Any]) -> list[str]:
    """Per transfer row: on which targets it breaks more, only when compressed, than its control."""
    found = []
    for row in table["rows"]:
        if row["kind"] != "transfer":
            continue
        compared = {
            target: one["beats_control"]
            for target, one in row["cells"].items()
            if one["beats_control"] is not None
        }
        better = [target for target, beats in compared.items() if beats["csfr"]]
        lost = [target for target, beats in compared.items() if beats["cae"]]
        found.append(
            f"{row['attack']} (made on {row['made_on']}): above its noise control, intervals "
            f"apart, in CSFR on {_some(better, compared)} and in CAE on {_some(lost, compared)}."
        )
    return found


def _some(names: Sequence[str], of: Mapping[str, Any]) -> str:
    if not of:
        return "no target (no control was measured)"
    return f"{', '.join(names)}" if names else f"none of {len(of)}"
