"""A block for a Hugging Face model card: ``model-index`` metadata, and the same as a table.

The block is for the card of the model that was tested. Its metadata is what the hub reads
(``model-index`` with task, data set and metrics); the text under it is for people. It says what was
measured and how sure that is, and never that a model is safe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import yaml

from reports import taxonomy
from reports.markdown import escape
from reports.marks import defense_text
from reports.records import Manifest
from reports.registry import METRICS
from reports.text import epsilon_text, interval, plain

_CLEAN: Final = ("acc_full_clean", "acc_compressed_clean")
_ATTACKED: Final = ("acc_full_attacked", "acc_compressed_attacked", "csg", "csfr")
_HEADS: Final = (
    "target", "compression", "attack", "defence", "ε", "n", "full, clean", "compressed, clean",
    "full, attacked", "compressed, attacked", "CSG", "CSFR",
)  # fmt: skip
_LIMITS: Final = (
    "Attacked accuracies are upper bounds: a stronger attack may take more. CSFR is the share of "
    "samples that break only when compressed, among those right clean on both paths; CSG the "
    "relative accuracy lost with compression minus that lost without. Brackets are 95 % intervals; "
    "n/a means an empty denominator. Evidence for an assessment, not a certificate."
)


def render_model_card(manifest: Manifest, summary: Mapping[str, Any]) -> str:
    """Write the block: YAML front matter, then Markdown.

    Args:
        manifest: of the run.
        summary: as in summary.json.
    """
    head = yaml.safe_dump(
        {"model-index": _index(manifest, summary)},
        sort_keys=False,
        allow_unicode=True,
        width=100_000,  # no folded lines, which some readers of front matter take for keys
    )
    rows = [_row(cell) for cell in summary["cells"]]
    body = [
        "## Robustness under visual-token compression",
        f"Measured with redteam, scenario *{escape(manifest.name)}* "
        f"(hash `{escape(manifest.scenario_hash)}`, seed {manifest.seed}), "
        f"{len(manifest.samples):,} samples of {escape(_dataset(manifest)['name'])}. "
        f"Verdict: **{escape(summary['headline'])}**. {escape(summary['why'], 2_000)}",
        _table(rows),
        _LIMITS,
        "Related entries of public taxonomies: "
        + "; ".join(_related(manifest))
        + ". "
        + escape(taxonomy.NOTE, 2_000),
    ]
    return f"---\n{head}---\n\n" + "\n\n".join(body) + "\n"


def _index(manifest: Manifest, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    targets = dict.fromkeys(cell["target"] for cell in summary["cells"])
    return [
        {
            "name": plain(target),
            "results": [
                {
                    "task": {
                        "type": "visual-question-answering",
                        "name": "Visual question answering under attack, tokens compressed",
                    },
                    "dataset": _dataset(manifest),
                    "metrics": list(
                        _metrics([cell for cell in summary["cells"] if cell["target"] == target])
                    ),
                }
            ],
        }
        for target in targets
    ]


def _dataset(manifest: Manifest) -> dict[str, str]:
    options = manifest.scenario.get("dataset") or {}
    kind = plain(str(options.get("type", "unknown")))
    split = options.get("split")
    found = {"type": kind, "name": kind}
    return found | ({"split": plain(split)} if isinstance(split, str) else {})


def _metrics(cells: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """One entry for each number; those on clean images once for each compression and defence."""
    seen = set()
    for cell in cells:
        shown = defense_text(cell)
        where = plain(cell["compression"]) + (f", {shown}" if shown else "")
        if where not in seen and cell["n"]:
            seen.add(where)
            yield from _entries(cell, _CLEAN, where)
        attack = f"{plain(cell['attack'])} at {epsilon_text(cell['epsilon'])}"
        yield from _entries(cell, _ATTACKED, f"{where}, {attack}")


def _entries(cell: Mapping[str, Any], names: Sequence[str], where: str) -> Iterator[dict[str, Any]]:
    for name in names:
        value = cell["metrics"][name]["value"]
        if value is not None:  # the hub wants numbers; an empty denominator has none
            yield {"type": name, "name": f"{METRICS[name].title} ({where})", "value": value}


def _row(cell: Mapping[str, Any]) -> tuple[str, ...]:
    metrics = cell["metrics"]
    return tuple(
        escape(value)
        for value in (
            cell["target"],
            cell["compression"],
            cell["attack"],
            defense_text(cell) or "none",
            epsilon_text(cell["epsilon"]),
            f"{cell['n']:,}",
            *(interval(metrics[name], 2) for name in (*_CLEAN, *_ATTACKED)),
        )
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    flush = ["---"] * 4 + ["---:"] * (len(_HEADS) - 4)
    return "\n".join(f"| {' | '.join(row)} |" for row in (_HEADS, flush, *rows))


def _related(manifest: Manifest) -> list[str]:
    return [
        f"{escape(entry.id)} {escape(entry.title)} ({escape(entry.scheme)})"
        for entry in taxonomy.entries(manifest.cells)
    ]
