"""summary.md: for a pull request or a step summary; verdict first, small, every string escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from reports import availability, defended, detection, draws, taxonomy, transfer
from reports.findings import Findings
from reports.marks import MEANING, bare, failed, rule_text
from reports.reading import DIAGNOSIS, HOW_TO_READ, statements
from reports.records import Manifest, Trial
from reports.registry import METRICS
from reports.terminal import Table, notes, table
from reports.text import count, interval, plain

LIMIT = 1_000_000
"""Largest size in bytes; GitHub refuses step summaries above 1 MiB."""

_PUNCTUATION = re.compile(r"([\\`*_\[\]<>|~#&])")
_ENTITIES = re.compile(r"[$@]|:(?=//)|(?<=www)\.", re.IGNORECASE)
_LEADING = re.compile(r"^([-+=]|\d+(?=[.)]\s))")
_MARK = {"pass": "✅", "fail": "❌", "inconclusive": "❔", "not_gated": "➖"}
_SHOWN = 20


def escape(text: str, limit: int = 200) -> str:
    """Make a foreign string inert in Markdown: no markup, links, mentions, HTML or table cells."""
    # Entities where a backslash would not stop a mention, a bare link or GitHub's formulas.
    shown = _PUNCTUATION.sub(r"\\\1", plain(text, limit).strip())
    shown = _ENTITIES.sub(lambda found: f"&#{ord(found[0])};", shown)
    return _LEADING.sub(lambda found: f"&#{ord(found[0][0])};{found[0][1:]}", shown)


def render_markdown(manifest: Manifest, summary: Mapping[str, Any], found: Findings) -> str:
    """Write summary.md.

    Args:
        manifest: of the run.
        summary: as in summary.json.
        found: its findings.

    Returns:
        Markdown of at most `LIMIT` bytes; what is cut off is said at the end.
    """
    sections = [
        _head(manifest, summary),
        _gates(summary["gates"]),
        _bullets("What stands out", [escape(one, 2_000) for one in statements(summary)]),
        _cells(summary),
        _defenses(summary),
        _extra("Availability", availability.CAPTION, availability.table(manifest, summary)),
        _extra("Over draws", draws.CAPTION, draws.table(summary)),
        _extra("Detectors", detection.CAPTION, detection.table(summary)),
        transfer_section(summary.get("transfer")),
        _findings(found),
        _bullets("Before you trust it", [escape(one, 2_000) for one in notes(summary)]),
        _bullets("How to read it", HOW_TO_READ),
        _taxonomy(manifest),
        "Pictures, intervals of every metric and provenance are in `report.html` beside this file.",
    ]
    return _fit([section for section in sections if section])


def _head(manifest: Manifest, summary: Mapping[str, Any]) -> str:
    mark = _MARK[summary["verdict"]] if summary["exit_code"] in (0, 1, 4) else "⚠️"
    return f"## {mark} {summary['headline']}: {escape(manifest.name)}\n\n{_prose(summary['why'])}"


def _prose(text: str) -> str:
    """A sentence of ours that quotes foreign names."""
    return escape(text, 2_000)


def _gates(gates: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            f"{_MARK[gate['verdict']]} {gate['verdict']}",
            escape(gate["name"]),
            _prose(gate["reason"]),
        )
        for gate in gates
    ]
    return "### Gates\n\n" + _table(("verdict", "gate", "why"), rows) if rows else ""


def _cells(summary: Mapping[str, Any]) -> str:
    shown = table(summary)
    rows = [tuple(escape(value) for value in row) for row in shown.rows]
    body = _table(shown.columns, rows, shown.numeric)
    return (
        "### Results\n\nAccuracy clean → attacked with all tokens (full) and with compression; "
        f"95 % intervals in brackets.\n\n{body}"
    )


def transfer_section(matrix: Mapping[str, Any] | None) -> str:
    """Source × target matrices, the noise control beside each value."""
    if matrix is None:
        return ""
    parts = ["### Transfer"]
    for table_ in matrix["tables"]:
        parts += [_prose(transfer.title(table_)), _prose(transfer.sentence(table_))]
        rows = [
            (
                escape(f"{row['attack']}, made on {row['made_on']}"),
                METRICS[name].title,
                *(_pair(row, target, name) for target in matrix["targets"]),
            )
            for row in table_["rows"]
            for name in matrix["metrics"]
        ]
        heads = ("attack", "metric", *(escape(target) for target in matrix["targets"]))
        parts += [_table(heads, rows), _bullets_only(transfer.verdicts(table_))]
    return "\n\n".join(part for part in parts if part)


def _pair(row: Mapping[str, Any], target: str, name: str) -> str:
    """A value and that of its control."""
    one = row["cells"].get(target)
    if one is None:
        return "not tried"
    shown = interval(one["metrics"][name], 2)
    if one["control"] is not None:
        shown += f" (noise {interval(one['control']['metrics'][name], 2)})"
    own = one["own"] and row["kind"] == "transfer"
    return escape(shown + (", target among its surrogates" if own else ""))


def _defenses(summary: Mapping[str, Any]) -> str:
    """Badge, what a defence saves and costs, and the rules that failed."""
    shown = defended.table(summary)
    if shown is None:
        return ""
    rows = [tuple(escape(value) for value in row) for row in shown.rows]
    rules = [
        f"{bare(one['defense'])} on {plain(place['target'])}, {plain(place['compression'])}: "
        f"{rule_text(rule)}"
        for one in summary["defenses"]
        for place in one["places"]
        for rule in (*failed(place), *failed(place, "SHOULD"))
    ]
    parts = [
        "### Defences",
        MEANING,
        defended.CAPTION,
        _table(shown.columns, rows, shown.numeric),
        _bullets_only(rules),
    ]
    return "\n\n".join(part for part in parts if part)


def _extra(title: str, caption: str, shown: Table | None) -> str:
    """A table beside that of the results."""
    if shown is None:
        return ""
    rows = [tuple(escape(value) for value in row) for row in shown.rows]
    body = _table(shown.columns, rows, shown.numeric)
    return f"### {title}\n\n{caption}\n\n{body}"


def _findings(found: Findings) -> str:
    if not found.total:
        return "### Findings\n\nNo compression-specific failure."
    picked = [*found.shown, *found.listed][:_SHOWN]
    rows = [_finding(trial) for trial in picked]
    more = f"; {len(rows)} of them here" if found.total > len(rows) else ""
    heads = ("sample", "question", "truth", "full", "compressed", "diagnosis", "Jaccard")
    return (
        f"### Findings\n\n{count(found.total, 'compression-specific failure')}{more}. Answers are "
        f"those on the attacked image.\n\n{_table(heads, rows)}"
    )


def _finding(trial: Trial) -> tuple[str, ...]:
    answers, swap = trial.answers, trial.swap
    jaccard = {"value": trial.tokens.jaccard if trial.tokens else None, "low": None}
    texts = (answers.attacked_full.text, answers.attacked_compressed.text) if answers else ("", "")
    return (
        escape(trial.sample),
        escape(trial.question),
        escape(trial.truth),
        *(escape(text) for text in texts),
        DIAGNOSIS[swap.diagnosis.value if swap else "undiagnosed"][0],
        interval(jaccard, 2),
    )


def _taxonomy(manifest: Manifest) -> str:
    """Entries of public taxonomies, for whoever files this run under one."""
    rows = [
        (escape(entry.scheme), escape(entry.id), escape(entry.title), escape(entry.relation))
        for entry in taxonomy.entries(manifest.cells)
    ]
    body = _table(("taxonomy", "entry", "title", "relation"), rows)
    note = f"{taxonomy.NOTE} Table version {taxonomy.VERSION}."
    return f"### In public taxonomies\n\n{body}\n\n{escape(note, 2_000)}"


def _bullets(title: str, lines: Sequence[str]) -> str:
    return f"### {title}\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""


def _bullets_only(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_prose(line)}" for line in lines)


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool] | None = None
) -> str:
    flush = numeric or [False] * len(heads)
    lines = [
        "| " + " | ".join(heads) + " |",
        "|" + "|".join("---:" if right else "---" for right in flush) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines)


def _fit(sections: Sequence[str]) -> str:
    text = "\n\n".join(sections) + "\n"
    if len(text.encode()) <= LIMIT:
        return text
    note = "\n\n… cut to fit; the whole is in summary.json and report.html.\n"
    kept = text.encode()[: LIMIT - len(note.encode())].decode(errors="ignore")
    return kept[: kept.rfind("\n")] + note  # at a whole line, so that no table row is torn
