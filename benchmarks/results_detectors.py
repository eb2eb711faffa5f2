"""Make docs/results/detectors.md: ``python benchmarks/results_detectors.py RUN``.

From the summary of a run of `scenarios/detectors.yaml`; nothing in the page is typed by hand. Cells
that were not run are left out, and named.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Cell = Mapping[str, Any]
TITLES = (
    "detector | attack | n +/− | AUROC | AUPR | TPR at 1 % | real FPR | TPR at 5 % | real FPR "
    "| TPR at 5 % of CSF (n) | evaded at 5 %"
)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--page", type=Path, default=Path("docs/results/detectors.md"))
    arguments = parser.parse_args()
    summary = json.loads((arguments.run / "summary.json").read_text(encoding="utf-8"))
    manifest = json.loads((arguments.run / "manifest.json").read_text(encoding="utf-8"))
    arguments.page.write_text(page(summary, manifest), encoding="utf-8")
    print(f"written: {arguments.page}")


def page(summary: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """The page."""
    cells = [one for one in summary["detectors"]["cells"] if one["positives"]]
    absent = dict.fromkeys(
        one["attack"] for one in summary["detectors"]["cells"] if not one["positives"]
    )
    hardware = manifest["provenance"]["hardware"]
    lines = [
        "# Detectors",
        "",
        "Made by `python benchmarks/results_detectors.py RUN` from `scenarios/detectors.yaml`; "
        "do not edit.",
        "",
        (f"**Not run: {', '.join(absent)}.** " if absent else "")
        + "None of the attacks knows the detector: **upper bounds**. "
        f"{len(manifest['samples']):,} clean test pictures are the negatives, the attacked ones "
        f"the positives; thresholds are from {cells[0]['calibration']:,} clean validation "
        "pictures, or half of them where a detector learns from the others; "
        f"ε {max(one['epsilon'] for one in cells) * 255:g}/255, seed {manifest['seed']}, "
        f"{hardware.get('gpu', hardware['device'])}; 95 % intervals are in the run's report. "
        "*real FPR*: of the threshold on clean test pictures. *CSF*: compression-specific "
        "failures among the positives. *evaded*: broken compressed answers that were not flagged, "
        "of the right ones. `noise` is no attack: a detector that flags it tells perturbed "
        "pictures from clean ones, whether or not anything was attacked.",
        "",
    ]
    for compression in dict.fromkeys(one["compression"] for one in cells):
        lines += [f"## {compression}", "", f"| {TITLES} |", "|" + "---|" * (TITLES.count("|") + 1)]
        here = [one for one in cells if one["compression"] == compression]
        lines += ["| " + " | ".join(_row(one)) + " |" for one in here]
        lines.append("")
    return "\n".join(lines)


def _row(one: Cell) -> Sequence[str]:
    strict, loose = one["rates"]["0.01"], one["rates"]["0.05"]
    name = one["attack"] + (" (its own reference)" if one["same_attack"] else "")
    return (
        one["detector"],
        name,
        f"{one['positives']:,}/{one['negatives']:,}",
        _value(one["auroc"]),
        _value(one["aupr"]),
        _value(strict["tpr"]),
        _value(strict["fpr"], 3),
        _value(loose["tpr"]),
        _value(loose["fpr"], 3),
        f"{_value(loose['tpr_failures'])} ({one['failures']})",
        _value(loose["evaded"]),
    )


def _value(estimate: Mapping[str, Any], digits: int = 2) -> str:
    value = estimate["value"]
    return "–" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    main()
