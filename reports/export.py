"""Every format a run can be written in, by name: ``redteam export`` and `build_reports` use it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from reports.baseline import Baselines
from reports.files import write_text
from reports.findings import collect
from reports.junit import render_junit
from reports.markdown import render_markdown
from reports.metrics import summarise
from reports.model_card import render_model_card
from reports.sarif import render_sarif
from reports.store import JUNIT, MARKDOWN, SARIF, RunStore
from reports.trials_table import write_csv, write_parquet

_TABLES: Final[dict[str, tuple[str, Callable[[RunStore, Path], Path]]]] = {
    "csv": ("trials.csv", write_csv),
    "parquet": ("trials.parquet", write_parquet),
}
_TEXTS: Final[dict[str, tuple[str, Callable[[RunStore, dict[str, Any]], str]]]] = {
    "model-card": ("model-card.md", lambda store, found: render_model_card(store.manifest, found)),
    "junit": (JUNIT, lambda store, found: render_junit(store.manifest, found)),
    "sarif": (
        SARIF,
        lambda store, found: render_sarif(store.manifest, found, store.scenario_text()),
    ),
    "markdown": (
        MARKDOWN,
        lambda store, found: render_markdown(store.manifest, found, collect(store)),
    ),
}
FORMATS: Final = (*_TABLES, *_TEXTS)
"""Names of the formats."""


def export(folder: Path, name: str, path: Path | None = None, baseline: Path | None = None) -> Path:
    """Write one format of a run.

    Args:
        folder: of the run.
        name: one of `FORMATS`.
        path: of the file; None for its usual name in the run folder.
        baseline: run folder that takes the place of those the gates name.

    Returns:
        The path of the file.

    Raises:
        ReportError: if manifest and ledger do not belong together, or a package is missing.
        StoreError: if it is no run folder, is damaged, or the file cannot be written.
    """
    store = RunStore.read(folder)
    if name in _TABLES:
        usual, write = _TABLES[name]
        return write(store, path or folder / usual)
    usual, render = _TEXTS[name]
    others = Baselines(store.manifest, baseline, folder)
    summary = summarise(store.manifest, store.trials(), store.calibrations(), others)
    path = path or folder / usual
    write_text(path, render(store, summary))
    return path
