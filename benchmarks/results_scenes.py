"""Make docs/results/scenes.md: ``python benchmarks/results_scenes.py``.

Runs (or resumes) `scenarios/scenes-results.yaml` and writes its table. The page is made from
``summary.json`` and ``manifest.json`` alone; nothing in it is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCENARIO = Path("scenarios/scenes-results.yaml")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenario", type=Path, default=SCENARIO)
    parser.add_argument("--run", type=Path, default=Path("runs/scenes-results"))
    parser.add_argument("--page", type=Path, default=Path("docs/results/scenes.md"))
    parser.add_argument("--only-page", action="store_true", help="do not run; use the run folder")
    arguments = parser.parse_args()
    if not arguments.only_page:
        command = [sys.executable, "-m", "redteam", "run", str(arguments.scenario)]
        result = subprocess.run([*command, "--out", str(arguments.run)], check=False)  # noqa: S603
        if result.returncode not in (0, 1, 4):
            raise SystemExit(result.returncode)
    summary = json.loads((arguments.run / "summary.json").read_text(encoding="utf-8"))
    manifest = json.loads((arguments.run / "manifest.json").read_text(encoding="utf-8"))
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    arguments.page.write_text(page(summary, manifest), encoding="utf-8")
    print(f"written: {arguments.page}")


def page(summary: dict[str, Any], manifest: dict[str, Any]) -> str:
    """The whole page."""
    compressions = list(dict.fromkeys(c["compression"] for c in summary["cells"]))
    parts = [_head(summary, manifest)]
    parts += [_section(name, summary["cells"]) for name in compressions]
    parts.append(_notes(summary))
    return "\n".join(parts)


def _head(summary: dict[str, Any], manifest: dict[str, Any]) -> str:
    made = manifest["provenance"]
    samples = len(manifest["samples"])
    identity = json.dumps(made.get("identity", {}).get("targets", {}), sort_keys=True)
    device = made.get("identity", {}).get("device", "unknown")
    return f"""# Results on the scenes LVLM

Made by `python benchmarks/results_scenes.py`, which runs `{SCENARIO}`; do not edit.

{samples} samples of the held-out test split, one question a picture; seed {manifest["seed"]};
device {device}; {manifest["created"]}. 95 % intervals: Wilson for rates, paired bootstrap by
picture for CSG. Attack options were chosen on the validation split. What the columns mean:
[metrics.md](../metrics.md). The target is a tiny model of a drawn world; nothing here says how a
large model behaves.

<details><summary>Weights</summary>

`{identity}`

</details>
"""


def _section(compression: str, cells: list[dict[str, Any]]) -> str:
    rows = [c for c in cells if c["compression"] == compression]
    lines = [
        f"## {compression}",
        "",
        "| " + " | ".join(title for title, _ in COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(show(cell) for _, show in COLUMNS) + " |" for cell in rows]
    return "\n".join(lines) + "\n"


def _notes(summary: dict[str, Any]) -> str:
    """Whether CAA stands clear of each control, cell by cell, from the intervals."""
    lines = ["## CAA against the controls", ""]
    cells = {(c["compression"], c["attack"], c["epsilon"]): c for c in summary["cells"]}
    for (compression, attack, epsilon), cell in cells.items():
        if attack != "caa":
            continue
        apart = []
        for control in ("noise", "pgd", "pgd-compressed"):
            other = cells.get((compression, control, epsilon))
            if other is None:
                continue
            clear = all(low(cell, m) > high(other, m) for m in ("csg", "csfr"))
            apart.append(f"{control}: {'clear' if clear else 'not clear'}")
        lines.append(f"- {compression}, ε = {epsilon * 255:g}/255. {'; '.join(apart)}.")
    lines.append("")
    lines.append("*Clear*: the intervals of both CSG and CSFR lie above the control's.")
    return "\n".join(lines) + "\n"


def low(cell: dict[str, Any], metric: str) -> float:
    found = cell["metrics"][metric]["low"]
    return float("-inf") if found is None else float(found)


def high(cell: dict[str, Any], metric: str) -> float:
    found = cell["metrics"][metric]["high"]
    # A rate over nothing (the control broke every sample on the full path) stands in nobody's way.
    return float("-inf") if found is None else float(found)


def value(cell: dict[str, Any], metric: str) -> str:
    found = cell["metrics"][metric]["value"]
    return "–" if found is None else f"{found:.2f}"


def interval(cell: dict[str, Any], metric: str) -> str:
    one = cell["metrics"][metric]
    if one["value"] is None:
        return "–"
    return f"**{one['value']:.2f}** [{one['low']:.2f}, {one['high']:.2f}]"


def arrow(cell: dict[str, Any], path: str) -> str:
    return f"{value(cell, f'acc_{path}_clean')} → {value(cell, f'acc_{path}_attacked')}"


def _evidence(cell: dict[str, Any]) -> str:
    return f"{value(cell, 'evidence_kept_clean')} → {value(cell, 'evidence_kept_attacked')}"


def diagnosis(cell: dict[str, Any]) -> str:
    found = sorted(cell["diagnosis"].items(), key=lambda item: -item[1])
    return ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in found if n) or "no failures"


COLUMNS = (
    ("attack", lambda c: c["attack"]),
    ("ε·255", lambda c: f"{c['epsilon'] * 255:g}"),
    ("n", lambda c: f"{c['n']}"),
    ("full, clean → attacked", lambda c: arrow(c, "full")),
    ("compressed, clean → attacked", lambda c: arrow(c, "compressed")),
    ("UPR", lambda c: value(c, "upr")),
    ("CAE", lambda c: value(c, "cae")),
    ("**CSG**", lambda c: interval(c, "csg")),
    ("**CSFR**", lambda c: interval(c, "csfr")),
    ("full ASR", lambda c: value(c, "full_asr")),
    ("Jaccard", lambda c: value(c, "jaccard")),
    ("evidence kept", _evidence),
    ("recovered / reproduced", lambda c: f"{value(c, 'recovered')} / {value(c, 'reproduced')}"),
    ("diagnosis", diagnosis),
)


if __name__ == "__main__":
    main()
