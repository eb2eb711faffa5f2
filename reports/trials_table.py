"""All trials of a run as one table, a line each: CSV for spreadsheets, Parquet for programs.

In CSV a text that a spreadsheet would take for a formula is written with an apostrophe before it,
and characters that control a terminal or hide text become visible escapes, so a file made of
hostile questions and answers can be opened. Parquet holds the texts as they are.
"""

from __future__ import annotations

import csv
import io
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from reports.errors import ReportError
from reports.files import replacing
from reports.records import Cell, Trial
from reports.store import RunStore
from reports.text import plain

Kind = Literal["text", "flag", "integer", "number"]
Value = str | bool | int | float | None

_FORMULA: Final = re.compile(r"[\s'\"]*[=+\-@＝＋－＠|%\t\r\n]")
_TEXT_LIMIT: Final = 32_000
"""Characters of a CSV cell; spreadsheets take 32,767."""
_BATCH: Final = 5_000
_ANSWERS: Final = ("clean_full", "clean_compressed", "attacked_full", "attacked_compressed")


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        name: heading.
        kind: of its values.
        meaning: one sentence; empty cells mean "not recorded" or "not applicable".
        value: reads it from a trial and its cell.
    """

    name: str
    kind: Kind
    meaning: str
    value: Callable[[Trial, Cell], Value]


def _of_cell(name: str, kind: Kind, meaning: str) -> Column:
    return Column(name, kind, meaning, lambda trial, cell: getattr(cell, name))


def _of_trial(name: str, kind: Kind, meaning: str) -> Column:
    return Column(name, kind, meaning, lambda trial, cell: getattr(trial, name))


def _inside(
    part: str,
    field: str,
    kind: Kind,
    meaning: str,
    name: str = "",
    make: Callable[[Any], Value] = lambda found: found,
) -> Column:
    """A field of an optional part of a trial, such as ``swap.recovered``."""

    def value(trial: Trial, cell: Cell) -> Value:
        del cell
        held = getattr(trial, part)
        found = None if held is None else getattr(held, field)
        return None if found is None else make(found)

    return Column(name or field, kind, meaning, value)


def _answers() -> Iterator[Column]:
    for which in _ANSWERS:
        image, path = which.split("_")
        where = f"{image} image, {'all tokens' if path == 'full' else 'compressed'}"
        yield _inside(
            "answers", which, "text", f"Answer: {where}.", f"{which}_text", lambda one: one.text
        )
        yield _inside(
            "answers",
            which,
            "flag",
            f"Right: {where}.",
            f"{which}_correct",
            lambda one: one.correct,
        )


_DEMANDED: Final[tuple[tuple[str, Kind, str], ...]] = (
    ("tokens", "integer", "Visual tokens of the language model"),
    ("generated", "integer", "Tokens of the answer"),
    ("seconds", "number", "Seconds of the answer"),
    ("fallback", "flag", "A defence fell back to more tokens"),
)


def _demands() -> Iterator[Column]:
    for which in _ANSWERS:
        for name, kind, what in _DEMANDED:
            meaning = f"{what}: {which.replace('_', ', ')}."
            yield _inside(
                "demands", which, kind, meaning, f"{which}_{name}", operator.attrgetter(name)
            )


COLUMNS: Final = (
    _of_trial("cell", "text", "Id of the cell."),
    _of_cell("target", "text", "Label of the model."),
    _of_cell("compression", "text", "Label of the compression."),
    _of_cell("attack", "text", "Label of the attack."),
    _of_cell("defense", "text", "Label of the defence, or none."),
    _of_cell("epsilon", "number", "Budget, in [0, 1] pixel units (an l2 norm may be larger)."),
    _of_cell("norm", "text", "Norm of the budget."),
    _of_cell("knowledge", "text", "What the attacker knows."),
    _of_trial("sample", "text", "Id of the sample."),
    _of_trial("image", "text", "Id of the clean image, which questions may share."),
    _of_trial("kind", "text", "Kind of question, empty if the data has none."),
    _of_trial("question", "text", "What was asked."),
    _of_trial("truth", "text", "The right answer."),
    _of_trial("seed", "integer", "Seed of the attack."),
    *_answers(),
    Column(
        "outcome_full", "text", "success, failure, not_applicable or error, with all tokens.",
        lambda trial, cell: trial.outcome("full").value,
    ),
    Column(
        "outcome_compressed", "text", "The same with compression.",
        lambda trial, cell: trial.outcome("compressed").value,
    ),
    Column(
        "compression_specific_failure", "flag",
        "Right three times, wrong attacked and compressed; empty for an error.",
        lambda trial, cell: trial.compression_specific_failure if trial.answers else None,
    ),
    _inside("swap", "diagnosis", "text", "Cause, by the swap test.", make=lambda one: one.value),
    _inside("swap", "recovered", "flag", "Attacked image right with the clean kept set."),
    _inside("swap", "reproduced", "flag", "Clean image wrong with the attacked kept set."),
    _inside("swap", "recovered_text", "text", "That answer."),
    _inside("swap", "reproduced_text", "text", "That answer."),
    _inside("distance", "linf", "number", "Largest change of a pixel value, in [0, 1]."),
    _inside("distance", "l2", "number", "Euclidean norm of the change, in [0, 1] pixel units."),
    _inside("distance", "psnr", "number", "Peak signal-to-noise ratio in dB; empty if equal."),
    _inside("tokens", "kept_clean", "integer", "Tokens kept, clean.", make=len),
    _inside("tokens", "kept_attacked", "integer", "Tokens kept, attacked.", make=len),
    _inside("tokens", "jaccard", "number", "Intersection ÷ union of the two kept sets."),
    _inside("tokens", "spearman", "number", "Rank correlation of the two rankings."),
    _inside("tokens", "kendall", "number", "Kendall's tau-b of the two rankings."),
    _inside("tokens", "top_preserved", "number", "Share of the clean top still at the top."),
    _inside("tokens", "bottom_infiltrated", "number", "Share of the clean bottom now at the top."),
    _inside("tokens", "evidence_kept_clean", "number", "Share of evidence kept, clean."),
    _inside("tokens", "evidence_kept_attacked", "number", "Share of evidence kept, attacked."),
    *_demands(),
    _inside("effort", "forwards", "integer", "Forward passes of the attack."),
    _inside("effort", "backwards", "integer", "Gradients of the attack."),
    _inside("effort", "queries", "integer", "Questions of the attack to the target."),
    _of_trial("made_by", "text", "Part of a combined attack that made the image."),
    _inside("detection", "clean", "number", "Detector's score of the clean image.",
            "detection_clean"),
    _inside("detection", "attacked", "number", "Detector's score of the attacked image.",
            "detection_attacked"),
    _of_trial("clean_png", "text", "SHA-256 of the clean image under images/."),
    _of_trial("attacked_png", "text", "SHA-256 of the attacked image."),
    _of_trial("base_png", "text", "SHA-256 of what distances are measured from, if another."),
    Column(
        "checks", "text", "Self-checks that fired, separated by semicolons.",
        lambda trial, cell: "; ".join(trial.checks),
    ),
    _inside("error", "type", "text", "Why it could not be measured.", "error_type"),
    _inside("error", "where", "text", "What was being done.", "error_where"),
    _inside("error", "message", "text", "The message.", "error_message"),
)  # fmt: skip
"""Every column, in order."""


def neutral(text: str) -> str:
    """A foreign string as a CSV cell: no formula, nothing hidden, at most 32,000 characters.

    Spreadsheets take what begins with ``= + - @`` (or their full-width forms, or after blanks or
    quotes) for a formula; an apostrophe before it makes it text.
    """
    shown = plain(text, _TEXT_LIMIT)
    return f"'{shown}" if _FORMULA.match(text) or _FORMULA.match(shown) else shown


def write_csv(store: RunStore, path: Path) -> Path:
    """Write the trials as CSV (UTF-8, RFC 4180), one line at a time.

    Raises:
        StoreError: if the run is damaged or the file cannot be written.
    """
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="")
        writer = csv.writer(text, quoting=csv.QUOTE_MINIMAL, lineterminator="\r\n")
        writer.writerow(column.name for column in COLUMNS)
        for row in _rows(store):
            writer.writerow(_shown(value) for value in row)
        text.detach()
    return path


def _shown(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return neutral(value) if isinstance(value, str) else repr(value)


def write_parquet(store: RunStore, path: Path) -> Path:
    """Write the trials as Parquet, texts as they are.

    Raises:
        ReportError: if pyarrow is not installed.
        StoreError: if the run is damaged or the file cannot be written.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ReportError(
            "Parquet needs pyarrow, which is not installed; pip install 'redteam[data]', or "
            "export with --format csv"
        ) from error
    types = {
        "text": pa.string(), "flag": pa.bool_(), "integer": pa.int64(), "number": pa.float64()
    }  # fmt: skip
    schema = pa.schema([pa.field(one.name, types[one.kind]) for one in COLUMNS])
    with replacing(path) as file, pq.ParquetWriter(file, schema) as writer:
        for batch in _batches(_rows(store)):
            columns = [
                pa.array([_utf8(value) for value in values], type=field.type)
                for values, field in zip(zip(*batch, strict=True), schema, strict=True)
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
    return path


def _utf8(value: Value) -> Value:
    """Lone surrogates, which UTF-8 cannot hold, become ``?``."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _batches(rows: Iterable[list[Value]]) -> Iterator[list[list[Value]]]:
    batch: list[list[Value]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _rows(store: RunStore) -> Iterator[list[Value]]:
    cells: Mapping[str, Cell] = {cell.id: cell for cell in store.manifest.cells}
    for trial in store.trials():
        if trial.cell not in cells:
            raise ReportError(
                f"the ledger holds a trial of cell {trial.cell!r}, which the manifest does not "
                "plan; the two files are not of the same run"
            )
        yield [column.value(trial, cells[trial.cell]) for column in COLUMNS]
