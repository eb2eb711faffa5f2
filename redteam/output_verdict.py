"""What the commands on the verdict print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.table import Table
from rich.text import Text

from redteam.output import stdout, write_json
from reports.text import count, interval, number, plain
from reports.verdict import ExitCode, Verdict

if TYPE_CHECKING:
    from redteam.powering import PowerTable
    from reports.compare import Change, ComparedCell, Comparison

_STYLES: Final = {
    "pass": "bold green",
    "fail": "bold red",
    "inconclusive": "bold yellow",
    "not_gated": "bold",
    "worse": "bold red",
    "better": "bold green",
    "not comparable": "yellow",
}
_IDS: Final = 5
"""Samples named in a table; --json has all."""


def _table(columns: Sequence[str], numeric: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in numeric else "left")
    return table


def show_gates(folder: Path, summary: Mapping[str, Any], code: ExitCode, *, as_json: bool) -> None:
    """The end of ``redteam gate``: the verdict, every gate on every cell, what to do next."""
    if as_json:
        keys = ("verdict", "headline", "why", "more_samples_decide", "progress", "gates")
        found = {key: summary[key] for key in keys}
        write_json({"folder": str(folder), "exit_code": int(code), **found})
        return
    console = stdout()
    console.print()
    console.print(Text(summary["headline"], style=_STYLES[summary["verdict"]]))
    console.print(Text(summary["why"]), soft_wrap=True)
    for gate in summary["gates"]:
        console.print()
        _show_gate(gate)
    console.print()
    console.print(
        Text(
            "clean drop: what compression alone costs, without an attack; p of a fail, corrected "
            "for its family (Holm)",
            style="dim",
        ),
        soft_wrap=True,
    )
    console.print(Text(f"next     {_next(summary)}"), soft_wrap=True)


def _show_gate(gate: Mapping[str, Any]) -> None:
    console = stdout()
    against = gate["baseline_run"].get("folder")
    console.print(
        Text(f"{gate['verdict']:12} ", style=_STYLES[gate["verdict"]])
        + Text(plain(gate["name"]), style="bold")
        + Text(f"  {_limit(gate)} at {gate['confidence'] * 100:g}%")
        + Text(f", against {plain(against)}" if against else "", style="dim"),
        soft_wrap=True,
    )
    numeric = ("value", "of", "bounds", "p", "clean drop")
    table = _table(("", "cell", *numeric), numeric)
    for cell in gate["cells"]:
        table.add_row(
            Text(cell["verdict"], style=_STYLES[cell["verdict"]]),
            Text(cell["label"]),
            number(cell["value"]),
            _of(cell),
            f"{number(cell['bound_low'])}, {number(cell['bound_high'])}",
            "–" if cell["p_holm"] is None else f"{cell['p_holm']:.2g}",
            interval(cell["clean_drop"]),
        )
    console.print(table)
    for cell in gate["cells"]:
        if cell["cause"] not in ("", "samples"):
            console.print(Text(f"! {cell['label']}: {cell['reason']}", "yellow"), soft_wrap=True)


def _limit(gate: Mapping[str, Any]) -> str:
    words = (
        ("≤", gate["max"]),
        ("≥", gate["min"]),
        ("rises by ≤", gate["max_increase"]),
        ("falls by ≤", gate["max_decrease"]),
    )
    stated = [f"{sign} {value:g}" for sign, value in words if value is not None]
    return f"{gate['metric']} {' and '.join(stated)}"


def _of(cell: Mapping[str, Any]) -> str:
    """``12 of 100``, ``17 of 100, before 12``, ``100``."""
    if cell["change"]:
        return f"{cell['change']['now']:,} of {cell['n']:,}, before {cell['change']['before']:,}"
    return f"{cell['n']:,}" if cell["events"] is None else f"{cell['events']:,} of {cell['n']:,}"


def _next(summary: Mapping[str, Any]) -> str:
    if summary["exit_code"] == ExitCode.INCOMPLETE:
        return "run the scenario again with --out and this folder to continue"
    if summary["more_samples_decide"]:
        return "raise dataset.samples; redteam power says how many a gate needs"
    if summary["verdict"] == Verdict.INCONCLUSIVE:
        return "mend what the lines above name; more samples alone do not decide"
    if summary["verdict"] == Verdict.FAIL:
        return "open report.html of the run: what broke, and why"
    return "keep this run as the baseline of the next: redteam gate NEXT --baseline THIS"


def show_comparison(found: Comparison, *, as_json: bool) -> None:
    """The end of ``redteam compare``."""
    if as_json:
        write_json(found.model_dump(mode="json"))
        return
    console = stdout()
    style = {ExitCode.FAIL: "bold red", ExitCode.PASS: "bold green"}.get(found.exit_code)
    console.print()
    console.print(Text(found.headline, style=style or "bold yellow"), soft_wrap=True)
    for side, run in (("base", found.before), ("run", found.now)):
        told = f"{side:5}{plain(run['folder'])}  {plain(run['name'])}, {run['created']}"
        console.print(Text(told, style="dim"), soft_wrap=True)
    for line in found.compared:
        console.print(Text(f"differs  {line}"), soft_wrap=True)
    console.print()
    console.print(_cells(found.cells))
    console.print()
    for cell in found.cells:
        _show_ids(cell)
    for label in found.only_before:
        console.print(Text(f"! only in BASE: {label}", style="yellow"), soft_wrap=True)
    for label, why in found.only_now:
        console.print(Text(f"! only in RUN: {label}: {why}", style="yellow"), soft_wrap=True)
    console.print(
        Text(
            "right, broke, mended: answers through compression on the attacked image; clean: the "
            "same without an attack; difference: accuracy now less before, 95% (Newcombe); p: "
            "exact McNemar, corrected for all rows (Holm)",
            style="dim",
        ),
        soft_wrap=True,
    )
    console.print(Text(f"next     {found.next}"), soft_wrap=True)


_NUMERIC: Final = (
    "n",
    "right",
    "broke",
    "mended",
    "difference",
    "p",
    "clean broke/mended",
    "clean drop",
    "CSFR",
)


def _cells(cells: Sequence[ComparedCell]) -> Table:
    table = _table(("", "cell", *_NUMERIC), _NUMERIC)
    for cell in cells:
        state = Text(cell.state, style=_STYLES.get(cell.state, ""))
        if cell.attacked is None or cell.clean is None:
            table.add_row(state, Text(cell.label))
            continue
        hit, clean = cell.attacked, cell.clean
        table.add_row(
            state,
            Text(cell.label),
            f"{hit.n:,}",
            f"{hit.before:,} → {hit.now:,}",
            f"{len(hit.broke):,}",
            f"{len(hit.mended):,}",
            interval(hit.difference),
            "–" if cell.p_holm is None else f"{cell.p_holm:.2g}",
            f"{len(clean.broke):,} / {len(clean.mended):,}",
            _both(cell.clean_drop),
            _both(cell.csfr),
        )
    return table


def _both(values: tuple[Mapping[str, Any], Mapping[str, Any]]) -> str:
    return " → ".join(number(one["value"]) for one in values)


def _show_ids(cell: ComparedCell) -> None:
    """Which samples changed in a cell, a few of them."""
    console = stdout()
    if cell.why:
        console.print(Text(f"! {cell.label}: {cell.why}", style="yellow"), soft_wrap=True)
    if cell.attacked is None:
        return
    for what, names in (("broke", cell.attacked.broke), ("mended", cell.attacked.mended)):
        if names:
            more = f" and {len(names) - _IDS} more" if len(names) > _IDS else ""
            ids = ", ".join(plain(name) for name in names[:_IDS])
            alone = _by_compression(cell) if what == "broke" else ""
            line = f"{what:7} {len(names)} of {_could(cell.attacked, what)}{alone}: {ids}{more}"
            console.print(Text(f"{cell.label}: ", style="dim") + Text(line), soft_wrap=True)


def _could(change: Change, what: str) -> str:
    """The samples that could break are those that were right; that could mend, wrong."""
    able = change.before if what == "broke" else change.n - change.before
    return count(able, "sample") + (" right before" if what == "broke" else " wrong before")


def _by_compression(cell: ComparedCell) -> str:
    if not cell.broke_clean:
        return ""
    return f" ({cell.broke_clean} of these wrong on the clean image too: compression, no attack)"


def show_power(tables: Sequence[PowerTable], *, as_json: bool) -> None:
    """The end of ``redteam power``."""
    if as_json:
        write_json([asdict(table) for table in tables])
        return
    console = stdout()
    for one in tables:
        console.print()
        console.print(Text(one.title, style="bold"), soft_wrap=True)
        if one.rows:
            table = _table(("truth", "decision", "samples"), ("truth", "samples"))
            for row in one.rows:
                samples = "no number does" if row.samples is None else f"{row.samples:,}"
                table.add_row(row.true, row.decision, samples)
            console.print(table)
        for note in one.notes:
            console.print(Text(f"  {note}", style="dim"), soft_wrap=True)
