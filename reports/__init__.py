"""What a run leaves behind and what is said about it: records, metrics, the verdict, the reports.

Imports nothing of the rest of redteam and no torch: a report can be rebuilt anywhere from the run
folder alone. Importing this package is cheap; the renderers load when a report is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from reports.terminal import Table
    from reports.verdict import ExitCode, Verdict

__all__ = ["Built", "build_reports"]


@dataclass(frozen=True, slots=True)
class Built:
    """What `build_reports` made.

    Attributes:
        summary: path of summary.json.
        markdown: path of summary.md.
        report: path of report.html.
        junit: path of junit.xml.
        sarif: path of results.sarif.
        verdict: of the run.
        exit_code: what the shell gets.
        headline: the verdict in a few words.
        why: the verdict in one or two sentences.
        table: one row per cell, as plain strings for a terminal.
        defenses: one row for each defence and place; None without defences.
        notes: what a reader should know before trusting the table, one sentence each.
        doubted: whether a self-check took the pass of a gate away.
        detectors: one row per cell of a detector; None without one.
        draws: one row per cell that was asked under several draws; None without one.
        more_samples_decide: whether it is inconclusive only for want of samples.
    """

    summary: Path
    markdown: Path
    report: Path
    junit: Path
    sarif: Path
    verdict: Verdict
    exit_code: ExitCode
    headline: str
    why: str
    table: Table
    notes: tuple[str, ...]
    doubted: bool = False
    defenses: Table | None = None
    detectors: Table | None = None
    draws: Table | None = None
    more_samples_decide: bool = False


def build_reports(folder: Path, baseline: Path | None = None) -> Built:
    """Make the reports of a run folder from its manifest and ledger.

    They are summary.json, summary.md, report.html, junit.xml and results.sarif.

    Works on a finished, an interrupted and a running run, and again at any time later.

    Args:
        folder: of the run.
        baseline: run folder that takes the place of those the gates name.

    Raises:
        StoreError: if it is no run folder, is damaged, or cannot be written.
        ReportError: if manifest and ledger do not belong together.
    """
    from reports import defended, detection, draws
    from reports.baseline import Baselines
    from reports.findings import Gathered
    from reports.html import render
    from reports.junit import render_junit
    from reports.markdown import render_markdown
    from reports.metrics import summarise
    from reports.sarif import render_sarif
    from reports.store import JUNIT, MARKDOWN, REPORT, SARIF, RunStore
    from reports.terminal import notes, table
    from reports.verdict import ExitCode, Verdict

    store = RunStore.read(folder)
    others = Baselines(store.manifest, baseline, folder)
    gathered = Gathered(store.manifest)  # the ledger is read once for all of it
    trials = gathered.watch(store.located())
    summary = summarise(store.manifest, trials, store.calibrations(), others)
    found = gathered.pick(store)
    return Built(
        summary=store.write_summary(summary),
        markdown=store.write(MARKDOWN, render_markdown(store.manifest, summary, found)),
        report=store.write(REPORT, render(store, summary, found)),
        junit=store.write(JUNIT, render_junit(store.manifest, summary)),
        sarif=store.write(SARIF, render_sarif(store.manifest, summary, store.scenario_text())),
        verdict=Verdict(summary["verdict"]),
        exit_code=ExitCode(summary["exit_code"]),
        headline=summary["headline"],
        why=summary["why"],
        table=table(summary),
        notes=notes(summary),
        defenses=defended.table(summary),
        doubted=any(cell["doubt"] for gate in summary["gates"] for cell in gate["cells"]),
        detectors=detection.table(summary),
        draws=draws.table(summary),
        more_samples_decide=summary["more_samples_decide"],
    )
