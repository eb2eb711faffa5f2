"""Puts the page together: data in, one HTML string out. The words are in the template."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from reports import availability, defended, detection, draws, taxonomy, text, transfer
from reports.findings import SHOWN, Findings
from reports.gate import cell_label
from reports.html import charts, heat, retention, stages, tradeoff
from reports.html.shown import briefs, views
from reports.marks import MEANING, VERIFIED, bare, defense_text
from reports.reading import (
    DIAGNOSIS,
    HOW_TO_READ,
    KNOWLEDGE,
    NORMS,
    compression_known,
    statements,
)
from reports.records import Cell, Manifest
from reports.registry import METRICS
from reports.statistics import DRAWS
from reports.store import RunStore
from reports.terminal import diagnosis_text, notes

_TEMPLATES = Path(__file__).parent / "templates"

RATES = ("upr", "cae", "csg", "csfr", "cbr", "full_asr", "compressed_asr", "clean_drop")
"""Columns of the table of outcomes, after the four accuracies."""
RANKING = (
    "jaccard", "spearman", "top_preserved", "bottom_infiltrated", "evidence_kept_clean",
    "evidence_kept_attacked", "recovered", "reproduced",
)  # fmt: skip
"""Columns of the table of rankings."""


_HASH = re.compile(r"[0-9a-f]{16,}")
ROWS = 30
"""Cells above which charts of a row each leave out those with a defence."""
INTERVALS = {
    "proportion": "Wilson interval",
    "bootstrap": "percentile interval of a paired bootstrap over images",
    "mean": "normal interval, variance summed by image",
    "maximum": "a largest value, without an interval",
}
"""How the interval of each kind of metric is made."""


def render(store: RunStore, summary: Mapping[str, Any], found: Findings) -> str:
    """Write the report of a run.

    Args:
        store: the run folder; its images are read from here.
        summary: as in summary.json.
        found: findings and errors to show.

    Returns:
        A whole HTML document: no outside resource, every foreign string escaped, and one script,
        ours, that the policy names by its hash and that the page can do without.
    """
    manifest, cells = store.manifest, summary["cells"]
    drawn = _drawn(cells)
    badges = {cell["id"]: cell["badge"] for cell in cells}
    labels = {cell.id: cell_label(cell, badges[cell.id]) for cell in manifest.cells}
    page = environment().get_template("report.html")
    return page.render(
        **styled(),
        **_scripted(),
        manifest=manifest,
        summary=summary,
        statements=statements(summary),
        notes=notes(summary),
        left_out=len(cells) - len(drawn),
        gap=charts.gap_chart(drawn),
        stages=stages.STAGES,
        stage_bars=stages.chart(drawn),
        retention=retention.retention_charts(manifest, drawn),
        heat=heat.heat_maps(cells),
        trade_offs=tradeoff.trade_offs(summary),
        accuracy=charts.accuracy_chart(drawn),
        budgets=charts.budget_charts(cells),
        survival=charts.survival_charts(cells),
        availability=availability.table(manifest, summary),
        availability_caption=availability.CAPTION,
        over_draws=draws.table(summary),
        over_draws_caption=draws.CAPTION,
        defenses=defended.table(summary),
        defenses_caption=defended.CAPTION,
        defenses_meaning=MEANING,
        verified=VERIFIED,
        detectors=detection.table(summary),
        detectors_caption=detection.CAPTION,
        monitors=[one for one in summary.get("detectors", {}).get("cells", []) if one["curve"]],
        groups=charts.grouped(cells),
        several_targets=len({cell["target"] for cell in cells}) > 1,
        tested=list(_tested(manifest)),
        threats=_threats(manifest),
        found=found,
        findings=views(store, found.shown, labels),
        briefs=briefs(store, found.listed, labels, start=len(found.shown) + 1),
        shown_limit=SHOWN,
        causes=DIAGNOSIS,
        run=store.folder.name,
        hashes=list(_hashes(manifest)),
        labels=labels,
        provenance=list(flatten(manifest.provenance)),
        profiles=_profiles(store),
        scenario=store.scenario_text(),
        taxonomy=taxonomy.entries(manifest.cells),
        taxonomy_note=f"{taxonomy.NOTE} Table version {taxonomy.VERSION}.",
        how_to_read=HOW_TO_READ,
        diagnoses=DIAGNOSIS,
        metrics=METRICS,
        intervals=INTERVALS,
        matrix=summary.get("transfer"),
        transfer=transfer,
        rates=RATES,
        ranking=RANKING,
        draws=DRAWS,
    )


def _drawn(cells: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Cells of the charts with a row for each; where these are many, those without a defence."""
    plainly = [cell for cell in cells if cell["defense"] in ("", "none")]
    return plainly if plainly and len(cells) > ROWS else cells


def styled() -> dict[str, Markup | str]:
    """The style sheet, and its hash, by which alone the page allows it."""
    style = (_TEMPLATES / "report.css").read_text(encoding="utf-8")
    return {"style": Markup(style), "style_hash": _hash(style)}  # noqa: S704 - our own file


def _scripted() -> dict[str, Markup | str]:
    """The script, and its hash."""
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    return {"script": Markup(script), "script_hash": _hash(script)}  # noqa: S704 - our own file


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def environment() -> Environment:
    """Templates with our filters; everything printed is escaped and made plain."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters.update(
        epsilon=text.epsilon_text,
        number=text.number,
        interval=text.interval,
        count=text.count,
        diagnosis=diagnosis_text,
        defense=defense_text,
        bare=bare,
        below=_below,
        block=_block,
        warmth=_warmth,
    )
    return environment


def _shown(value: object) -> object:
    """Applied to everything the template prints: no string escapes being made plain."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return text.plain(value)
    return value


def _warmth(estimate: Mapping[str, Any], better: str) -> str:
    """Class of a cell of a heat map: w0 (harmless) to w9; none where higher is not worse."""
    value = estimate["value"]
    if value is None or better != "lower":
        return ""
    return f"w{round(9 * min(1.0, max(0.0, value)))}"


def _below(value: str) -> Markup:
    """What stands in brackets at the end of a value, small below it."""
    shown = text.plain(value)
    start = min((at for mark in (" [", " (") if (at := shown.find(mark)) > 0), default=len(shown))
    rest = shown[start:].replace(", ", " to ").strip(" []()")
    return Markup("{}<small>{}</small>").format(shown[:start], rest) if rest else escape(shown)


def _block(value: str) -> Markup:
    """Text of several lines, for <pre>."""
    lines = (escape(text.plain(line)) for line in value.splitlines()[:2_000])
    return Markup("\n").join(lines)


def flatten(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Nested data as (key, value) lines: ``packages.torch``, ``2.13.0``."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flatten(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)) and any(isinstance(i, (dict, list)) for i in value):
        for index, inner in enumerate(value):
            yield from flatten(inner, f"{path}[{index}]")
    elif isinstance(value, str):
        yield path, value
    else:
        yield path, json.dumps(value, ensure_ascii=False, default=str)


def _profiles(store: RunStore) -> list[dict[str, Any]]:
    """Where the time of each profiled session went; what is not in the known form is left out."""
    known = {"phases", "wall_seconds", "device", "overhead"}
    of_workers = known | {"workers", "worker_seconds", "driver"}
    return [
        one
        for one in store.profiles()
        if isinstance(one, dict) and (of_workers if "workers" in one else known) <= one.keys()
    ]


def _options(spec: object, *, steps: bool = False) -> str:
    """Options of a method in one line: ``fastv: layer 2, retention 0.25``.

    Options that are unset are left out.

    Args:
        spec: of the method.
        steps: whether its alpha is a step size, which is written like a budget, ``alpha 4/255``;
            that of a decoding method is a weight.
    """
    if not isinstance(spec, Mapping):
        return "" if spec is None else str(spec)
    given = {key: value for key, value in spec.items() if key != "type" and value is not None}
    if steps and isinstance(given.get("alpha"), float):
        given["alpha"] = text.epsilon_text(given["alpha"])
    rest = ", ".join(f"{key} {value}" for key, value in flatten(given)) if given else ""
    return f"{spec.get('type', '')}: {rest}".strip(": ") if rest else str(spec.get("type", ""))


def _tested(manifest: Manifest) -> Iterator[tuple[str, str, str]]:
    """(role, label, options) of each distinct target, compression, attack and defence."""
    for role in ("target", "compression", "attack", "defense"):
        labels = dict.fromkeys(getattr(cell, role) for cell in manifest.cells)
        for label in labels:
            cell = next(cell for cell in manifest.cells if getattr(cell, role) == label)
            yield role, label, _options(cell.spec.get(role), steps=role == "attack")


def _hashes(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(of what, hash): weights, processors and data, by which a run is known again."""
    for path, value in flatten(manifest.provenance.get("identity", {})):
        if _HASH.fullmatch(value):
            yield path.removeprefix("targets.").replace(".", ", "), value


def _threats(manifest: Manifest) -> list[dict[str, str]]:
    """What each attack knows, and how large it may be."""
    by_attack: dict[str, list[Cell]] = {}
    for cell in manifest.cells:
        by_attack.setdefault(cell.attack, []).append(cell)
    return [
        {
            "attack": attack,
            "knowledge": KNOWLEDGE.get(cells[0].knowledge, (cells[0].knowledge, ""))[0],
            "meaning": KNOWLEDGE.get(cells[0].knowledge, ("", "unknown to this version"))[1],
            "compression": compression_known(cells[0].knowledge, cells[0].knows_compression),
            "norm": NORMS.get(cells[0].norm, cells[0].norm),
            "declared": " or ".join(dict.fromkeys(_declared(cell) for cell in cells)),
            "budgets": ", ".join(
                text.epsilon_text(epsilon) for epsilon in sorted({cell.epsilon for cell in cells})
            ),
        }
        for attack, cells in by_attack.items()
    ]


def _declared(cell: Cell) -> str:
    """What an attack says it may spend on one sample."""
    if not cell.declared:
        return "not recorded"
    steps, queries = cell.declared.get("steps", 0), cell.declared.get("queries", 0)
    words = [text.count(steps, "gradient step") if steps else ""]
    words.append(text.count(queries, "query", "queries") if queries else "")
    return ", ".join(filter(None, words)) or "nothing"
