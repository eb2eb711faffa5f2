"""The table a run prints at its end, as plain strings: the command line decides on colour."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports import marks
from reports.marks import defense_text
from reports.text import count, epsilon_text, interval, number, plain


@dataclass(frozen=True, slots=True)
class Table:
    """Cells of a table, all strings.

    Attributes:
        columns: headings.
        numeric: whether a column holds numbers and is set flush right.
        rows: one tuple per row, as long as `columns`.
    """

    columns: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[str, ...], ...]


Column = tuple[str, bool, list[str]]
"""Heading, whether it holds numbers, and its values."""


def of_cells(cells: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns that say which cell a row is about."""
    return [
        ("target", False, [plain(cell["target"]) for cell in cells]),
        ("compression", False, [plain(cell["compression"]) for cell in cells]),
        ("attack", False, [plain(cell["attack"]) for cell in cells]),
        ("defense", False, [defense_text(cell) or "none" for cell in cells]),
        ("ε", True, [epsilon_text(cell["epsilon"]) for cell in cells]),
    ]


def as_table(columns: Iterable[Column]) -> Table:
    """Columns as rows."""
    shown = list(columns)
    return Table(
        columns=tuple(heading for heading, _, _ in shown),
        numeric=tuple(numeric for _, numeric, _ in shown),
        rows=tuple(zip(*(values for _, _, values in shown), strict=True)),
    )


def table(summary: Mapping[str, Any]) -> Table:
    """One row per cell; columns that say the same in every row are left out."""
    cells = summary["cells"]
    columns: list[Column] = [
        *of_cells(cells),
        ("n", True, [f"{cell['n']:,}" for cell in cells]),
        ("errors", True, [f"{cell['errors']:,}" for cell in cells]),
        ("full", True, [_accuracies(cell, "full") for cell in cells]),
        ("compressed", True, [_accuracies(cell, "compressed") for cell in cells]),
        ("CSG", True, [interval(cell["metrics"]["csg"], 2) for cell in cells]),
        ("CSFR", True, [interval(cell["metrics"]["csfr"], 2) for cell in cells]),
        ("diagnosis", False, [diagnosis_text(cell) for cell in cells]),
        ("median ε", True, [_median(cell) for cell in cells]),
    ]
    optional = {"target", "defense", "errors", "median ε"}
    return as_table(
        column
        for column in columns
        if column[0] not in optional
        or len(set(column[2])) > 1
        or (column[0] in ("errors", "median ε") and set(column[2]) - {"0", "—"})
    )


def _median(cell: Mapping[str, Any]) -> str:
    """Median of the minimal epsilons, where they were searched."""
    found = cell.get("minimal_epsilon")
    if not found or not found["n"]:
        return "—"
    if found["median"] is None:
        return f"> {epsilon_text(cell['epsilon'])}"
    return epsilon_text(found["median"])


def _accuracies(cell: Mapping[str, Any], path: str) -> str:
    clean, attacked = (cell["metrics"][f"acc_{path}_{image}"] for image in ("clean", "attacked"))
    return f"{number(clean['value'], 2)} → {number(attacked['value'], 2)}"


def diagnosis_text(cell: Mapping[str, Any]) -> str:
    """Causes of the failures, most frequent first: ``ranking 31 of 34 (partial 3)``."""
    if not cell["failures"]:
        return "no failures" if cell["n"] else "—"
    counts = sorted(cell["diagnosis"].items(), key=lambda item: -item[1])
    (first, most), *others = [(name.replace("ranking_", ""), n) for name, n in counts if n]
    rest = ", ".join(f"{name} {n}" for name, n in others)
    return f"{first} {most} of {cell['failures']}" + (f" ({rest})" if rest else "")


def notes(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """What a reader should know before trusting the table."""
    found: list[str] = []
    progress, cells = summary["progress"], summary["cells"]
    if progress["errors"]:
        found.append(
            f"{count(progress['errors'], 'trial')} ended in an error and are in no metric; "
            "report.html lists them; redteam run --retry-errors with the same --out measures them "
            "again."
        )
    if progress["missing"]:
        found.append(f"{count(progress['missing'], 'trial')} did not run; run again to resume.")
    if "filter" in summary:
        rule = summary["filter"]
        why = ", ".join(f"{number} {reason}" for reason, number in rule["left_out"].items())
        found.append(
            f"filter {rule['rule']} kept {rule['kept']} of {rule['asked']} samples"
            + (f" (left out: {why}); manifest.json lists them." if why else ".")
        )
    found += marks.notes(summary)
    found += _checks(summary["checks"], {cell["id"]: cell["attack"] for cell in cells})
    found += summary.get("detectors", {}).get("notes", [])
    small = [cell["n"] for cell in cells if 0 < cell["n"] < 30]
    if small:
        found.append(
            f"{count(len(small), 'cell')} with fewer than 30 samples: the intervals are wide, "
            "and the shape of the distribution is assumed."
        )
    weak = sorted(
        {
            (plain(cell["target"]), plain(cell["compression"]))
            for cell in cells
            if _drop(cell) > 0.05
        }
    )
    for target, compression in weak:
        found.append(
            f"{compression} loses more than 5 accuracy points on clean images of {target}: "
            "that loss is compression, not attack."
        )
    return tuple(found)


def _checks(checks: Sequence[Mapping[str, Any]], attacks: Mapping[str, str]) -> list[str]:
    """One sentence for each code; report.html has one for each code and attack."""
    found = []
    for code in dict.fromkeys(check["code"] for check in checks):
        same = [check for check in checks if check["code"] == code]
        names = list(dict.fromkeys(plain(attacks[check["cells"][0]]) for check in same))
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        found.append(
            f"self-check {code!r} on {', '.join(names[:4])}{more}: {same[0]['message']}. "
            f"Remedy: {same[0]['remedy']}."
        )
    return found


def _drop(cell: Mapping[str, Any]) -> float:
    value = cell["metrics"]["clean_drop"]["value"]
    return 0.0 if value is None else float(value)
