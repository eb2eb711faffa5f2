"""Make docs/results/attacks.md: ``python benchmarks/results_attacks.py [--jobs 2] [--by budget]``.

Runs (or resumes) `scenarios/attacks.yaml` attack by attack (and, if asked, budget by budget or
compression by compression), each in a run folder of its own, and writes one page from their
``summary.json`` and ``manifest.json``; nothing in it is typed by hand. Ids and seeds of a cell
depend on nothing else in a scenario, so the parts equal one long run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from results_scenes import arrow, diagnosis, interval, low, value

SCENARIO = Path("scenarios/attacks.yaml")
OURS = "margin_split"
NOT_PUBLISHED = frozenset({OURS, "suite", "minimal"})
CONTROLS = frozenset({"noise"})
COMPARED_AT = 4 / 255
Cell = dict[str, Any]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenario", type=Path, default=SCENARIO)
    parser.add_argument("--runs", type=Path, default=Path("runs/attacks"))
    parser.add_argument("--page", type=Path, default=Path("docs/results/attacks.md"))
    parser.add_argument("--jobs", type=int, default=1, help="attacks run side by side")
    parser.add_argument("--only", nargs="*", help="attacks (or attack@part) to run")
    parser.add_argument("--by", choices=("budget", "compression"), help="run folders smaller still")
    parser.add_argument("--only-page", action="store_true", help="do not run; use the folders")
    arguments = parser.parse_args()
    parts = split(arguments.scenario, arguments.runs, arguments.by)
    if not arguments.only_page:
        chosen = [part for label, part in parts.items() if wanted(label, arguments.only)]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(run, chosen))
    folders = list(_folders(arguments.scenario, arguments.runs))
    summaries = [_read(folder, "summary") for folder in folders]
    manifests = [_read(folder, "manifest") for folder in folders]
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    asked = split(arguments.scenario, arguments.runs)
    ran = {folder.name.partition("@")[0] for folder in folders}
    absent = [label for label in asked if label not in ran]
    text = page(summaries, manifests, _command(arguments), absent)
    arguments.page.write_text(text, encoding="utf-8")
    print(f"written: {arguments.page}")


def split(scenario: Path, runs: Path, by: str | None = None) -> dict[str, Path]:
    """One scenario for each attack, or each of its budgets or compressions, beside its folder."""
    whole = yaml.safe_load(scenario.read_text(encoding="utf-8"))
    default = whole.pop("epsilons")
    runs.mkdir(parents=True, exist_ok=True)
    found = {}
    for attack in whole["attacks"]:
        budgets, compressions = attack.get("epsilons", default), whole["compressions"]
        parts = [("", budgets, compressions)]
        if by == "budget":
            parts = [(f"@{one.partition('/')[0]}", [one], compressions) for one in budgets]
        elif by == "compression":
            parts = [(f"@{one['type']}", budgets, [one]) for one in compressions]
        for suffix, some, these in parts:
            part = runs / f"{label_of(attack)}{suffix}.yaml"
            one = {**whole, "compressions": these, "attacks": [{**attack, "epsilons": some}]}
            part.write_text(yaml.safe_dump(one, sort_keys=False), encoding="utf-8")
            found[part.stem] = part
    return found


def label_of(attack: dict[str, Any]) -> str:
    """What the attack is called in the table."""
    return str(attack.get("name", attack["type"]))


def run(part: Path) -> None:
    """Run or resume one part."""
    folder = part.with_suffix("")
    command = [sys.executable, "-m", "redteam", "run", str(part), "--out", str(folder)]
    with part.with_suffix(".log").open("a", encoding="utf-8") as log:
        result = subprocess.run(command, stdout=log, stderr=log, check=False)  # noqa: S603
    if result.returncode not in (0, 1, 4):
        print(f"{part.stem}: exit {result.returncode}, see {part.with_suffix('.log')}")


def wanted(label: str, only: Sequence[str] | None) -> bool:
    """Whether a part was asked for, by its label or its attack's."""
    return not only or label in only or label.partition("@")[0] in only


def _folders(scenario: Path, runs: Path) -> Iterable[Path]:
    """Run folders that have something to say, in the order of the scenario."""
    for label in split(scenario, runs):
        parts = [runs / f"{label}{suffix}" for suffix in ("", *_suffixes(scenario))]
        found = [one for one in parts if (one / "summary.json").exists()]
        if not found:
            print(f"missing: {parts[0]}")
        yield from found[:1] if parts[0] in found else found


def _suffixes(scenario: Path) -> Iterable[str]:
    """What `split` may add to an attack's label, in order."""
    whole = yaml.safe_load(scenario.read_text(encoding="utf-8"))
    yield from (f"@{one['type']}" for one in whole["compressions"])
    yield from (f"@{one.partition('/')[0]}" for one in whole["epsilons"])


def _read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _command(arguments: argparse.Namespace) -> str:
    words = ["python benchmarks/results_attacks.py"]
    if arguments.scenario != SCENARIO:
        words += [f"--scenario {arguments.scenario}", f"--page {arguments.page}"]
    return " ".join(words)


def page(
    summaries: list[dict[str, Any]],
    manifests: list[dict[str, Any]],
    command: str,
    absent: Sequence[str],
) -> str:
    """The whole page.

    Args:
        summaries: of the parts.
        manifests: of the parts.
        command: that makes it.
        absent: attacks of the scenario that were not run.
    """
    cells = [cell for summary in summaries for cell in summary["cells"]]
    compressions = list(dict.fromkeys(cell["compression"] for cell in cells))
    parts = [_head(summaries, manifests, command, absent), _worst(cells, compressions)]
    parts += [_section(name, cells) for name in compressions]
    parts.append(_settings(manifests))
    return "\n".join(parts)


def _head(
    summaries: list[dict[str, Any]],
    manifests: list[dict[str, Any]],
    command: str,
    absent: Sequence[str],
) -> str:
    lacking = f"\n**Not run yet: {', '.join(absent)}.**\n" if absent else ""
    first = manifests[0]
    identity = json.dumps(
        first["provenance"].get("identity", {}).get("targets", {}), sort_keys=True
    )
    whole = {len(manifest["samples"]) for manifest in manifests}
    failed: dict[str, int] = {}
    for summary, manifest in zip(summaries, manifests, strict=True):
        name = manifest["scenario"]["attacks"][0]["name"]
        failed[name] = failed.get(name, 0) + summary["progress"]["errors"]
    errors = ", ".join(f"{count} of {name}" for name, count in failed.items() if count) or "0"
    missing = sum(summary["progress"]["missing"] for summary in summaries)
    return f"""# Every attack on the scenes LVLM

Made by `{command}` from the scenario it names (`{SCENARIO}` by default); do not edit.
{lacking}
{" or ".join(map(str, sorted(whole)))} samples of the held-out test split, one question a picture;
seed {first["seed"]}; device {first["provenance"].get("identity", {}).get("device", "unknown")};
{first["created"]}. Trials that ended in an error: {errors}; {missing}
did not run. 95 % intervals:
Wilson for rates, paired bootstrap by picture for CSG. Attack options were chosen on the validation
split. What the columns mean: [metrics.md](../metrics.md). *steps* are gradients taken for one
image, measured; *queries* are questions to the deployed target. The target is a tiny model of a
drawn world; nothing here says how a large model behaves.

<details><summary>Weights</summary>

`{identity}`

</details>
"""


def _worst(cells: list[Cell], compressions: list[str]) -> str:
    """The strongest attack at each compressor and budget, and ours against the published ones."""
    lines = ["## The strongest attack, cell by cell", ""]
    lines += ["| compression | ε·255 | published attack | CSFR | UPR | ours | CSFR | UPR |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for compression in compressions:
        for epsilon in sorted({cell["epsilon"] for cell in cells}):
            here = [
                cell
                for cell in cells
                if (cell["compression"], cell["epsilon"]) == (compression, epsilon)
                and cell["metrics"]["csfr"]["value"] is not None
            ]
            published = [cell for cell in here if kind(cell) not in NOT_PUBLISHED | CONTROLS]
            if not published:
                continue
            best = max(published, key=lambda cell: cell["metrics"]["csfr"]["value"])
            own = [cell for cell in here if kind(cell) == OURS]
            row = [compression, f"{epsilon * 255:g}", *_brief(best)]
            row += (
                _brief(max(own, key=lambda c: c["metrics"]["csfr"]["value"])) if own else ["–"] * 3
            )
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _brief(cell: Cell) -> list[str]:
    return [cell["attack"], interval(cell, "csfr"), value(cell, "upr")]


def kind(cell: Cell) -> str:
    """Type of a cell's attack; the manifest's spec is not in the summary, so from the label."""
    return str(cell["attack"]).partition(" ")[0]


def _section(compression: str, cells: list[Cell]) -> str:
    rows = [cell for cell in cells if cell["compression"] == compression]
    noise = {
        cell["epsilon"]: cell["metrics"]["csfr"]["high"] for cell in rows if kind(cell) in CONTROLS
    }
    lines = [
        f"## {compression}",
        "",
        "| " + " | ".join(title for title, _ in COLUMNS) + " | above noise |",
        "|" + "---|" * (len(COLUMNS) + 1),
    ]
    for cell in rows:
        bar = noise.get(cell["epsilon"])
        above = "" if bar is None or kind(cell) in CONTROLS else str(low(cell, "csfr") > bar)
        above = {"True": "yes", "False": "no"}.get(above, above)
        lines.append("| " + " | ".join([*(show(cell) for _, show in COLUMNS), above]) + " |")
    return "\n".join(lines) + "\n"


def _settings(manifests: list[dict[str, Any]]) -> str:
    lines = ["## Settings\n"]
    for manifest in manifests:
        for attack in manifest["scenario"]["attacks"]:
            options = {key: one for key, one in attack.items() if key not in ("name", "epsilons")}
            lines.append(f"- {attack['name']}: `{json.dumps(options)}`")
    # Parts of one attack say the same.
    return "\n".join(dict.fromkeys(lines)) + "\n"


def _effort(cell: Cell, name: str) -> str:
    found = cell.get("effort", {}).get(name)
    return "–" if found is None else f"{found:.4g}"


COLUMNS = (
    ("attack", lambda c: c["attack"]),
    ("knows", lambda c: c["knowledge"]),
    ("ε·255", lambda c: f"{c['epsilon'] * 255:g}"),
    ("n", lambda c: f"{c['n']}"),
    ("steps", lambda c: _effort(c, "backwards")),
    ("queries", lambda c: _effort(c, "queries")),
    ("full", lambda c: arrow(c, "full")),
    ("compressed", lambda c: arrow(c, "compressed")),
    ("UPR", lambda c: interval(c, "upr")),
    ("CAE", lambda c: interval(c, "cae")),
    ("CSG", lambda c: interval(c, "csg")),
    ("CSFR", lambda c: interval(c, "csfr")),
    ("CBR", lambda c: interval(c, "cbr")),
    ("full ASR", lambda c: interval(c, "full_asr")),
    ("diagnosis", diagnosis),
)


if __name__ == "__main__":
    main()
